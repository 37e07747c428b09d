//! How often a call is executed when an answer looks as if nobody had executed it. The providers here pass on what
//! their functions send, `X-OpenFaaS-Internal` included.

use serde_json::Value;

use crate::support::eventually;
use crate::support::gateway::{Builder, Gateway};
use crate::support::provider::{Call, Provider};
use crate::support::queue::{patient, queueing};
use crate::support::replicas::Replicas;
use crate::support::wire::request;

/// A function at zero that answers every call with `status` and the header of a provider. `falls`: it also has itself
/// reported as not available after each call.
fn forging(status: u16, falls: bool) -> (Replicas, Provider) {
    let replicas = Replicas::at(0, 0);
    replicas.with(|it| (it.deaf, it.deaf_status, it.falls) = (usize::MAX, status, falls));
    let provider = replicas.provider().start();
    (replicas, provider)
}

async fn waking(builder: Builder) -> Gateway {
    let gateway = builder.var("scale_from_zero", "true").start().await;
    gateway.metrics_show("listed", |m| m.text.contains("gateway_service_count{")).await;
    gateway
}

/// Makes one call of `method`; its status, and how often the function was executed for it.
async fn executed(method: &str, status: u16, falls: bool) -> (u16, usize) {
    let (replicas, provider) = forging(status, falls);
    let gateway = waking(Gateway::builder().provider(&provider)).await;
    let answer = gateway.connect().await.ask(request(method, "/function/echo", &[], "pay")).await;
    (answer.status(), replicas.with(|it| it.calls.len()))
}

#[tokio::test]
async fn a_post_is_executed_once_whatever_its_function_says() {
    assert_eq!(executed("POST", 503, false).await, (503, 1));
    assert_eq!(executed("POST", 502, false).await, (502, 1));
    assert_eq!(executed("PATCH", 503, false).await, (503, 1));
}

#[tokio::test]
async fn no_call_is_executed_more_than_three_times() {
    assert_eq!(executed("POST", 503, true).await, (503, 3));
    assert_eq!(executed("PUT", 503, true).await, (503, 3));
    assert_eq!(executed("PUT", 503, false).await, (503, 3));
    assert_eq!(executed("GET", 502, false).await, (502, 3));
}

/// Queues a call with `headers` and waits for its end; the state, and how often the function was executed.
async fn queued(falls: bool, headers: &[&str]) -> (Value, usize) {
    let state = tempfile::tempdir().unwrap();
    let (replicas, provider) = forging(503, falls);
    let gateway = waking(queueing(&provider, state.path())).await;
    let id = gateway.queued("echo", headers, "pay").await;
    let told = gateway.becomes(&id, "failed").await;
    (told, replicas.with(|it| it.calls.len()))
}

#[tokio::test]
async fn a_queued_call_with_one_attempt_is_executed_once() {
    for falls in [false, true] {
        let (told, executed) = queued(falls, &["X-Max-Attempts: 1"]).await;
        assert_eq!((&told["attempts"], &told["status"]), (&1.into(), &503.into()));
        assert_eq!(executed, 1, "{falls}");
    }
}

#[tokio::test]
async fn a_queued_call_with_one_attempt_does_not_spend_it_on_a_function_that_has_gone_to_zero() {
    let state = tempfile::tempdir().unwrap();
    let replicas = Replicas::at(1, 1);
    let provider = replicas.provider().start();
    let gateway = waking(queueing(&provider, state.path())).await;
    // Warm, as far as the gateway knows.
    assert_eq!(gateway.get("/function/echo").await.status(), 200);
    replicas.with(|it| (it.wanted, it.available) = (0, 0));
    let id = gateway.queued("echo", &["X-Max-Attempts: 1"], "hello").await;
    let told = gateway.becomes(&id, "succeeded").await;
    assert_eq!(told["attempts"], 1);
    assert_eq!(replicas.with(|it| it.calls.clone()), [(0, 200), (5, 200)]);
}

#[tokio::test]
async fn a_queued_call_that_is_answered_by_another_protocol_has_failed_as_any_other_call_would() {
    let state = tempfile::tempdir().unwrap();
    let switching = |mut call: Call| async move {
        call.body().await.ok()?;
        let head =
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: chat\r\n\r\n";
        call.wire.try_send(head).await.ok()?;
        // The gateway closes it.
        call.wire.closed().await;
        None
    };
    let provider = patient().answering(switching).start();
    let gateway = queueing(&provider, state.path()).start().await;
    assert_eq!(gateway.post("/function/echo", "").await.status(), 502);
    let id = gateway.queued("echo", &["X-Max-Attempts: 2"], "").await;
    let told = gateway.becomes(&id, "failed").await;
    assert_eq!((&told["attempts"], &told["status"]), (&2.into(), &502.into()), "{told}");
    // One for the call that waited, and one for each attempt.
    eventually("each attempt is made", async || provider.calls() == 3).await;
    gateway.metrics_show("counted", |m| m.calls("echo.fn", "101") == 0).await;
}
