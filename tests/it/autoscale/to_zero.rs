//! Scaling to zero, and what prevents it.

use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::autoscale::support::{
    HeldCalls, ScalingProvider, autoscaling_gateway, log_count, wait_until_scaled,
};
use crate::support::eventually;
use crate::support::provider::{Provider, ScaleGate, respond_ok};

fn short_idle_time() -> Value {
    json!({"zero": "true", "zero-duration": "1s", "max": "5"})
}

#[tokio::test]
async fn an_idle_function_scales_to_zero_but_not_during_a_call() {
    let (script, mut provider) =
        ScalingProvider::start(&[("busy", short_idle_time()), ("idle", short_idle_time())]);
    let gateway = autoscaling_gateway(&provider).start().await;
    eventually("the gateway has the function list", async || gateway.is_ready().await).await;
    let mut held = HeldCalls::default();
    held.hold(&gateway, &mut provider, "busy", 1).await;
    script.reset("busy");
    eventually("the idle function scales to zero", async || script.replicas("idle") == 0).await;
    // The busy function has been idle for as long as the other one was.
    let lists = script.list_count();
    eventually("more polls of the function list", async || script.list_count() > lists + 4).await;
    script.assert_not_scaled("busy");
    held.release().await;
    eventually("the function scales to zero, too", async || script.replicas("busy") == 0).await;
    // A function at zero is not scaled again.
    let lists = script.list_count();
    eventually("more polls of the function list", async || script.list_count() > lists + 4).await;
    assert_eq!((script.scale_requests("busy"), script.scale_requests("idle")), (vec![0], vec![0]));
}

#[tokio::test]
async fn a_function_just_scaled_to_zero_is_scaled_up_before_it_is_called() {
    let (script, mut provider) = ScalingProvider::start(&[("f", short_idle_time())]);
    let gateway = autoscaling_gateway(&provider).start().await;
    // Sooner than the next function list.
    gateway.wait_for_log("Scaled f.fn from 1 to 0").await;
    let mut held = HeldCalls::default();
    held.hold(&gateway, &mut provider, "f", 1).await;
    assert_eq!((script.replicas("f"), script.scale_requests("f")), (1, vec![0, 1]));
    held.release().await;
}

#[tokio::test]
async fn a_pending_queued_call_prevents_scaling_to_zero() {
    let (script, provider) =
        ScalingProvider::start(&[("busy", short_idle_time()), ("idle", short_idle_time())]);
    let state = tempfile::TempDir::new().unwrap();
    let gateway = autoscaling_gateway(&provider)
        .var("queue", "embedded")
        .var("with_worker", "false")
        .var("state_dir", state.path().display())
        .start()
        .await;
    let id = gateway.enqueue("busy", &[], "later").await;
    script.reset("busy");
    eventually("the idle function scales to zero", async || script.replicas("idle") == 0).await;
    let lists = script.list_count();
    eventually("more polls of the function list", async || script.list_count() > lists + 4).await;
    script.assert_not_scaled("busy");
    assert_eq!(gateway.cancel(&id).await.status(), 204);
    eventually("the function scales to zero, too", async || script.replicas("busy") == 0).await;
}

#[tokio::test]
async fn a_call_scales_a_function_up_from_zero() {
    let script = ScalingProvider::with_functions(&[("f", short_idle_time())]);
    let provider = script.builder().handler(|call| respond_ok(call, "awake")).start();
    let gateway = autoscaling_gateway(&provider).start().await;
    for round in 1..=2 {
        eventually("the function scales to zero", async || script.replicas("f") == 0).await;
        let response = gateway.get("/function/f").await;
        assert_eq!((response.status(), response.text()), (200, "awake"));
        let requests = script.scale_requests("f");
        assert_eq!(
            requests,
            [0, 1].repeat(round),
            "each time one request to scale to zero and one to scale up"
        );
    }
}

#[tokio::test]
async fn a_call_before_the_first_function_list_prevents_scaling_to_zero() {
    // A function that is not listed yet is not registered yet.
    let (script, mut provider) =
        ScalingProvider::start(&[("busy", short_idle_time()), ("idle", short_idle_time())]);
    script.lists_nothing.store(true, SeqCst);
    let gateway = autoscaling_gateway(&provider).start().await;
    let mut held = HeldCalls::default();
    held.hold(&gateway, &mut provider, "busy", 1).await;
    script.lists_nothing.store(false, SeqCst);
    eventually("the idle function scales to zero", async || script.replicas("idle") == 0).await;
    let lists = script.list_count();
    eventually("more polls of the function list", async || script.list_count() > lists + 4).await;
    script.assert_not_scaled("busy");
    held.release().await;
}

#[tokio::test]
async fn a_function_called_just_before_scaling_to_zero_keeps_its_replica() {
    // One more than are scaled concurrently.
    const NAMES: [&str; 9] = ["a", "b", "c", "d", "e", "f", "g", "h", "i"];
    // The target is so high that no load needs a second replica.
    let labels = json!({"zero": "true", "zero-duration": "6s", "target": "1000000"});
    let script = ScalingProvider::with_functions(&NAMES.map(|name| (name, labels.clone())));
    let gate = ScaleGate::closed();
    let provider =
        script.builder().scale_gate(&gate).handler(|call| respond_ok(call, "hello")).start();
    let gateway = autoscaling_gateway(&provider).start().await;
    eventually("eight functions are about to scale to zero", async || gate.waiting().len() == 8)
        .await;
    let waiting = gate.waiting();
    let path = |target: &String| target.split('?').next().unwrap().to_owned();
    let waiting: Vec<String> = waiting.iter().map(path).collect();
    let is_last = |name: &&str| !waiting.iter().any(|path| path.ends_with(&format!("/{name}")));
    let last = NAMES.into_iter().find(is_last).unwrap();
    // Calls until a sample has seen one. No call is in flight when the function's turn comes.
    let mut client = gateway.connect().await;
    let called = Instant::now();
    while called.elapsed() < Duration::from_secs(2) {
        assert_eq!(client.get(&format!("/function/{last}")).await.status(), 200);
    }
    gate.open();
    for name in NAMES.into_iter().filter(|name| *name != last) {
        gateway.wait_for_log(&format!("Scaled {name}.fn from 1 to 0")).await;
    }
    script.assert_not_scaled(last);
}

#[tokio::test]
async fn a_call_queries_the_status_of_a_function_that_is_being_scaled_to_zero() {
    let script = ScalingProvider::with_functions(&[("f", short_idle_time())]);
    let gate = ScaleGate::closed();
    let provider =
        script.builder().scale_gate(&gate).handler(|call| respond_ok(call, "hello")).start();
    let gateway = autoscaling_gateway(&provider).start().await;
    eventually("the function is about to scale to zero", async || gate.waiting().len() == 1).await;
    let questions = || {
        let requests = provider.api_requests().into_iter();
        requests.filter(|(head, _)| head.target().starts_with("/system/function/f")).count()
    };
    let before = questions();
    assert_eq!(gateway.get("/function/f").await.status(), 200);
    assert!(questions() > before, "the function was called without a status query");
    gate.open();
}

#[tokio::test]
async fn a_function_scaled_up_by_an_operator_stays_up_for_the_idle_time() {
    let duration = Duration::from_secs(5);
    let labels = json!({"zero": "true", "zero-duration": "5s", "max": "5"});
    let (script, provider) = ScalingProvider::start(&[("f", labels)]);
    let _gateway = autoscaling_gateway(&provider).start().await;
    eventually("the function scales to zero", async || script.replicas("f") == 0).await;
    let lists = script.list_count();
    eventually("the change is seen", async || script.list_count() > lists + 2).await;
    let scaled_up = Instant::now();
    script.set_replicas("f", 1);
    eventually("the function scales to zero again", async || script.replicas("f") == 0).await;
    assert!(scaled_up.elapsed() >= duration, "{:?}", scaled_up.elapsed());
    assert_eq!(script.scale_requests("f"), [0, 0]);
}

#[tokio::test]
async fn without_scale_from_zero_nothing_scales_to_zero() {
    let (script, provider) = ScalingProvider::start(&[("f", short_idle_time())]);
    let gateway = autoscaling_gateway(&provider).var("scale_from_zero", "false").start().await;
    gateway.wait_for_log("f.fn is not scaled to zero").await;
    wait_until_scaled(&gateway, "f.fn").await;
    let lists = script.list_count();
    eventually("more rounds than it takes", async || script.list_count() > lists + 6).await;
    script.assert_not_scaled("f");
    assert_eq!(log_count(&gateway, "f.fn is not scaled to zero"), 1);
}

#[tokio::test]
async fn a_function_with_scale_to_zero_disabled_keeps_its_replica() {
    let stays = json!({"zero-duration": "1s", "max": "5"});
    let (script, provider): (_, Provider) =
        ScalingProvider::start(&[("stays", stays), ("idle", short_idle_time())]);
    let _gateway = autoscaling_gateway(&provider).start().await;
    eventually("the idle function scales to zero", async || script.replicas("idle") == 0).await;
    script.assert_not_scaled("stays");
}
