//! JetStream as clients and operators see it: gateway and worker as separate processes.

use std::time::Duration;

use crate::support::eventually;
use crate::support::gateway::{Builder, Gateway};
use crate::support::jetstream_queue::stream;
use crate::support::metrics::Metrics;
use crate::support::nats::Nats;
use crate::support::provider::{Invocation, Provider};
use crate::support::queue::{fast_retry, replying_with};

pub(crate) fn on_jetstream(nats: &Nats, builder: Builder) -> Builder {
    builder
        .var("faas_nats_address", "127.0.0.1")
        .var("faas_nats_port", nats.port())
        .var("queue", "jetstream")
        .var("callback_allowlist", "loopback")
}

/// Returns whether `/_/ready` reports that the queue is unreachable, with status 200.
async fn is_queue_degraded(gateway: &Gateway) -> bool {
    let response = gateway.get("/_/ready").await;
    assert_eq!(response.status(), 200, "{response}");
    response.json()["degraded"] == serde_json::json!(["queue"])
}

/// Waits until the gateway has connected to its queue.
pub(crate) async fn wait_for_queue(gateway: &Gateway) {
    eventually("the function is ready", async || gateway.is_ready().await).await;
    eventually("the queue is available", async || !is_queue_degraded(gateway).await).await;
}

/// Asserts that synchronous calls succeed and queued ones are refused.
async fn assert_serves_without_queue(gateway: &Gateway) {
    eventually("the queue is unavailable", async || is_queue_degraded(gateway).await).await;
    let response = gateway.send_async("echo", &[], "").await;
    assert_eq!((response.status(), response.header("retry-after")), (503, Some("1")), "{response}");
    assert_eq!(gateway.post("/function/echo", "x").await.status(), 200);
}

#[tokio::test]
async fn synchronous_calls_continue_while_nats_is_unavailable() {
    let (mut nats, provider) = (Nats::not_started(), replying_with(&[200], "done"));
    let gateway = on_jetstream(&nats, Gateway::builder()).provider(&provider).start().await;
    eventually("the function is ready", async || gateway.is_ready().await).await;
    for _ in 0..2 {
        assert_serves_without_queue(&gateway).await;
        nats.restart();
        eventually("the queue is available", async || !is_queue_degraded(&gateway).await).await;
        let id = gateway.enqueue("echo", &[], "").await;
        gateway.wait_for_state(&id, "succeeded").await;
        nats.kill();
    }
    assert_serves_without_queue(&gateway).await;
    nats.restart();
    let reconnected =
        |metrics: &Metrics| metrics.get("gateway_nats_reconnect_total", &[]) >= Some(1.0);
    gateway.wait_for_metric("the connection is counted as reestablished", reconnected).await;
}

#[tokio::test]
async fn a_server_without_jetstream_is_no_queue() {
    let directory = tempfile::TempDir::new().unwrap();
    let path = directory.path().join("nats.conf");
    let user = r#"{ user: a, password: b, permissions: { publish: { deny: "$JS.API.>" } } }"#;
    std::fs::write(&path, format!("authorization {{ users = [ {user} ] }}")).unwrap();
    let nats = Nats::start_with(&["-c", path.to_str().unwrap()]);
    let provider = replying_with(&[200], "done");
    let gateway = on_jetstream(&nats, Gateway::builder()).provider(&provider);
    let gateway = gateway.var("nats_user", "a").var("nats_password", "b").start().await;
    gateway.wait_for_log("Connected to the NATS server").await;
    eventually("the function is ready", async || gateway.is_ready().await).await;
    assert_serves_without_queue(&gateway).await;
}

#[tokio::test]
async fn a_call_that_fails_twice_is_executed_three_times_with_one_callback() {
    let (nats, provider) = (Nats::start(), replying_with(&[500, 500, 200], "done"));
    let hook = Provider::replying("thanks");
    let gateway = on_jetstream(&nats, Gateway::builder()).provider(&provider).start().await;
    wait_for_queue(&gateway).await;
    let callback = format!("X-Callback-Url: {}/function/hook", hook.url());
    let id = gateway.enqueue("echo", &[&callback], "").await;
    let call_status = gateway.wait_for_state(&id, "succeeded").await;
    assert_eq!(
        (&call_status["attempts"], &call_status["status"]),
        (&3.into(), &200.into()),
        "{call_status}"
    );
    assert_eq!((provider.call_count(), hook.call_count()), (3, 1));
}

#[tokio::test]
async fn a_call_longer_than_ack_wait_is_executed_once() {
    const ACK_WAIT: Duration = Duration::from_secs(1);
    let nats = Nats::start();
    let provider = fast_retry()
        .handler(async |mut call| {
            // The call takes three times `ack_wait`.
            tokio::time::sleep(ACK_WAIT * 3).await;
            call.respond(200, "done").await;
            Some(call.connection)
        })
        .start();
    let brief =
        |builder: Builder| on_jetstream(&nats, builder).provider(&provider).var("ack_wait", "1s");
    let gateway = brief(Gateway::builder()).var("with_worker", "false").start().await;
    wait_for_queue(&gateway).await;
    let (_one, _two) =
        (brief(Gateway::worker()).start().await, brief(Gateway::worker()).start().await);
    let id = gateway.enqueue("echo", &[], "").await;
    let call_status = gateway.wait_for_state(&id, "succeeded").await;
    assert_eq!((&call_status["attempts"], provider.call_count()), (&1.into(), 1), "{call_status}");
}

#[tokio::test]
async fn a_response_with_headers_that_nats_refuses_is_not_stored() {
    let nats = Nats::start();
    let answering = async |mut call: Invocation| {
        let long = "x".repeat(40_000);
        let head =
            format!("HTTP/1.1 200 OK\r\nX-A: {long}\r\nX-B: {long}\r\nContent-Length: 2\r\n\r\nok");
        call.connection.send(&head).await;
        Some(call.connection)
    };
    let provider = fast_retry().handler(answering).start();
    let gateway = on_jetstream(&nats, Gateway::builder()).provider(&provider).start().await;
    wait_for_queue(&gateway).await;
    // One call that may be batched, and one that may not.
    for headers in [&[][..], &["X-Call-Id: mine"]] {
        let id = gateway.enqueue("echo", headers, "").await;
        let call_status = gateway.wait_for_state(&id, "succeeded").await;
        assert_eq!(
            (&call_status["attempts"], &call_status["status"]),
            (&1.into(), &200.into()),
            "{call_status}"
        );
    }
    assert_eq!(provider.call_count(), 2);
}

#[tokio::test]
async fn a_call_without_its_body_is_dead_lettered_with_a_callback() {
    let (nats, provider) = (Nats::start(), replying_with(&[200], "done"));
    let hook = Provider::replying("thanks");
    let gateway = on_jetstream(&nats, Gateway::builder()).var("ack_wait", "1s");
    let gateway = gateway.provider(&provider).start().await;
    wait_for_queue(&gateway).await;
    let callback = format!("X-Callback-Url: {}/function/hook", hook.url());
    let body = "x".repeat(1_500_000);
    let id = gateway.enqueue("echo", &[&callback, "X-Delay-Seconds: 1"], &body).await;
    let bodies = stream(&nats, "gateway-faas-request-bodies").await;
    assert!(bodies.purge().await.unwrap().purged > 0);
    let call_status = gateway.wait_for_state(&id, "failed").await;
    assert_eq!(
        (&call_status["dead"], &call_status["reason"]),
        (&true.into(), &"its body is missing".into())
    );
    assert_eq!((provider.call_count(), hook.call_count()), (0, 1));
    let dead_lettered =
        |metrics: &Metrics| metrics.get("gateway_queue_dead_letters_total", &[]) == Some(1.0);
    gateway.wait_for_metric("the metric is updated", dead_lettered).await;
}
