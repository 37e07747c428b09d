//! Clients that disconnect: the function is informed immediately, and the call is counted as such.

use crate::support::connection::get;
use crate::support::gateway::Gateway;
use crate::support::provider::Provider;

const LISTED: &str = r#"[{"name":"slow","namespace":"fn","replicas":1,"availableReplicas":1}]"#;

async fn start() -> (Provider, Gateway) {
    let provider = Provider::builder().listing(LISTED).start();
    let gateway = Gateway::in_front_of(&provider).await;
    gateway
        .wait_for_metric("the function is listed", |m| m.text.contains("gateway_service_count{"))
        .await;
    (provider, gateway)
}

async fn assert_counted_as_disconnect(gateway: &Gateway) {
    gateway
        .wait_for_metric("the call is counted as disconnected", |m| m.calls("slow.fn", "499") == 1)
        .await;
    let metrics = gateway.metrics().await;
    assert_eq!(metrics.in_flight("slow.fn"), 0.0);
    assert_eq!(metrics.get("gateway_function_invocation_total", &[]), Some(1.0));
    assert_eq!(metrics.get("gateway_function_invocation_started", &[]), Some(1.0));
}

#[tokio::test]
async fn a_disconnect_before_the_response_cancels_the_call() {
    let (mut provider, gateway) = start().await;
    let mut client = gateway.connect().await;
    client.send(get("/function/slow")).await;
    let mut call = provider.next_call().await;
    gateway.wait_for_metric("in flight", |m| m.in_flight("slow.fn") == 1.0).await;
    drop(client);
    call.connection.read_to_close().await;
    assert_counted_as_disconnect(&gateway).await;
}

#[tokio::test]
async fn a_disconnect_during_the_response_cancels_the_call() {
    let (mut provider, gateway) = start().await;
    let mut client = gateway.connect().await;
    client.send(get("/function/slow")).await;
    let mut call = provider.next_call().await;
    call.connection
        .send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
        .await;
    client.read_until("half").await;
    drop(client);
    call.connection.read_to_close().await;
    assert_counted_as_disconnect(&gateway).await;
}

#[tokio::test]
async fn a_reset_during_the_response_cancels_the_call() {
    let (mut provider, gateway) = start().await;
    let mut client = gateway.connect().await;
    client.send(get("/function/slow")).await;
    let mut call = provider.next_call().await;
    call.connection.send("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf").await;
    client.read_until("half").await;
    client.reset();
    call.connection.read_to_close().await;
    assert_counted_as_disconnect(&gateway).await;
}

#[tokio::test]
async fn a_function_can_tell_an_aborted_request_from_a_complete_one() {
    let (mut provider, gateway) = start().await;
    let mut client = gateway.connect().await;
    client
        .send("POST /function/slow HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n")
        .await;
    client.send_chunk("first").await;
    let mut call = provider.next_call().await;
    call.connection.read_until("first\r\n").await;
    drop(client);
    let rest = call.connection.read_to_close().await;
    assert_eq!(rest, b"", "{}", String::from_utf8_lossy(&rest));
}

#[tokio::test]
async fn permits_of_disconnected_clients_are_released() {
    let mut provider = Provider::manual();
    let gateway = Gateway::builder().provider(&provider).var("max_calls", "3").start().await;
    for _ in 0..10 {
        let mut clients = Vec::new();
        for _ in 0..3 {
            let mut client = gateway.connect().await;
            client.send(get("/function/slow")).await;
            provider.next_call().await;
            clients.push(client);
        }
        drop(clients);
        // The response is 503 until the last permit is released.
        crate::support::eventually("the gateway is ready again", async || gateway.is_ready().await)
            .await;
    }
}

#[tokio::test]
async fn a_disconnect_during_the_request_cancels_the_call() {
    let (mut provider, gateway) = start().await;
    let mut client = gateway.connect().await;
    client.send("POST /function/slow HTTP/1.1\r\nHost: g\r\nContent-Length: 10\r\n\r\nfirst").await;
    let mut call = provider.next_call().await;
    call.connection.read_until("first").await;
    drop(client);
    call.connection.read_to_close().await;
    assert_counted_as_disconnect(&gateway).await;
}

#[tokio::test]
async fn a_malformed_request_is_not_counted_as_a_disconnect() {
    let (mut provider, gateway) = start().await;
    let mut client = gateway.connect().await;
    client
        .send("POST /function/slow HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n")
        .await;
    client.send_chunk("first").await;
    let mut call = provider.next_call().await;
    call.connection.read_until("first\r\n").await;
    assert_eq!(client.exchange("nonsense\r\n").await.status(), 400);
    gateway
        .wait_for_metric("the request is counted as malformed", |m| m.calls("slow.fn", "400") == 1)
        .await;
}
