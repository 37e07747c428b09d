//! Up with the load, down when it is gone, and what keeps it from that.

use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::autoscale::support::{Held, Script, rises, said, scales, scaling};
use crate::support::eventually;
use crate::support::gateway::Gateway;
use crate::support::provider::Provider;

/// One call for each replica.
fn one_each() -> serde_json::Value {
    json!({"type": "capacity", "target": "1", "target-proportion": "1", "max": "6"})
}

#[tokio::test]
async fn replicas_come_with_the_load_and_go_with_it() {
    let (script, mut provider) = Script::start(&[("f", one_each()), ("other", json!({}))]);
    let gateway = scaling(&provider).start().await;
    scales(&gateway, "f.fn").await;
    let mut held = Held::default();
    held.hold(&gateway, &mut provider, "f", 4).await;
    eventually("as many replicas as calls", async || script.replicas("f") == 4).await;
    let up = script.asked("f");
    assert!(rises(&up), "{up:?}");
    held.release().await;
    eventually("back to the least", async || script.replicas("f") == 1).await;
    let down: Vec<u64> = script.asked("f")[up.len()..].iter().rev().copied().collect();
    assert!(rises(&down), "{:?}", script.asked("f"));
    script.untouched("other");
    // Each change is logged once, and counted.
    let changes = script.asked("f").len();
    eventually("a line for each", async || said(&gateway, "Scaled f.fn from") >= changes).await;
    assert_eq!(said(&gateway, "Scaled f.fn from"), changes);
    let counted = |metrics: &crate::support::metrics::Metrics| {
        metrics.get("gateway_autoscale_decisions_total", &[("function_name", "f.fn")])
    };
    gateway.metrics_show("all are counted", |m| counted(m) == Some(changes as f64)).await;
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
async fn calls_in_a_second_count_for_rps() {
    let labels = json!({"target": "1", "target-proportion": "1", "max": "50"});
    let script = Script::of(&[("f", labels)]);
    let provider =
        script.builder().answering(|call| crate::support::provider::always(call, "hello")).start();
    let gateway = scaling(&provider).start().await;
    let mut caller = gateway.connect().await;
    eventually("more than a few", async || {
        for _ in 0..20 {
            assert_eq!(caller.get("/function/f").await.status(), 200);
        }
        script.replicas("f") >= 10
    })
    .await;
    assert!(rises(&script.asked("f")), "{:?}", script.asked("f"));
}

#[tokio::test]
async fn what_the_provider_tells_of_cpu_counts_for_cpu() {
    let labels = json!({"type": "cpu", "target": "1000", "target-proportion": "1", "max": "9"});
    let (script, provider) = Script::start(&[("f", labels)]);
    let gateway = scaling(&provider).start().await;
    gateway.logs("f.fn is not scaled by cpu").await;
    script.untouched("f");
    script.cpu.store(2500, SeqCst);
    eventually("three for 2.5 cores", async || script.replicas("f") == 3).await;
    script.cpu.store(900, SeqCst);
    eventually("one for less than a core", async || script.replicas("f") == 1).await;
    assert_eq!(said(&gateway, "f.fn is not scaled by cpu"), 1);
}

#[tokio::test]
async fn while_the_provider_fails_nothing_changes_and_then_it_heals() {
    let (script, mut provider) = Script::start(&[("f", one_each())]);
    let gateway = scaling(&provider).start().await;
    eventually("it asks", async || script.lists() > 2).await;
    let mut held = Held::default();
    script.broken.store(true, SeqCst);
    held.hold(&gateway, &mut provider, "f", 3).await;
    gateway.logs("The provider does not list its functions").await;
    script.untouched("f");
    // It is back, but does not do as it is told at first.
    script.refusals.store(2, SeqCst);
    let back = Instant::now();
    script.broken.store(false, SeqCst);
    eventually("as many replicas as calls", async || script.replicas("f") == 3).await;
    // Each refusal was taken to hold for most of a round.
    assert!(back.elapsed() >= Duration::from_millis(2900), "{:?}", back.elapsed());
    assert_eq!(said(&gateway, "f.fn cannot be scaled"), 1);
    held.release().await;
}

#[tokio::test]
async fn a_label_that_means_nothing_is_said_once_and_its_default_holds() {
    let labels = json!({"type": "memory", "max": "lots", "min": "2"});
    let (script, provider) = Script::start(&[("f", labels)]);
    let gateway = scaling(&provider).start().await;
    eventually("its least", async || script.replicas("f") == 2).await;
    let lists = script.lists();
    eventually("it looks again", async || script.lists() > lists + 2).await;
    for label in ["scale.type", "scale.max"] {
        assert_eq!(said(&gateway, &format!("Label com.openfaas.{label} of f.fn")), 1, "{label}");
    }
    let metrics = gateway.metrics().await;
    let labels = [("function_name", "f.fn"), ("scaling_type", "rps")];
    assert_eq!(metrics.get("gateway_service_target_load", &labels), Some(50.0));
}

#[tokio::test]
async fn alerts_of_functions_that_are_scaled_by_load_are_ignored() {
    let (script, provider) =
        Script::start(&[("f", one_each()), ("other", json!({"factor": "50"}))]);
    let gateway = scaling(&provider).start().await;
    let alert = |status: &str| {
        let alert = |name| json!({"status": status, "labels": {"function_name": name}});
        json!({"alerts": [alert("f.fn"), alert("other.fn")]}).to_string()
    };
    assert_eq!(gateway.post("/system/alert", &alert("firing")).await.status(), 200);
    assert_eq!(gateway.post("/system/alert", &alert("resolved")).await.status(), 200);
    assert_eq!(script.asked("other"), [11, 1]);
    script.untouched("f");
    assert_eq!(said(&gateway, "Alerts of f.fn are ignored"), 1);
}

#[tokio::test]
async fn without_the_setting_alerts_are_all_there_is() {
    let (script, mut provider) = Script::start(&[("f", one_each())]);
    let gateway = Gateway::before(&provider).await;
    let mut held = Held::default();
    held.hold(&gateway, &mut provider, "f", 4).await;
    let alert = r#"{"alerts":[{"status":"firing","labels":{"function_name":"f.fn"}}]}"#;
    assert_eq!(gateway.post("/system/alert", alert).await.status(), 200);
    assert_eq!(script.asked("f"), [2]);
    assert_eq!(gateway.metrics().await.get("gateway_autoscale_leader", &[]), None);
    held.release().await;
}

#[tokio::test]
async fn a_window_that_is_none_stops_the_start() {
    let provider = Provider::by_hand();
    let output = scaling(&provider).var("autoscale_window", "1s").output(&[]).await;
    assert_eq!(output.status.code(), Some(64));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("autoscale_window: \"1s\" is not a duration from 2s to 1h"), "{said}");
}
