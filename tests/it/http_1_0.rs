//! Clients of HTTP/1.0: no chunks, no change of protocols, no connection kept where the end of a response is its close.

use crate::support::gateway::Gateway;
use crate::support::provider::Provider;
use crate::support::wire::Wire;

#[tokio::test]
async fn a_response_of_unknown_length_closes_the_connection_and_says_so() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    for connection in ["Connection: keep-alive\r\n", "Connection: Keep-Alive, x\r\n", ""] {
        let mut client = gateway.connect().await;
        client.send(format!("GET /function/echo HTTP/1.0\r\n{connection}\r\n")).await;
        let mut call = provider.call().await;
        call.wire.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await;
        call.wire.send_chunk("all of it").await;
        call.wire.send("0\r\n\r\n").await;
        let head = client.head().await;
        assert!(head.start.starts_with("HTTP/1.0 200"), "{head:?}");
        let said: Vec<_> = head.headers.iter().filter(|(name, _)| name == "connection").collect();
        assert!(said.iter().all(|(_, value)| value == "close"), "{head:?}");
        assert_eq!(head.header("transfer-encoding"), None);
        assert_eq!(client.closed().await, b"all of it");
    }
}

#[tokio::test]
async fn a_response_of_known_length_keeps_the_connection_if_that_is_asked_for() {
    let provider = Provider::saying("hello");
    let gateway = Gateway::before(&provider).await;
    let mut client = gateway.connect().await;
    for _ in 0..2 {
        let request = "GET /function/echo HTTP/1.0\r\nConnection: keep-alive\r\n\r\n";
        let answer = client.ask(request).await;
        assert_eq!((answer.text(), answer.header("connection")), ("hello", Some("keep-alive")));
    }
    let answer = client.ask("GET /function/echo HTTP/1.0\r\n\r\n").await;
    assert_eq!(answer.text(), "hello");
    assert_eq!(client.closed().await, b"");
}

#[tokio::test]
async fn a_wish_to_change_protocols_is_ignored() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut client = gateway.connect().await;
    client
        .send("GET /function/chat HTTP/1.0\r\nConnection: Upgrade\r\nUpgrade: chat\r\n\r\n")
        .await;
    let mut call = provider.call().await;
    assert_eq!((call.head.header("upgrade"), call.head.header("connection")), (None, None));
    call.answer(200, "plain").await;
    assert_eq!(client.answer().await.text(), "plain");
}

#[tokio::test]
async fn the_metrics_port_answers_it_too() {
    let provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut client = Wire::connect(gateway.metrics_address).await;
    let answer = client.ask("GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n").await;
    assert_eq!((answer.text(), answer.header("connection")), ("OK", Some("keep-alive")));
}
