//! Functions that are not ready: requests scale them up, wait, and are executed as usual.

use std::time::{Duration, Instant};

use crate::support::connection::{Connection, get, post, request};
use crate::support::gateway::{Builder, Gateway};
use crate::support::provider::Provider;
use crate::support::queue::with_embedded_queue;
use crate::support::scalable_function::ScalableFunction;
use crate::support::{eventually, within};

pub(crate) fn with_scale_from_zero(provider: &Provider) -> Builder {
    Gateway::builder().provider(provider).var("scale_from_zero", "true")
}

/// Starts a gateway and waits until it has the function list.
pub(crate) async fn start_with_function_list(provider: &Provider) -> Gateway {
    let gateway = with_scale_from_zero(provider).start().await;
    gateway
        .wait_for_metric("the function is listed", |m| m.text.contains("gateway_service_count{"))
        .await;
    gateway
}

#[tokio::test]
async fn a_thousand_requests_to_a_function_at_zero_need_one_scale_request() {
    gateway_http::server::raise_file_limit();
    let replicas = ScalableFunction::with_replicas(0, 0);
    replicas.with(|state| state.queries_until_ready = 5);
    let provider = replicas.provider().start();
    let gateway = start_with_function_list(&provider).await;
    let mut clients = tokio::task::JoinSet::new();
    for number in 0..1000 {
        let mut client = gateway.connect().await;
        clients.spawn(async move {
            let response =
                client.exchange(post("/function/echo", &format!("caller {number}"))).await;
            (number, response)
        });
    }
    while let Some(answered) = within("all requests are answered", clients.join_next()).await {
        let (number, response) = answered.unwrap();
        assert_eq!((response.status(), response.text()), (200, &*format!("caller {number}")));
    }
    assert_eq!(replicas.with(|state| state.scale_requests.clone()), [1]);
    assert_eq!((provider.call_count(), replicas.with(|state| state.calls.len())), (1000, 1000));
    // One query per poll until the function is ready, and few for later requests; not one per client.
    let status_queries = replicas.with(|state| state.status_queries);
    assert!(status_queries < 50, "{status_queries}");
    gateway.wait_for_metric("the calls are counted", |m| m.calls("echo.fn", "200") == 1000).await;
}

#[tokio::test]
async fn a_ready_function_needs_no_status_query() {
    let replicas = ScalableFunction::with_replicas(1, 1);
    let provider = replicas.provider().start();
    let gateway = start_with_function_list(&provider).await;
    let mut client = gateway.connect().await;
    for _ in 0..500 {
        assert_eq!(client.get("/function/echo").await.status(), 200);
    }
    assert_eq!((replicas.with(|state| state.status_queries), provider.call_count()), (0, 500));
    assert!(replicas.with(|state| state.scale_requests.is_empty()));
}

#[tokio::test]
async fn without_scale_from_zero_the_provider_is_not_queried() {
    let replicas = ScalableFunction::with_replicas(0, 0);
    let provider = replicas.provider().start();
    let gateway = Gateway::in_front_of(&provider).await;
    let response = gateway.get("/function/echo").await;
    assert_eq!(response.status(), 503);
    assert_eq!(response.header("x-openfaas-internal"), Some("proxy"));
    assert_eq!(
        replicas.with(|state| (
            state.status_queries,
            state.calls.len(),
            state.scale_requests.len()
        )),
        (0, 1, 0)
    );
}

#[tokio::test]
async fn an_unknown_function_is_not_found() {
    let provider = ScalableFunction::with_replicas(1, 1).provider().start();
    let gateway = with_scale_from_zero(&provider).start().await;
    let response = gateway.get("/function/made-up").await;
    assert_eq!(response.status(), 404, "{response}");
    assert!(response.text().contains("made-up.fn not found"), "{response}");
    assert_eq!(provider.call_count(), 0);
    gateway
        .wait_for_metric("the unknown function is counted", |m| m.calls("unknown", "404") == 1)
        .await;
}

#[tokio::test]
async fn a_provider_that_fails_during_a_cold_start_is_reported_and_used_again_later() {
    let replicas = ScalableFunction::with_replicas(0, 0);
    replicas.with(|state| state.queries_until_ready = usize::MAX);
    let provider = replicas.provider().start();
    let address = provider.address;
    let gateway = start_with_function_list(&provider).await;
    let mut client = gateway.connect().await;
    client.send(get("/function/echo")).await;
    eventually("the function is scaled", async || {
        replicas.with(|state| state.scale_requests == [1])
    })
    .await;
    drop(provider);
    let response = client.read_response().await;
    assert_eq!(response.status(), 503, "{response}");
    assert!(response.text().contains("provider"), "{response}");
    assert!(response.text().contains("connection refused"), "{response}");
    assert!(!response.text().contains("127.0.0.1"), "{response}");
    assert!(response.header("retry-after").is_some());

    replicas.with(|state| state.queries_until_ready = 0);
    let provider = replicas.provider().listen_on(address).start();
    let response = client.exchange(post("/function/echo", "again")).await;
    assert_eq!((response.status(), response.text()), (200, "again"));
    assert_eq!((provider.call_count(), replicas.with(|state| state.scale_requests.len())), (1, 1));
}

#[tokio::test]
async fn a_function_that_is_not_ready_in_time_is_unavailable() {
    let replicas = ScalableFunction::with_replicas(1, 0);
    replicas.with(|state| state.queries_until_ready = usize::MAX);
    let provider = replicas.provider().start();
    // These timeouts would expire during the wait if they did not start after it.
    let gateway = with_scale_from_zero(&provider)
        .var("cold_start_timeout", "2s")
        .var("upstream_timeout", "100ms")
        .var("read_timeout", "300ms")
        .start()
        .await;
    let mut client = gateway.connect().await;
    for request in [get("/function/echo"), post("/function/echo", "hello")] {
        let response = client.exchange(request).await;
        assert_eq!(response.status(), 503, "{response}");
        assert!(response.text().contains("no replica that can be called"), "{response}");
        assert!(response.text().contains(response.header("x-call-id").unwrap()), "{response}");
        assert!(response.header("retry-after").is_some());
    }
    assert_eq!(provider.call_count(), 0);
    replicas.with(|state| state.queries_until_ready = 8);
    let response = client.exchange(post("/function/echo", "hello")).await;
    assert_eq!((response.status(), response.text()), (200, "hello"));
}

/// Returns whether `client` receives a response about as soon as others do. A request that waits for a replica does
/// not.
async fn is_answered_soon(gateway: &Gateway, client: &Connection) -> bool {
    let mut other = gateway.connect().await;
    let begun = Instant::now();
    for _ in 0..10 {
        assert_eq!(other.get("/_/healthz").await.status(), 200);
    }
    // On a busy machine all responses are late.
    let soon = begun.elapsed() + Duration::from_millis(300);
    tokio::time::timeout(soon, client.wait_readable()).await.is_ok()
}

#[tokio::test]
async fn a_full_cold_start_queue_refuses_requests_until_a_client_disconnects() {
    let body = "x".repeat(10_000);
    let chunked =
        "POST /function/echo HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n";
    for request in [get("/function/echo"), post("/function/echo", &body), chunked.to_owned()] {
        let replicas = ScalableFunction::with_replicas(1, 0);
        replicas.with(|state| state.queries_until_ready = usize::MAX);
        let provider = replicas.provider().start();
        let gateway =
            with_scale_from_zero(&provider).var("cold_start_queue_limit", "1").start().await;
        let mut first = gateway.connect().await;
        first.send(&request).await;
        eventually("the first waits", async || replicas.with(|state| state.status_queries > 0))
            .await;
        let response = gateway.get("/function/echo").await;
        assert_eq!(response.status(), 503, "{response}");
        assert!(response.text().contains("cold_start_queue_limit"), "{response}");
        assert!(response.header("retry-after").is_some());
        drop(first);
        let mut second = gateway.connect().await;
        eventually("the permit is released", async || {
            second.send(get("/function/echo")).await;
            let waits = !is_answered_soon(&gateway, &second).await;
            if !waits {
                second.read_response().await;
            }
            waits
        })
        .await;
        replicas.with(|state| state.queries_until_ready = 0);
        assert_eq!(second.read_response().await.status(), 200);
        assert_eq!(provider.call_count(), 1);
    }
}

#[tokio::test]
async fn the_provider_poll_notices_a_function_at_zero() {
    let replicas = ScalableFunction::with_replicas(1, 1);
    let provider = replicas.provider().start();
    let gateway = start_with_function_list(&provider).await;
    replicas.with(|state| (state.wanted, state.available) = (0, 0));
    let count = |m: &crate::support::metrics::Metrics| {
        m.get("gateway_service_count", &[("function_name", "echo.fn")])
    };
    gateway.wait_for_metric("the change is noticed", |m| count(m) == Some(0.0)).await;
    // The body is too large to be replayed, so it must not be sent before the function is ready.
    let response = gateway.post("/function/echo", &"z".repeat(200_000)).await;
    assert_eq!((response.status(), response.body.len()), (200, 200_000));
    assert_eq!(replicas.with(|state| (state.calls.len(), state.scale_requests.len())), (1, 1));
}

#[tokio::test]
async fn scaling_through_the_gateway_invalidates_readiness() {
    let replicas = ScalableFunction::with_replicas(1, 1);
    let provider = replicas.provider().start();
    let gateway = start_with_function_list(&provider).await;
    let long = "z".repeat(200_000);
    for round in 1..=3 {
        let scale = r#"{"serviceName":"echo","replicas":0}"#;
        assert_eq!(gateway.post("/system/scale-function/echo", scale).await.status(), 202);
        assert_eq!(gateway.post("/function/echo", &long).await.status(), 200);
        assert_eq!(
            replicas.with(|state| state.calls.len()),
            round,
            "it was called while it was at zero"
        );
    }
    assert_eq!(replicas.with(|state| state.scale_requests.clone()), [0, 1, 0, 1, 0, 1]);
}

#[tokio::test]
async fn deleting_through_the_gateway_takes_effect_immediately() {
    let replicas = ScalableFunction::with_replicas(1, 1);
    let provider = replicas.provider().start();
    let gateway = start_with_function_list(&provider).await;
    assert_eq!(gateway.get("/function/echo").await.status(), 200);
    let named = r#"{"functionName":"echo"}"#;
    let delete = request("DELETE", "/system/functions", &[], named);
    assert_eq!(gateway.connect().await.exchange(delete).await.status(), 202);
    assert_eq!(gateway.get("/function/echo").await.status(), 404);
    assert_eq!(provider.call_count(), 1);
}

#[tokio::test]
async fn a_function_missing_from_the_list_is_queried_and_called() {
    let replicas = ScalableFunction::with_replicas(1, 1);
    replicas.with(|state| state.unlisted = true);
    let provider = replicas.provider().start();
    let gateway = with_scale_from_zero(&provider).start().await;
    let mut client = gateway.connect().await;
    for _ in 0..100 {
        assert_eq!(client.get("/function/echo").await.status(), 200);
    }
    // One query, and one after each list without the function.
    let status_queries = replicas.with(|state| state.status_queries);
    assert!(status_queries < 10, "{status_queries}");
    assert_eq!(provider.call_count(), 100);
    gateway.wait_for_metric("the calls are counted", |m| m.calls("echo.fn", "200") == 100).await;
}

#[tokio::test]
async fn a_request_waiting_for_a_cold_start_counts_as_in_flight() {
    let replicas = ScalableFunction::with_replicas(0, 0);
    replicas.with(|state| (state.unlisted, state.queries_until_ready) = (true, usize::MAX));
    let provider = replicas.provider().start();
    let gateway = with_scale_from_zero(&provider).start().await;
    let mut client = gateway.connect().await;
    client.send(get("/function/echo")).await;
    gateway.wait_for_metric("the call is in flight", |m| m.in_flight("echo.fn") == 1.0).await;
    assert_eq!(provider.call_count(), 0);
    replicas.with(|state| state.queries_until_ready = 0);
    assert_eq!(client.read_response().await.status(), 200);
    gateway.wait_for_metric("the call has ended", |m| m.in_flight("echo.fn") == 0.0).await;
}

#[tokio::test]
async fn a_queued_call_waits_for_its_function_and_is_executed_once() {
    let state = tempfile::tempdir().unwrap();
    let replicas = ScalableFunction::with_replicas(0, 0);
    replicas.with(|state| {
        (state.queries_until_ready, state.calls_to_refuse, state.unavailable_after_refusal) =
            (5, 2, true)
    });
    let provider = replicas.provider().start();
    let gateway =
        with_embedded_queue(&provider, state.path()).var("scale_from_zero", "true").start().await;
    let id = gateway.enqueue("echo", &[], "hello").await;
    let call_status = gateway.wait_for_state(&id, "succeeded").await;
    assert_eq!((&call_status["attempts"], &call_status["status"]), (&1.into(), &200.into()));
    assert_eq!(gateway.result(&id).await.text(), "hello");
    assert_eq!(replicas.with(|state| state.scale_requests.clone()), [1]);
    assert_eq!(replicas.with(|state| state.calls.clone()), [(5, 503), (5, 503), (5, 200)]);
}

#[tokio::test]
async fn requests_waiting_for_a_cold_start_finish_during_shutdown() {
    let replicas = ScalableFunction::with_replicas(1, 0);
    replicas.with(|state| state.queries_until_ready = usize::MAX);
    let provider = replicas.provider().start();
    let gateway = with_scale_from_zero(&provider).var("shutdown_grace", "20s").start().await;
    let mut client = gateway.connect().await;
    client.send(get("/function/echo")).await;
    eventually("the call waits", async || replicas.with(|state| state.status_queries > 0)).await;
    let stopping = tokio::spawn(gateway.terminate());
    // A shutdown lets calls in flight finish, including those that wait.
    tokio::time::sleep(Duration::from_millis(300)).await;
    replicas.with(|state| state.queries_until_ready = 0);
    assert_eq!(client.read_response().await.status(), 200);
    assert!(within("the process exits", stopping).await.unwrap().success());
}
