//! Scaling up and down with the load, and what prevents it.

use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::autoscale::support::{
    HeldCalls, ScalingProvider, autoscaling_gateway, is_increasing, log_count, wait_until_scaled,
};
use crate::support::eventually;
use crate::support::gateway::Gateway;
use crate::support::provider::Provider;

/// Labels for one concurrent call per replica.
fn one_call_per_replica() -> serde_json::Value {
    json!({"type": "capacity", "target": "1", "target-proportion": "1", "max": "6"})
}

#[tokio::test]
async fn replicas_follow_the_load() {
    let (script, mut provider) =
        ScalingProvider::start(&[("f", one_call_per_replica()), ("other", json!({}))]);
    let gateway = autoscaling_gateway(&provider).start().await;
    wait_until_scaled(&gateway, "f.fn").await;
    let mut held = HeldCalls::default();
    held.hold(&gateway, &mut provider, "f", 4).await;
    eventually("one replica per call", async || script.replicas("f") == 4).await;
    let up = script.scale_requests("f");
    assert!(is_increasing(&up), "{up:?}");
    held.release().await;
    eventually("the minimum number of replicas", async || script.replicas("f") == 1).await;
    let down: Vec<u64> = script.scale_requests("f")[up.len()..].iter().rev().copied().collect();
    assert!(is_increasing(&down), "{:?}", script.scale_requests("f"));
    script.assert_not_scaled("other");
    // Each change is logged and counted once.
    let changes = script.scale_requests("f").len();
    eventually("one log line per change", async || {
        log_count(&gateway, "Scaled f.fn from") >= changes
    })
    .await;
    assert_eq!(log_count(&gateway, "Scaled f.fn from"), changes);
    let counted = |metrics: &crate::support::metrics::Metrics| {
        metrics.get("gateway_autoscale_decisions_total", &[("function_name", "f.fn")])
    };
    gateway.wait_for_metric("all calls are counted", |m| counted(m) == Some(changes as f64)).await;
    let metrics = gateway.metrics().await;
    let labels = [("function_name", "f.fn"), ("scaling_type", "capacity")];
    assert_eq!(metrics.get("gateway_service_target_load", &labels), Some(1.0));
    assert_eq!(metrics.get("gateway_autoscale_leader", &[]), Some(1.0));
    assert_eq!(
        metrics.get("gateway_autoscale_desired_replicas", &[("function_name", "other.fn")]),
        None
    );
}

#[tokio::test]
async fn the_request_rate_counts_for_functions_scaled_by_rps() {
    let labels = json!({"target": "1", "target-proportion": "1", "max": "50"});
    let script = ScalingProvider::with_functions(&[("f", labels)]);
    let provider = script
        .builder()
        .handler(|call| crate::support::provider::respond_ok(call, "hello"))
        .start();
    let gateway = autoscaling_gateway(&provider).start().await;
    let mut client = gateway.connect().await;
    eventually("more than a few", async || {
        for _ in 0..20 {
            assert_eq!(client.get("/function/f").await.status(), 200);
        }
        script.replicas("f") >= 10
    })
    .await;
    assert!(is_increasing(&script.scale_requests("f")), "{:?}", script.scale_requests("f"));
}

#[tokio::test]
async fn cpu_usage_from_the_provider_counts_for_functions_scaled_by_cpu() {
    let labels = json!({"type": "cpu", "target": "1000", "target-proportion": "1", "max": "9"});
    let (script, provider) = ScalingProvider::start(&[("f", labels)]);
    let gateway = autoscaling_gateway(&provider).start().await;
    gateway.wait_for_log("f.fn is not scaled by cpu").await;
    script.assert_not_scaled("f");
    script.cpu.store(2500, SeqCst);
    eventually("three replicas for 2.5 cores", async || script.replicas("f") == 3).await;
    script.cpu.store(900, SeqCst);
    eventually("one replica for less than a core", async || script.replicas("f") == 1).await;
    assert_eq!(log_count(&gateway, "f.fn is not scaled by cpu"), 1);
}

#[tokio::test]
async fn nothing_is_scaled_while_the_provider_fails() {
    let (script, mut provider) = ScalingProvider::start(&[("f", one_call_per_replica())]);
    let gateway = autoscaling_gateway(&provider).start().await;
    eventually("the function list is polled", async || script.list_count() > 2).await;
    let mut held = HeldCalls::default();
    script.failing.store(true, SeqCst);
    held.hold(&gateway, &mut provider, "f", 3).await;
    gateway.wait_for_log("The provider does not list its functions").await;
    script.assert_not_scaled("f");
    // The provider works again, but refuses the first scale requests.
    script.refusals.store(2, SeqCst);
    let back = Instant::now();
    script.failing.store(false, SeqCst);
    eventually("one replica per call", async || script.replicas("f") == 3).await;
    // After each refusal the autoscaler waits for most of a round.
    assert!(back.elapsed() >= Duration::from_millis(2900), "{:?}", back.elapsed());
    gateway.wait_for_log("f.fn cannot be scaled").await;
    assert_eq!(log_count(&gateway, "f.fn cannot be scaled"), 1);
    held.release().await;
}

#[tokio::test]
async fn an_invalid_label_is_logged_once_and_its_default_is_used() {
    let labels = json!({"type": "memory", "max": "lots", "min": "2"});
    let (script, provider) = ScalingProvider::start(&[("f", labels)]);
    let gateway = autoscaling_gateway(&provider).start().await;
    eventually("its minimum of replicas", async || script.replicas("f") == 2).await;
    let lists = script.list_count();
    eventually("the autoscaler polls again", async || script.list_count() > lists + 2).await;
    for label in ["scale.type", "scale.max"] {
        let text = format!("Label com.openfaas.{label} of f.fn");
        gateway.wait_for_log(&text).await;
        assert_eq!(log_count(&gateway, &text), 1, "{label}");
    }
    let metrics = gateway.metrics().await;
    let labels = [("function_name", "f.fn"), ("scaling_type", "rps")];
    assert_eq!(metrics.get("gateway_service_target_load", &labels), Some(50.0));
}

#[tokio::test]
async fn alerts_for_autoscaled_functions_are_ignored() {
    let (script, provider) = ScalingProvider::start(&[
        ("f", one_call_per_replica()),
        ("other", json!({"factor": "50"})),
    ]);
    let gateway = autoscaling_gateway(&provider).start().await;
    let alert = |status: &str| {
        let alert = |name| json!({"status": status, "labels": {"function_name": name}});
        json!({"alerts": [alert("f.fn"), alert("other.fn")]}).to_string()
    };
    assert_eq!(gateway.post("/system/alert", &alert("firing")).await.status(), 200);
    assert_eq!(gateway.post("/system/alert", &alert("resolved")).await.status(), 200);
    assert_eq!(script.scale_requests("other"), [11, 1]);
    script.assert_not_scaled("f");
    gateway.wait_for_log("Alerts for f.fn are ignored").await;
    assert_eq!(log_count(&gateway, "Alerts for f.fn are ignored"), 1);
}

#[tokio::test]
async fn without_autoscale_functions_are_scaled_by_alerts() {
    let (script, mut provider) = ScalingProvider::start(&[("f", one_call_per_replica())]);
    let gateway = Gateway::in_front_of(&provider).await;
    let mut held = HeldCalls::default();
    held.hold(&gateway, &mut provider, "f", 4).await;
    let alert = r#"{"alerts":[{"status":"firing","labels":{"function_name":"f.fn"}}]}"#;
    assert_eq!(gateway.post("/system/alert", alert).await.status(), 200);
    assert_eq!(script.scale_requests("f"), [2]);
    assert_eq!(gateway.metrics().await.get("gateway_autoscale_leader", &[]), None);
    held.release().await;
}

#[tokio::test]
async fn an_invalid_autoscale_window_stops_the_start() {
    let provider = Provider::manual();
    let output =
        autoscaling_gateway(&provider).var("autoscale_window", "1s").run_to_exit(&[]).await;
    assert_eq!(output.status.code(), Some(64));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.contains("autoscale_window: \"1s\" is not a duration from 2s to 1h"),
        "{stderr}"
    );
}
