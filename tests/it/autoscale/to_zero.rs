//! To zero, and what keeps a function from it.

use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::autoscale::support::{Held, Script, said, scales, scaling};
use crate::support::eventually;
use crate::support::provider::{Gate, Provider, always};

fn soon() -> Value {
    json!({"zero": "true", "zero-duration": "1s", "max": "5"})
}

#[tokio::test]
async fn an_idle_function_goes_to_zero_but_never_while_a_call_runs() {
    let (script, mut provider) = Script::start(&[("busy", soon()), ("idle", soon())]);
    let gateway = scaling(&provider).start().await;
    eventually("it knows the functions", async || gateway.is_ready().await).await;
    let mut held = Held::default();
    held.hold(&gateway, &mut provider, "busy", 1).await;
    script.reset("busy");
    eventually("the idle one sleeps", async || script.replicas("idle") == 0).await;
    // The other one would have had time enough since.
    let lists = script.lists();
    eventually("more rounds", async || script.lists() > lists + 4).await;
    script.untouched("busy");
    held.release().await;
    eventually("it sleeps, too", async || script.replicas("busy") == 0).await;
    // What sleeps is left alone.
    let lists = script.lists();
    eventually("more rounds", async || script.lists() > lists + 4).await;
    assert_eq!((script.asked("busy"), script.asked("idle")), (vec![0], vec![0]));
}

#[tokio::test]
async fn a_function_that_was_just_put_to_sleep_is_woken_before_it_is_called() {
    let (script, mut provider) = Script::start(&[("f", soon())]);
    let gateway = scaling(&provider).start().await;
    // Sooner than any list could tell.
    gateway.logs("Scaled f.fn from 1 to 0").await;
    let mut held = Held::default();
    held.hold(&gateway, &mut provider, "f", 1).await;
    assert_eq!((script.replicas("f"), script.asked("f")), (1, vec![0, 1]));
    held.release().await;
}

#[tokio::test]
async fn a_queued_call_that_waits_keeps_its_function_awake() {
    let (script, provider) = Script::start(&[("busy", soon()), ("idle", soon())]);
    let state = tempfile::TempDir::new().unwrap();
    let gateway = scaling(&provider)
        .var("queue", "embedded")
        .var("with_worker", "false")
        .var("state_dir", state.path().display())
        .start()
        .await;
    let id = gateway.queued("busy", &[], "later").await;
    script.reset("busy");
    eventually("the idle one sleeps", async || script.replicas("idle") == 0).await;
    let lists = script.lists();
    eventually("more rounds", async || script.lists() > lists + 4).await;
    script.untouched("busy");
    assert_eq!(gateway.cancel(&id).await.status(), 204);
    eventually("it sleeps, too", async || script.replicas("busy") == 0).await;
}

#[tokio::test]
async fn a_call_wakes_what_has_gone_to_zero() {
    let script = Script::of(&[("f", soon())]);
    let provider = script.builder().answering(|call| always(call, "awake")).start();
    let gateway = scaling(&provider).start().await;
    for round in 1..=2 {
        eventually("it sleeps", async || script.replicas("f") == 0).await;
        let answer = gateway.get("/function/f").await;
        assert_eq!((answer.status(), answer.text()), (200, "awake"));
        let asked = script.asked("f");
        assert_eq!(asked, [0, 1].repeat(round), "each time one request to sleep, one to wake");
    }
}

#[tokio::test]
async fn a_call_that_comes_before_the_first_list_keeps_its_function_awake() {
    // What is not listed yet is not known yet.
    let (script, mut provider) = Script::start(&[("busy", soon()), ("idle", soon())]);
    script.silent.store(true, SeqCst);
    let gateway = scaling(&provider).start().await;
    let mut held = Held::default();
    held.hold(&gateway, &mut provider, "busy", 1).await;
    script.silent.store(false, SeqCst);
    eventually("the idle one sleeps", async || script.replicas("idle") == 0).await;
    let lists = script.lists();
    eventually("more rounds", async || script.lists() > lists + 4).await;
    script.untouched("busy");
    held.release().await;
}

#[tokio::test]
async fn what_is_called_before_its_turn_to_sleep_stays_awake() {
    // One more than are changed at a time.
    const NAMES: [&str; 9] = ["a", "b", "c", "d", "e", "f", "g", "h", "i"];
    // However often it is called, it needs no more replicas.
    let labels = json!({"zero": "true", "zero-duration": "6s", "target": "1000000"});
    let script = Script::of(&NAMES.map(|name| (name, labels.clone())));
    let gate = Gate::closed();
    let provider = script.builder().behind(&gate).answering(|call| always(call, "hello")).start();
    let gateway = scaling(&provider).start().await;
    eventually("eight are to sleep", async || gate.waiting().len() == 8).await;
    let waiting = gate.waiting();
    let path = |target: &String| target.split('?').next().unwrap().to_owned();
    let waiting: Vec<String> = waiting.iter().map(path).collect();
    let is_last = |name: &&str| !waiting.iter().any(|path| path.ends_with(&format!("/{name}")));
    let last = NAMES.into_iter().find(is_last).unwrap();
    // Until some sample has seen a call. None runs any more when its turn comes.
    let mut caller = gateway.connect().await;
    let called = Instant::now();
    while called.elapsed() < Duration::from_secs(2) {
        assert_eq!(caller.get(&format!("/function/{last}")).await.status(), 200);
    }
    gate.open();
    for name in NAMES.into_iter().filter(|name| *name != last) {
        gateway.logs(&format!("Scaled {name}.fn from 1 to 0")).await;
    }
    script.untouched(last);
}

#[tokio::test]
async fn a_call_asks_while_its_function_is_being_put_to_sleep() {
    let script = Script::of(&[("f", soon())]);
    let gate = Gate::closed();
    let provider = script.builder().behind(&gate).answering(|call| always(call, "hello")).start();
    let gateway = scaling(&provider).start().await;
    eventually("it is to sleep", async || gate.waiting().len() == 1).await;
    let questions = || {
        let asked = provider.asked().into_iter();
        asked.filter(|(head, _)| head.target().starts_with("/system/function/f")).count()
    };
    let before = questions();
    assert_eq!(gateway.get("/function/f").await.status(), 200);
    assert!(questions() > before, "it was called as if it were sure to be ready");
    gate.open();
}

#[tokio::test]
async fn what_an_operator_wakes_stays_awake_for_as_long_as_a_call_would_keep_it() {
    let duration = Duration::from_secs(5);
    let labels = json!({"zero": "true", "zero-duration": "5s", "max": "5"});
    let (script, provider) = Script::start(&[("f", labels)]);
    let _gateway = scaling(&provider).start().await;
    eventually("it sleeps", async || script.replicas("f") == 0).await;
    let lists = script.lists();
    eventually("that is seen", async || script.lists() > lists + 2).await;
    let woken = Instant::now();
    script.scaled_by_hand("f", 1);
    eventually("it sleeps again", async || script.replicas("f") == 0).await;
    assert!(woken.elapsed() >= duration, "{:?}", woken.elapsed());
    assert_eq!(script.asked("f"), [0, 0]);
}

#[tokio::test]
async fn nothing_sleeps_that_nobody_would_wake() {
    let (script, provider) = Script::start(&[("f", soon())]);
    let gateway = scaling(&provider).var("scale_from_zero", "false").start().await;
    gateway.logs("f.fn is not scaled to zero").await;
    scales(&gateway, "f.fn").await;
    let lists = script.lists();
    eventually("more rounds than it takes", async || script.lists() > lists + 6).await;
    script.untouched("f");
    assert_eq!(said(&gateway, "f.fn is not scaled to zero"), 1);
}

#[tokio::test]
async fn a_function_that_may_not_sleep_stays() {
    let stays = json!({"zero-duration": "1s", "max": "5"});
    let (script, provider): (_, Provider) = Script::start(&[("stays", stays), ("idle", soon())]);
    let _gateway = scaling(&provider).start().await;
    eventually("the idle one sleeps", async || script.replicas("idle") == 0).await;
    script.untouched("stays");
}
