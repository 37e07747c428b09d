//! Several gateways with a real nats-server: all see the sum, one acts.

use serde_json::json;

use crate::autoscale::support::{Held, Script, rises, said, scaling};
use crate::support::eventually;
use crate::support::gateway::{Builder, Gateway};
use crate::support::nats::Nats;

fn one_each() -> serde_json::Value {
    json!({"type": "capacity", "target": "1", "target-proportion": "1", "max": "20"})
}

fn on(nats: &Nats, builder: Builder) -> Builder {
    builder
        .var("faas_nats_address", "127.0.0.1")
        .var("faas_nats_port", nats.port())
        .var("queue", "none")
        .var("autoscale_window", "4s")
}

/// Waits until `gateway` acts, or does not, and knows of so many.
async fn stands(gateway: &Gateway, acting: bool, gateways: f64) {
    gateway
        .metrics_show("who acts", |metrics| {
            metrics.get("gateway_autoscale_leader", &[]) == Some(f64::from(u8::from(acting)))
                && metrics.get("gateway_autoscale_members", &[]) == Some(gateways)
        })
        .await;
}

#[tokio::test]
async fn one_acts_on_what_all_see_and_another_takes_over_when_it_is_killed() {
    let nats = Nats::start();
    let (script, mut provider) = Script::start(&[("f", one_each())]);
    // Five of them pass after a loss until a replica goes.
    let on = |builder| on(&nats, builder).var("autoscale_window", "2s");
    let first = on(scaling(&provider)).start().await;
    stands(&first, true, 1.0).await;
    let second = on(scaling(&provider)).start().await;
    stands(&first, true, 2.0).await;
    stands(&second, false, 2.0).await;
    let (mut held, mut lost) = (Held::default(), Held::default());
    lost.hold(&first, &mut provider, "f", 2).await;
    held.hold(&second, &mut provider, "f", 3).await;
    eventually("a replica for each call of both", async || script.replicas("f") == 5).await;
    assert_eq!(said(&second, "Scaled f.fn"), 0);

    first.kill().await;
    stands(&second, true, 1.0).await;
    // Its callers come to the other one, and bring more.
    held.hold(&second, &mut provider, "f", 5).await;
    eventually("the other one goes on", async || script.replicas("f") == 8).await;
    // Nothing was asked twice, and nothing was taken away in between.
    assert!(rises(&script.asked("f")), "{:?}", script.asked("f"));
    held.release().await;
    eventually("back to the least", async || script.replicas("f") == 1).await;
}

#[tokio::test]
async fn one_that_stops_hands_over_without_waiting_for_silence() {
    let nats = Nats::start();
    let (_script, provider) = Script::start(&[("f", one_each())]);
    let first = on(&nats, scaling(&provider)).start().await;
    let second = on(&nats, scaling(&provider)).start().await;
    stands(&first, true, 2.0).await;
    stands(&second, false, 2.0).await;
    assert!(first.terminate().await.success());
    stands(&second, true, 1.0).await;
}

#[tokio::test]
async fn while_nats_is_away_replicas_come_but_none_goes() {
    let mut nats = Nats::start();
    let (script, mut provider) = Script::start(&[("f", one_each())]);
    let first = on(&nats, scaling(&provider)).start().await;
    let second = on(&nats, scaling(&provider)).start().await;
    stands(&first, true, 2.0).await;
    stands(&second, false, 2.0).await;
    let mut held = Held::default();
    held.hold(&second, &mut provider, "f", 4).await;
    eventually("a replica for each call", async || script.replicas("f") == 4).await;
    nats.kill();
    stands(&second, true, 1.0).await;
    // The first one sees no call at all now.
    let lists = script.lists();
    eventually("more rounds than a window has", async || script.lists() > lists + 8).await;
    assert_eq!(script.replicas("f"), 4);
    held.hold(&second, &mut provider, "f", 3).await;
    eventually("what the second one sees", async || script.replicas("f") == 7).await;
    nats.restart();
    stands(&first, true, 2.0).await;
    stands(&second, false, 2.0).await;
    assert!(rises(&script.asked("f")), "{:?}", script.asked("f"));
    held.release().await;
    eventually("back to the least", async || script.replicas("f") == 1).await;
}

#[tokio::test]
async fn calls_that_a_worker_makes_count() {
    let nats = Nats::start();
    let (script, mut provider) = Script::start(&[("f", one_each())]);
    let queueing = |builder| on(&nats, builder).var("queue", "jetstream");
    let gateway = queueing(scaling(&provider)).var("with_worker", "false").start().await;
    let _worker = queueing(Gateway::worker()).provider(&provider).start().await;
    eventually("it is queued", async || gateway.queue("f", &[], "").await.status() == 202).await;
    for _ in 0..2 {
        gateway.queued("f", &[], "").await;
    }
    let mut calls = Vec::new();
    for _ in 0..3 {
        calls.push(provider.call().await);
    }
    eventually("a replica for each", async || script.replicas("f") == 3).await;
    stands(&gateway, true, 1.0).await;
    for call in &mut calls {
        call.answer(200, "done").await;
    }
    eventually("back to the least", async || script.replicas("f") == 1).await;
}
