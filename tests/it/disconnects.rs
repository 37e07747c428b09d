//! Callers who leave: the function is told at once, and the call is counted as left.

use crate::support::gateway::Gateway;
use crate::support::provider::Provider;
use crate::support::wire::get;

const LISTED: &str = r#"[{"name":"slow","namespace":"fn","replicas":1,"availableReplicas":1}]"#;

async fn start() -> (Provider, Gateway) {
    let provider = Provider::builder().lists(LISTED).start();
    let gateway = Gateway::before(&provider).await;
    gateway.metrics_show("it is listed", |m| m.text.contains("gateway_service_count{")).await;
    (provider, gateway)
}

async fn is_counted_as_left(gateway: &Gateway) {
    gateway.metrics_show("counted as left", |m| m.calls("slow.fn", "499") == 1).await;
    let metrics = gateway.metrics().await;
    assert_eq!(metrics.in_flight("slow.fn"), 0.0);
    assert_eq!(metrics.get("gateway_function_invocation_total", &[]), Some(1.0));
    assert_eq!(metrics.get("gateway_function_invocation_started", &[]), Some(1.0));
}

#[tokio::test]
async fn a_caller_who_leaves_before_the_answer_ends_the_call() {
    let (mut provider, gateway) = start().await;
    let mut caller = gateway.connect().await;
    caller.send(get("/function/slow")).await;
    let mut call = provider.call().await;
    gateway.metrics_show("in flight", |m| m.in_flight("slow.fn") == 1.0).await;
    drop(caller);
    call.wire.closed().await;
    is_counted_as_left(&gateway).await;
}

#[tokio::test]
async fn a_caller_who_leaves_inside_the_answer_ends_the_call() {
    let (mut provider, gateway) = start().await;
    let mut caller = gateway.connect().await;
    caller.send(get("/function/slow")).await;
    let mut call = provider.call().await;
    call.wire.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n").await;
    caller.until("half").await;
    drop(caller);
    call.wire.closed().await;
    is_counted_as_left(&gateway).await;
}

#[tokio::test]
async fn a_caller_who_is_reset_inside_the_answer_ends_the_call() {
    let (mut provider, gateway) = start().await;
    let mut caller = gateway.connect().await;
    caller.send(get("/function/slow")).await;
    let mut call = provider.call().await;
    call.wire.send("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf").await;
    caller.until("half").await;
    caller.reset();
    call.wire.closed().await;
    is_counted_as_left(&gateway).await;
}

#[tokio::test]
async fn a_function_never_takes_half_a_request_for_a_whole_one() {
    let (mut provider, gateway) = start().await;
    let mut caller = gateway.connect().await;
    caller
        .send("POST /function/slow HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n")
        .await;
    caller.send_chunk("first").await;
    let mut call = provider.call().await;
    call.wire.until("first\r\n").await;
    drop(caller);
    let rest = call.wire.closed().await;
    assert_eq!(rest, b"", "{}", String::from_utf8_lossy(&rest));
}

#[tokio::test]
async fn places_of_those_who_left_are_free_again() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::builder().provider(&provider).var("max_calls", "3").start().await;
    for _ in 0..10 {
        let mut callers = Vec::new();
        for _ in 0..3 {
            let mut caller = gateway.connect().await;
            caller.send(get("/function/slow")).await;
            provider.call().await;
            callers.push(caller);
        }
        drop(callers);
        // Answered 503 until the last one's place is free.
        crate::support::eventually("ready again", async || gateway.is_ready().await).await;
    }
}

#[tokio::test]
async fn a_caller_who_leaves_inside_the_request_ends_the_call() {
    let (mut provider, gateway) = start().await;
    let mut caller = gateway.connect().await;
    caller.send("POST /function/slow HTTP/1.1\r\nHost: g\r\nContent-Length: 10\r\n\r\nfirst").await;
    let mut call = provider.call().await;
    call.wire.until("first").await;
    drop(caller);
    call.wire.closed().await;
    is_counted_as_left(&gateway).await;
}

#[tokio::test]
async fn a_request_that_is_malformed_is_not_one_whose_caller_left() {
    let (mut provider, gateway) = start().await;
    let mut caller = gateway.connect().await;
    caller
        .send("POST /function/slow HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n")
        .await;
    caller.send_chunk("first").await;
    let mut call = provider.call().await;
    call.wire.until("first\r\n").await;
    assert_eq!(caller.ask("nonsense\r\n").await.status(), 400);
    gateway.metrics_show("counted as bad", |m| m.calls("slow.fn", "400") == 1).await;
}
