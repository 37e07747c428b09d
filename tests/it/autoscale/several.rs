//! Several gateways with a real nats-server: all see the total load, one scales.

use serde_json::json;

use crate::autoscale::support::{
    HeldCalls, ScalingProvider, autoscaling_gateway, is_increasing, log_count,
};
use crate::support::eventually;
use crate::support::gateway::{Builder, Gateway};
use crate::support::nats::Nats;

fn one_call_per_replica() -> serde_json::Value {
    json!({"type": "capacity", "target": "1", "target-proportion": "1", "max": "20"})
}

fn with_nats(nats: &Nats, builder: Builder) -> Builder {
    builder
        .var("faas_nats_address", "127.0.0.1")
        .var("faas_nats_port", nats.port())
        .var("queue", "none")
        .var("autoscale_window", "4s")
}

/// Waits until `gateway` is, or is not, the leader among `gateways` members.
async fn wait_for_membership(gateway: &Gateway, acting: bool, gateways: f64) {
    gateway
        .wait_for_metric("the leadership gauge", |metrics| {
            metrics.get("gateway_autoscale_leader", &[]) == Some(f64::from(u8::from(acting)))
                && metrics.get("gateway_autoscale_members", &[]) == Some(gateways)
        })
        .await;
}

#[tokio::test]
async fn one_gateway_scales_by_the_load_of_all_and_another_takes_over_when_it_is_killed() {
    let nats = Nats::start();
    let (script, mut provider) = ScalingProvider::start(&[("f", one_call_per_replica())]);
    // After a loss, five windows pass before a replica is removed.
    let with_short_window = |builder| with_nats(&nats, builder).var("autoscale_window", "2s");
    let first = with_short_window(autoscaling_gateway(&provider)).start().await;
    wait_for_membership(&first, true, 1.0).await;
    let second = with_short_window(autoscaling_gateway(&provider)).start().await;
    wait_for_membership(&first, true, 2.0).await;
    wait_for_membership(&second, false, 2.0).await;
    let (mut held, mut lost) = (HeldCalls::default(), HeldCalls::default());
    lost.hold(&first, &mut provider, "f", 2).await;
    held.hold(&second, &mut provider, "f", 3).await;
    eventually("one replica per call of both gateways", async || script.replicas("f") == 5).await;
    assert_eq!(log_count(&second, "Scaled f.fn"), 0);

    first.kill().await;
    wait_for_membership(&second, true, 1.0).await;
    // The clients of the killed gateway connect to the other one, with additional calls.
    held.hold(&second, &mut provider, "f", 5).await;
    eventually("the other gateway continues", async || script.replicas("f") == 8).await;
    // No scale request was repeated, and no replica was removed in between.
    assert!(is_increasing(&script.scale_requests("f")), "{:?}", script.scale_requests("f"));
    held.release().await;
    eventually("the minimum number of replicas", async || script.replicas("f") == 1).await;
}

#[tokio::test]
async fn a_gateway_that_stops_hands_leadership_over_immediately() {
    let nats = Nats::start();
    let (_script, provider) = ScalingProvider::start(&[("f", one_call_per_replica())]);
    let first = with_nats(&nats, autoscaling_gateway(&provider)).start().await;
    let second = with_nats(&nats, autoscaling_gateway(&provider)).start().await;
    wait_for_membership(&first, true, 2.0).await;
    wait_for_membership(&second, false, 2.0).await;
    assert!(first.terminate().await.success());
    wait_for_membership(&second, true, 1.0).await;
}

#[tokio::test]
async fn without_nats_functions_scale_up_but_not_down() {
    let mut nats = Nats::start();
    let (script, mut provider) = ScalingProvider::start(&[("f", one_call_per_replica())]);
    let first = with_nats(&nats, autoscaling_gateway(&provider)).start().await;
    let second = with_nats(&nats, autoscaling_gateway(&provider)).start().await;
    wait_for_membership(&first, true, 2.0).await;
    wait_for_membership(&second, false, 2.0).await;
    let mut held = HeldCalls::default();
    held.hold(&second, &mut provider, "f", 4).await;
    eventually("one replica per call", async || script.replicas("f") == 4).await;
    nats.kill();
    wait_for_membership(&second, true, 1.0).await;
    // The first gateway has no calls now.
    let lists = script.list_count();
    eventually("more rounds than a window has", async || script.list_count() > lists + 8).await;
    assert_eq!(script.replicas("f"), 4);
    held.hold(&second, &mut provider, "f", 3).await;
    eventually("the load that the second gateway sees", async || script.replicas("f") == 7).await;
    nats.restart();
    wait_for_membership(&first, true, 2.0).await;
    wait_for_membership(&second, false, 2.0).await;
    assert!(is_increasing(&script.scale_requests("f")), "{:?}", script.scale_requests("f"));
    held.release().await;
    eventually("the minimum number of replicas", async || script.replicas("f") == 1).await;
}

#[tokio::test]
async fn calls_executed_by_a_worker_count_as_load() {
    let nats = Nats::start();
    let (script, mut provider) = ScalingProvider::start(&[("f", one_call_per_replica())]);
    let with_jetstream = |builder| with_nats(&nats, builder).var("queue", "jetstream");
    let gateway =
        with_jetstream(autoscaling_gateway(&provider)).var("with_worker", "false").start().await;
    let _worker = with_jetstream(Gateway::worker()).provider(&provider).start().await;
    eventually("the call is enqueued", async || {
        gateway.send_async("f", &[], "").await.status() == 202
    })
    .await;
    for _ in 0..2 {
        gateway.enqueue("f", &[], "").await;
    }
    let mut calls = Vec::new();
    for _ in 0..3 {
        calls.push(provider.next_call().await);
    }
    eventually("one replica per call", async || script.replicas("f") == 3).await;
    wait_for_membership(&gateway, true, 1.0).await;
    for call in &mut calls {
        call.respond(200, "done").await;
    }
    eventually("the minimum number of replicas", async || script.replicas("f") == 1).await;
}
