//! To zero, and what keeps a function from it.

use std::sync::atomic::Ordering::SeqCst;

use serde_json::{Value, json};

use crate::autoscale::support::{Held, Script, said, scales, scaling};
use crate::support::eventually;
use crate::support::provider::Provider;

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
    let provider =
        script.builder().answering(|call| crate::support::provider::always(call, "awake")).start();
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
