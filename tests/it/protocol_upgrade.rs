//! Protocol upgrades, such as WebSocket: only those that both sides agree on.

use crate::support::connection::{Connection, get};
use crate::support::gateway::Gateway;
use crate::support::provider::{Invocation, Provider};

const ASK: &str = "GET /function/chat HTTP/1.1\r\nHost: g\r\nConnection: keep-alive, Upgrade\r\nUpgrade: chat\r\n\r\n";
const AGREE: &str =
    "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: chat\r\n\r\n";
const LISTED: &str = r#"[{"name":"chat","namespace":"fn","replicas":1,"availableReplicas":1}]"#;

/// Opens a tunnel. Returns its client's and its function's end.
async fn open(gateway: &Gateway, provider: &mut Provider) -> (Connection, Invocation) {
    let mut client = gateway.connect().await;
    client.send(ASK).await;
    let mut call = provider.next_call().await;
    assert_eq!(call.head.header("upgrade"), Some("chat"));
    assert_eq!(call.head.header("connection").map(str::to_ascii_lowercase), Some("upgrade".into()));
    // Bytes after the head belong to the new protocol.
    call.connection.send(format!("{AGREE}welcome")).await;
    let head = client.read_head().await;
    assert_eq!((head.status(), head.header("upgrade")), (101, Some("chat")));
    assert!(head.header("x-call-id").is_some());
    client.read_until("welcome").await;
    (client, call)
}

#[tokio::test]
async fn bytes_pass_in_both_directions_after_an_upgrade() {
    let mut provider = Provider::builder().listing(LISTED).start();
    let gateway = Gateway::in_front_of(&provider).await;
    gateway
        .wait_for_metric("the function is listed", |m| m.text.contains("gateway_service_count{"))
        .await;
    let (mut client, mut call) = open(&gateway, &mut provider).await;
    for turn in 0..5 {
        client.send(format!("ask {turn};")).await;
        call.connection.read_until(&format!("ask {turn};")).await;
        call.connection.send(format!("say {turn};")).await;
        client.read_until(&format!("say {turn};")).await;
    }
    assert_eq!(gateway.metrics().await.in_flight("chat.fn"), 1.0);
    drop(call);
    client.read_to_close().await;
    drop(client);
    gateway.wait_for_metric("the call has finished", |m| m.in_flight("chat.fn") == 0.0).await;
    assert_eq!(gateway.metrics().await.calls("chat.fn", "101"), 1);
}

#[tokio::test]
async fn bytes_that_look_like_http_pass_through_a_tunnel_unchanged() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let (mut client, mut call) = open(&gateway, &mut provider).await;
    // More lines than most heads have, and a response in one piece.
    let lines = "GET / HTTP/1.1\r\n".repeat(1000);
    for turn in 0..3 {
        client.send(format!("{lines}ask {turn};")).await;
        for _ in 0..1000 {
            call.connection.read_until("GET / HTTP/1.1\r\n").await;
        }
        call.connection.read_until(&format!("ask {turn};")).await;
        call.connection.send(format!("HTTP/1.1 400 say {turn};")).await;
        client.read_until(&format!("HTTP/1.1 400 say {turn};")).await;
    }
}

#[tokio::test]
async fn a_tunnel_ends_when_the_client_disconnects() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let (client, mut call) = open(&gateway, &mut provider).await;
    drop(client);
    call.connection.read_to_close().await;
}

#[tokio::test]
async fn an_idle_tunnel_times_out() {
    let mut provider = Provider::manual();
    let gateway =
        Gateway::builder().provider(&provider).var("upstream_timeout", "500ms").start().await;
    let (mut client, mut call) = open(&gateway, &mut provider).await;
    client.read_to_close().await;
    call.connection.read_to_close().await;
}

#[tokio::test]
async fn a_half_closed_tunnel_still_delivers() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let (mut client, mut call) = open(&gateway, &mut provider).await;
    client.send("last words").await;
    client.shutdown_write().await;
    assert_eq!(call.connection.read_to_close().await, b"last words");
    call.connection.send("farewell").await;
    drop(call);
    assert_eq!(client.read_to_close().await, b"farewell");
}

#[tokio::test]
async fn an_upgrade_needs_a_request_for_it() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    client.send(get("/function/chat")).await;
    provider.next_call().await.connection.send(AGREE).await;
    let response = client.read_response().await;
    assert_eq!(response.status(), 502, "{response}");
}

#[tokio::test]
async fn no_upgrade_happens_during_a_request() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    let ask = ASK.replace("GET", "POST").replace("\r\n\r\n", "\r\nContent-Length: 10\r\n\r\nfirst");
    client.send(ask).await;
    let mut call = provider.next_call().await;
    call.connection.read_until("first").await;
    call.connection.send(AGREE).await;
    assert_eq!(client.read_head().await.status(), 502);
}

#[tokio::test]
async fn an_upgrade_header_without_connection_upgrade_is_ignored() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    client.send("GET /function/chat HTTP/1.1\r\nHost: g\r\nUpgrade: chat\r\n\r\n").await;
    let mut call = provider.next_call().await;
    assert_eq!(call.head.header("upgrade"), None);
    call.respond(200, "plain").await;
    assert_eq!(client.read_response().await.text(), "plain");
}

#[tokio::test]
async fn a_function_can_decline_an_upgrade() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    client.send(ASK).await;
    let mut call = provider.next_call().await;
    call.respond(426, "not here").await;
    assert_eq!(client.read_response().await.text(), "not here");
    // Both connections continue with HTTP.
    provider.reuse_connection(call);
    client.send(get("/function/chat")).await;
    provider.next_call().await.respond(200, "plain").await;
    assert_eq!(client.read_response().await.text(), "plain");
}

#[tokio::test]
async fn the_api_supports_no_upgrades() {
    let provider = Provider::manual();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let gateway =
        Gateway::builder().provider(&provider).var("logs_provider_url", url).start().await;
    let mut client = gateway.connect().await;
    client.send(ASK.replace("/function/chat", "/system/logs?name=echo")).await;
    let (tcp, _) = listener.accept().await.unwrap();
    let mut logs = Connection::new(tcp);
    let head = logs.read_head().await;
    assert_eq!((head.header("upgrade"), head.header("connection")), (None, None));
    logs.send(AGREE).await;
    assert_eq!(client.read_head().await.status(), 502);
}

#[tokio::test]
async fn an_upgrade_to_another_http_version_is_refused() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    // Such a connection would reach every path of the provider, past this gateway's rules.
    for protocol in ["h2c", "H2C", "websocket, h2c", "TLS/1.0", "HTTP/2.0"] {
        let mut client = gateway.connect().await;
        client
            .send(format!(
                "GET /function/chat HTTP/1.1\r\nHost: g\r\nConnection: Upgrade, HTTP2-Settings\r\n\
                 Upgrade: {protocol}\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n"
            ))
            .await;
        let mut call = provider.next_call().await;
        assert_eq!(call.head.header("upgrade"), None, "{protocol}");
        assert_eq!(call.head.header("http2-settings"), None);
        call.respond(200, "plain").await;
        assert_eq!(client.read_response().await.text(), "plain");
    }
}
