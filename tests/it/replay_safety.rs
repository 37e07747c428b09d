//! How often a call is executed when a response looks as if the function had not received it. The providers here
//! forward the headers of functions, including `X-OpenFaaS-Internal`.

use serde_json::Value;

use crate::support::connection::request;
use crate::support::eventually;
use crate::support::gateway::{Builder, Gateway};
use crate::support::provider::{Invocation, Provider};
use crate::support::queue::{fast_retry, with_embedded_queue};
use crate::support::scalable_function::ScalableFunction;

/// A function at zero that responds to every call with `status` and the header of a provider. With
/// `unavailable_after_refusal`, it is also reported as unavailable after each call.
fn refusing_function(status: u16, unavailable_after_refusal: bool) -> (ScalableFunction, Provider) {
    let replicas = ScalableFunction::with_replicas(0, 0);
    replicas.with(|state| {
        (state.calls_to_refuse, state.refusal_status, state.unavailable_after_refusal) =
            (usize::MAX, status, unavailable_after_refusal)
    });
    let provider = replicas.provider().start();
    (replicas, provider)
}

async fn start_with_scale_from_zero(builder: Builder) -> Gateway {
    let gateway = builder.var("scale_from_zero", "true").start().await;
    gateway
        .wait_for_metric("the function is listed", |m| m.text.contains("gateway_service_count{"))
        .await;
    gateway
}

/// Sends one call with `method`. Returns its status, and the number of executions.
async fn executed(method: &str, status: u16, unavailable_after_refusal: bool) -> (u16, usize) {
    let (replicas, provider) = refusing_function(status, unavailable_after_refusal);
    let gateway = start_with_scale_from_zero(Gateway::builder().provider(&provider)).await;
    let response =
        gateway.connect().await.exchange(request(method, "/function/echo", &[], "pay")).await;
    (response.status(), replicas.with(|state| state.calls.len()))
}

#[tokio::test]
async fn a_post_is_executed_once_with_any_response() {
    assert_eq!(executed("POST", 503, false).await, (503, 1));
    assert_eq!(executed("POST", 502, false).await, (502, 1));
    assert_eq!(executed("PATCH", 503, false).await, (503, 1));
}

#[tokio::test]
async fn a_request_is_executed_three_times_at_most() {
    assert_eq!(executed("POST", 503, true).await, (503, 3));
    assert_eq!(executed("PUT", 503, true).await, (503, 3));
    assert_eq!(executed("PUT", 503, false).await, (503, 3));
    assert_eq!(executed("GET", 502, false).await, (502, 3));
}

/// Enqueues a call with `headers` and waits for its end. Returns its state, and the number of executions.
async fn executed_from_queue(unavailable_after_refusal: bool, headers: &[&str]) -> (Value, usize) {
    let state = tempfile::tempdir().unwrap();
    let (replicas, provider) = refusing_function(503, unavailable_after_refusal);
    let gateway = start_with_scale_from_zero(with_embedded_queue(&provider, state.path())).await;
    let id = gateway.enqueue("echo", headers, "pay").await;
    let call_status = gateway.wait_for_state(&id, "failed").await;
    (call_status, replicas.with(|state| state.calls.len()))
}

#[tokio::test]
async fn a_queued_call_with_one_attempt_is_executed_once() {
    for unavailable_after_refusal in [false, true] {
        let (call_status, executed) =
            executed_from_queue(unavailable_after_refusal, &["X-Max-Attempts: 1"]).await;
        assert_eq!((&call_status["attempts"], &call_status["status"]), (&1.into(), &503.into()));
        assert_eq!(executed, 1, "{unavailable_after_refusal}");
    }
}

#[tokio::test]
async fn a_single_attempt_is_not_spent_on_a_function_at_zero() {
    let state = tempfile::tempdir().unwrap();
    let replicas = ScalableFunction::with_replicas(1, 1);
    let provider = replicas.provider().start();
    let gateway = start_with_scale_from_zero(with_embedded_queue(&provider, state.path())).await;
    // The gateway considers the function ready.
    assert_eq!(gateway.get("/function/echo").await.status(), 200);
    replicas.with(|state| (state.wanted, state.available) = (0, 0));
    let id = gateway.enqueue("echo", &["X-Max-Attempts: 1"], "hello").await;
    let call_status = gateway.wait_for_state(&id, "succeeded").await;
    assert_eq!(call_status["attempts"], 1);
    assert_eq!(replicas.with(|state| state.calls.clone()), [(0, 200), (5, 200)]);
}

#[tokio::test]
async fn a_queued_call_answered_with_a_protocol_switch_fails() {
    let state = tempfile::tempdir().unwrap();
    let switching = |mut call: Invocation| async move {
        call.read_body().await.ok()?;
        let head =
            "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: chat\r\n\r\n";
        call.connection.try_send(head).await.ok()?;
        // The gateway closes the connection.
        call.connection.read_to_close().await;
        None
    };
    let provider = fast_retry().handler(switching).start();
    let gateway = with_embedded_queue(&provider, state.path()).start().await;
    assert_eq!(gateway.post("/function/echo", "").await.status(), 502);
    let id = gateway.enqueue("echo", &["X-Max-Attempts: 2"], "").await;
    let call_status = gateway.wait_for_state(&id, "failed").await;
    assert_eq!(
        (&call_status["attempts"], &call_status["status"]),
        (&2.into(), &502.into()),
        "{call_status}"
    );
    // One for the waiting call, and one for each attempt.
    eventually("each attempt is executed", async || provider.call_count() == 3).await;
    gateway.wait_for_metric("the calls are counted", |m| m.calls("echo.fn", "101") == 0).await;
}
