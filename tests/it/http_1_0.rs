//! HTTP/1.0 clients: no chunks, no upgrades, and no connection is kept if its close marks the end of a response.

use crate::support::connection::Connection;
use crate::support::gateway::Gateway;
use crate::support::provider::Provider;

#[tokio::test]
async fn a_response_of_unknown_length_closes_an_http_1_0_connection() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    for connection in ["Connection: keep-alive\r\n", "Connection: Keep-Alive, x\r\n", ""] {
        let mut client = gateway.connect().await;
        client.send(format!("GET /function/echo HTTP/1.0\r\n{connection}\r\n")).await;
        let mut call = provider.next_call().await;
        call.connection.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await;
        call.connection.send_chunk("all of it").await;
        call.connection.send("0\r\n\r\n").await;
        let head = client.read_head().await;
        assert!(head.start.starts_with("HTTP/1.0 200"), "{head:?}");
        let connection_headers: Vec<_> =
            head.headers.iter().filter(|(name, _)| name == "connection").collect();
        assert!(connection_headers.iter().all(|(_, value)| value == "close"), "{head:?}");
        assert_eq!(head.header("transfer-encoding"), None);
        assert_eq!(client.read_to_close().await, b"all of it");
    }
}

#[tokio::test]
async fn a_response_of_known_length_keeps_the_connection_on_request() {
    let provider = Provider::replying("hello");
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    for _ in 0..2 {
        let request = "GET /function/echo HTTP/1.0\r\nConnection: keep-alive\r\n\r\n";
        let response = client.exchange(request).await;
        assert_eq!((response.text(), response.header("connection")), ("hello", Some("keep-alive")));
    }
    let response = client.exchange("GET /function/echo HTTP/1.0\r\n\r\n").await;
    assert_eq!(response.text(), "hello");
    assert_eq!(client.read_to_close().await, b"");
}

#[tokio::test]
async fn an_upgrade_request_is_ignored() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    client
        .send("GET /function/chat HTTP/1.0\r\nConnection: Upgrade\r\nUpgrade: chat\r\n\r\n")
        .await;
    let mut call = provider.next_call().await;
    assert_eq!((call.head.header("upgrade"), call.head.header("connection")), (None, None));
    call.respond(200, "plain").await;
    assert_eq!(client.read_response().await.text(), "plain");
}

#[tokio::test]
async fn the_metrics_port_serves_http_1_0() {
    let provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = Connection::connect(gateway.metrics_address).await;
    let response = client.exchange("GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").await;
    assert_eq!((response.text(), response.header("connection")), ("OK", Some("keep-alive")));
}
