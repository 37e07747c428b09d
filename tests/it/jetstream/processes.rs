//! The queue on JetStream as callers and operators see it: gateway and worker as processes of their own.

use std::time::Duration;

use crate::support::eventually;
use crate::support::gateway::{Builder, Gateway};
use crate::support::jetstream_queue::stream;
use crate::support::metrics::Metrics;
use crate::support::nats::Nats;
use crate::support::provider::{Call, Provider};
use crate::support::queue::{answering, patient};

pub(crate) fn on(nats: &Nats, builder: Builder) -> Builder {
    builder
        .var("faas_nats_address", "127.0.0.1")
        .var("faas_nats_port", nats.port())
        .var("queue", "jetstream")
        .var("callback_allowlist", "loopback")
}

/// Whether `/_/ready` says that the queue cannot be reached; it is ready all the same.
async fn lacks_queue(gateway: &Gateway) -> bool {
    let answer = gateway.get("/_/ready").await;
    assert_eq!(answer.status(), 200, "{answer}");
    answer.json()["degraded"] == serde_json::json!(["queue"])
}

/// It has started, and found its queue.
pub(crate) async fn has_queue(gateway: &Gateway) {
    eventually("it is ready", async || gateway.is_ready().await).await;
    eventually("the queue is there", async || !lacks_queue(gateway).await).await;
}

/// Calls go on, and what is to be queued is refused for now.
async fn goes_on_without(gateway: &Gateway) {
    eventually("the queue is away", async || lacks_queue(gateway).await).await;
    let answer = gateway.queue("echo", &[], "").await;
    assert_eq!((answer.status(), answer.header("retry-after")), (503, Some("1")), "{answer}");
    assert_eq!(gateway.post("/function/echo", "x").await.status(), 200);
}

#[tokio::test]
async fn calls_go_on_while_nats_is_away_and_all_heals() {
    let (mut nats, provider) = (Nats::away(), answering(&[200], "done"));
    let gateway = on(&nats, Gateway::builder()).provider(&provider).start().await;
    eventually("it is ready", async || gateway.is_ready().await).await;
    for _ in 0..2 {
        goes_on_without(&gateway).await;
        nats.restart();
        eventually("the queue is there", async || !lacks_queue(&gateway).await).await;
        let id = gateway.queued("echo", &[], "").await;
        gateway.becomes(&id, "succeeded").await;
        nats.kill();
    }
    goes_on_without(&gateway).await;
    nats.restart();
    let reconnected = |it: &Metrics| it.get("gateway_nats_reconnect_total", &[]) >= Some(1.0);
    gateway.metrics_show("it has come back", reconnected).await;
}

#[tokio::test]
async fn a_server_that_keeps_nothing_is_no_queue() {
    let directory = tempfile::TempDir::new().unwrap();
    let path = directory.path().join("nats.conf");
    let user = r#"{ user: a, password: b, permissions: { publish: { deny: "$JS.API.>" } } }"#;
    std::fs::write(&path, format!("authorization {{ users = [ {user} ] }}")).unwrap();
    let nats = Nats::start_with(&["-c", path.to_str().unwrap()]);
    let provider = answering(&[200], "done");
    let gateway = on(&nats, Gateway::builder()).provider(&provider);
    let gateway = gateway.var("nats_user", "a").var("nats_password", "b").start().await;
    gateway.logs("The queue's server is there").await;
    eventually("it is ready", async || gateway.is_ready().await).await;
    goes_on_without(&gateway).await;
}

#[tokio::test]
async fn a_call_that_fails_twice_is_made_three_times_and_called_back_once() {
    let (nats, provider) = (Nats::start(), answering(&[500, 500, 200], "done"));
    let hook = Provider::saying("thanks");
    let gateway = on(&nats, Gateway::builder()).provider(&provider).start().await;
    has_queue(&gateway).await;
    let callback = format!("X-Callback-Url: {}/function/hook", hook.url());
    let id = gateway.queued("echo", &[&callback], "").await;
    let told = gateway.becomes(&id, "succeeded").await;
    assert_eq!((&told["attempts"], &told["status"]), (&3.into(), &200.into()), "{told}");
    assert_eq!((provider.calls(), hook.calls()), (3, 1));
}

#[tokio::test]
async fn a_call_that_runs_for_longer_than_ack_wait_is_made_once() {
    const ACK_WAIT: Duration = Duration::from_secs(1);
    let nats = Nats::start();
    let provider = patient()
        .answering(async |mut call| {
            // As long as the call takes: three times what the server waits for a word.
            tokio::time::sleep(ACK_WAIT * 3).await;
            call.answer(200, "done").await;
            Some(call.wire)
        })
        .start();
    let brief = |builder: Builder| on(&nats, builder).provider(&provider).var("ack_wait", "1s");
    let gateway = brief(Gateway::builder()).var("with_worker", "false").start().await;
    has_queue(&gateway).await;
    let (_one, _two) =
        (brief(Gateway::worker()).start().await, brief(Gateway::worker()).start().await);
    let id = gateway.queued("echo", &[], "").await;
    let told = gateway.becomes(&id, "succeeded").await;
    assert_eq!((&told["attempts"], provider.calls()), (&1.into(), 1), "{told}");
}

#[tokio::test]
async fn headers_of_an_answer_that_nats_does_not_take_are_left_out_with_it() {
    let nats = Nats::start();
    let answering = async |mut call: Call| {
        let long = "x".repeat(40_000);
        let head =
            format!("HTTP/1.1 200 OK\r\nX-A: {long}\r\nX-B: {long}\r\nContent-Length: 2\r\n\r\nok");
        call.wire.send(&head).await;
        Some(call.wire)
    };
    let provider = patient().answering(answering).start();
    let gateway = on(&nats, Gateway::builder()).provider(&provider).start().await;
    has_queue(&gateway).await;
    // One of those that may go together, and one that goes alone.
    for headers in [&[][..], &["X-Call-Id: mine"]] {
        let id = gateway.queued("echo", headers, "").await;
        let told = gateway.becomes(&id, "succeeded").await;
        assert_eq!((&told["attempts"], &told["status"]), (&1.into(), &200.into()), "{told}");
    }
    assert_eq!(provider.calls(), 2);
}

#[tokio::test]
async fn a_call_whose_body_is_lost_is_dead_and_its_caller_is_told() {
    let (nats, provider) = (Nats::start(), answering(&[200], "done"));
    let hook = Provider::saying("thanks");
    let gateway = on(&nats, Gateway::builder()).var("ack_wait", "1s");
    let gateway = gateway.provider(&provider).start().await;
    has_queue(&gateway).await;
    let callback = format!("X-Callback-Url: {}/function/hook", hook.url());
    let body = "x".repeat(1_500_000);
    let id = gateway.queued("echo", &[&callback, "X-Delay-Seconds: 1"], &body).await;
    let bodies = stream(&nats, "gateway-faas-request-bodies").await;
    assert!(bodies.purge().await.unwrap().purged > 0);
    let told = gateway.becomes(&id, "failed").await;
    assert_eq!((&told["dead"], &told["reason"]), (&true.into(), &"its body is missing".into()));
    assert_eq!((provider.calls(), hook.calls()), (0, 1));
    let buried = |it: &Metrics| it.get("gateway_queue_dead_letters_total", &[]) == Some(1.0);
    gateway.metrics_show("it is counted", buried).await;
}
