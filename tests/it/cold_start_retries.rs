//! Functions that are found not to be ready after a request was sent to them.

use crate::cold_start::{start_with_function_list, with_scale_from_zero};
use crate::support::connection::request;
use crate::support::eventually;
use crate::support::scalable_function::ScalableFunction;

#[tokio::test]
async fn a_replica_that_does_not_listen_yet_is_retried() {
    for (method, status, length) in
        [("PUT", 502, 0), ("POST", 503, 0), ("PUT", 502, 60_000), ("POST", 503, 60_000)]
    {
        let replicas = ScalableFunction::with_replicas(0, 0);
        replicas.with(|state| {
            (state.calls_to_refuse, state.refusal_status, state.unavailable_after_refusal) =
                (2, status, status == 503)
        });
        let provider = replicas.provider().start();
        let gateway = start_with_function_list(&provider).await;
        let body = "y".repeat(length);
        let response =
            gateway.connect().await.exchange(request(method, "/function/echo", &[], &body)).await;
        assert!(response.status() == 200 && response.text() == body, "{status}, {length}");
        let times = [(length, status), (length, status), (length, 200)];
        assert_eq!(replicas.with(|state| state.calls.clone()), times);
        assert_eq!(replicas.with(|state| state.scale_requests.clone()), [1]);
        gateway
            .wait_for_metric("the call is counted once", |m| m.calls("echo.fn", "200") == 1)
            .await;
    }
}

#[tokio::test]
async fn a_post_that_a_starting_function_may_have_received_is_not_sent_twice() {
    let replicas = ScalableFunction::with_replicas(0, 0);
    replicas.with(|state| (state.calls_to_refuse, state.refusal_status) = (1, 502));
    let provider = replicas.provider().start();
    let gateway = start_with_function_list(&provider).await;
    assert_eq!(gateway.post("/function/echo", "pay").await.status(), 502);
    assert_eq!(gateway.post("/function/echo", "pay").await.status(), 200);
    assert_eq!(replicas.with(|state| state.calls.clone()), [(3, 502), (3, 200)]);
}

#[tokio::test]
async fn retries_after_a_cold_start_are_limited() {
    let replicas = ScalableFunction::with_replicas(0, 0);
    replicas.with(|state| state.calls_to_refuse = usize::MAX);
    let provider = replicas.provider().start();
    // If retries could last for the whole cold-start timeout, the test would not end.
    let gateway = with_scale_from_zero(&provider).var("cold_start_timeout", "10m").start().await;
    let response = gateway.get("/function/echo").await;
    assert_eq!(response.status(), 503, "{response}");
    assert_eq!(response.header("x-openfaas-internal"), Some("proxy"));
    assert_eq!(provider.call_count(), 3);
}

#[tokio::test]
async fn a_long_body_is_not_sent_twice() {
    let replicas = ScalableFunction::with_replicas(0, 0);
    replicas.with(|state| state.calls_to_refuse = 1);
    let provider = replicas.provider().start();
    let gateway = start_with_function_list(&provider).await;
    let response = gateway.post("/function/echo", &"z".repeat(200_000)).await;
    assert_eq!(response.status(), 503, "{response}");
    assert_eq!(replicas.with(|state| state.calls.clone()), [(200_000, 503)]);
    let response = gateway.post("/function/echo", &"z".repeat(200_000)).await;
    assert_eq!((response.status(), response.body.len()), (200, 200_000));
}

#[tokio::test]
async fn a_bad_gateway_from_a_ready_function_is_passed_on() {
    let replicas = ScalableFunction::with_replicas(1, 1);
    replicas.with(|state| (state.calls_to_refuse, state.refusal_status) = (1, 502));
    let provider = replicas.provider().start();
    let gateway = start_with_function_list(&provider).await;
    assert_eq!(gateway.get("/function/echo").await.status(), 502);
    assert_eq!(gateway.get("/function/echo").await.status(), 200);
    assert_eq!(provider.call_count(), 2);
}

#[tokio::test]
async fn an_overloaded_provider_does_not_count_as_a_cold_start() {
    let replicas = ScalableFunction::with_replicas(1, 1);
    replicas.with(|state| state.calls_to_refuse = 1);
    let provider = replicas.provider().start();
    let gateway = start_with_function_list(&provider).await;
    assert_eq!(gateway.get("/function/echo").await.status(), 503);
    assert_eq!(replicas.with(|state| (state.calls.len(), state.status_queries)), (1, 1));
    assert_eq!(gateway.get("/function/echo").await.status(), 200);
}

#[tokio::test]
async fn a_call_that_finds_its_function_at_zero_scales_it_up() {
    let replicas = ScalableFunction::with_replicas(1, 1);
    let provider = replicas.provider().start();
    let gateway = start_with_function_list(&provider).await;
    assert_eq!(gateway.get("/function/echo").await.status(), 200);
    replicas.with(|state| (state.wanted, state.available) = (0, 0));
    let response = gateway.post("/function/echo", "hello").await;
    assert_eq!((response.status(), response.text()), (200, "hello"));
    assert_eq!(replicas.with(|state| state.scale_requests.clone()), [1]);
    assert_eq!(replicas.with(|state| state.calls.clone()), [(0, 200), (5, 503), (5, 200)]);
}

#[tokio::test]
async fn a_request_that_cannot_be_replayed_queries_the_status_after_a_start() {
    let replicas = ScalableFunction::with_replicas(0, 0);
    let provider = replicas.provider().start();
    let gateway = start_with_function_list(&provider).await;
    assert_eq!(gateway.get("/function/echo").await.status(), 200);
    // The function scales to zero immediately, and the poll cannot know it.
    replicas.with(|state| (state.wanted, state.available) = (0, 0));
    let long = "z".repeat(200_000);
    let before = replicas.with(|state| state.status_queries);
    assert_eq!(gateway.post("/function/echo", &long).await.status(), 503);
    eventually("the function is queried", async || {
        replicas.with(|state| state.status_queries > before)
    })
    .await;
    assert_eq!(gateway.post("/function/echo", &long).await.status(), 200);
    assert_eq!(replicas.with(|state| state.scale_requests.clone()), [1, 1]);
}
