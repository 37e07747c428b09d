//! Changes of protocol, as websockets begin: only those that both sides agree on.

use crate::support::gateway::Gateway;
use crate::support::provider::{Call, Provider};
use crate::support::wire::{Wire, get};

const ASK: &str = "GET /function/chat HTTP/1.1\r\nHost: g\r\nConnection: keep-alive, Upgrade\r\nUpgrade: chat\r\n\r\n";
const AGREE: &str =
    "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: chat\r\n\r\n";
const LISTED: &str = r#"[{"name":"chat","namespace":"fn","replicas":1,"availableReplicas":1}]"#;

/// A tunnel, from its caller's end to its function's.
async fn open(gateway: &Gateway, provider: &mut Provider) -> (Wire, Call) {
    let mut caller = gateway.connect().await;
    caller.send(ASK).await;
    let mut call = provider.call().await;
    assert_eq!(call.head.header("upgrade"), Some("chat"));
    assert_eq!(call.head.header("connection").map(str::to_ascii_lowercase), Some("upgrade".into()));
    // What follows at once belongs to the new protocol.
    call.wire.send(format!("{AGREE}welcome")).await;
    let head = caller.head().await;
    assert_eq!((head.status(), head.header("upgrade")), (101, Some("chat")));
    assert!(head.header("x-call-id").is_some());
    caller.until("welcome").await;
    (caller, call)
}

#[tokio::test]
async fn bytes_pass_both_ways_after_it() {
    let mut provider = Provider::builder().lists(LISTED).start();
    let gateway = Gateway::before(&provider).await;
    gateway.metrics_show("listed", |m| m.text.contains("gateway_service_count{")).await;
    let (mut caller, mut call) = open(&gateway, &mut provider).await;
    for turn in 0..5 {
        caller.send(format!("ask {turn};")).await;
        call.wire.until(&format!("ask {turn};")).await;
        call.wire.send(format!("say {turn};")).await;
        caller.until(&format!("say {turn};")).await;
    }
    assert_eq!(gateway.metrics().await.in_flight("chat.fn"), 1.0);
    drop(call);
    caller.closed().await;
    drop(caller);
    gateway.metrics_show("over", |m| m.in_flight("chat.fn") == 0.0).await;
    assert_eq!(gateway.metrics().await.calls("chat.fn", "101"), 1);
}

#[tokio::test]
async fn what_looks_like_http_passes_through_it_as_it_is() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let (mut caller, mut call) = open(&gateway, &mut provider).await;
    // More lines than most heads have, and a response in one piece.
    let lines = "GET / HTTP/1.1\r\n".repeat(1000);
    for turn in 0..3 {
        caller.send(format!("{lines}ask {turn};")).await;
        for _ in 0..1000 {
            call.wire.until("GET / HTTP/1.1\r\n").await;
        }
        call.wire.until(&format!("ask {turn};")).await;
        call.wire.send(format!("HTTP/1.1 400 say {turn};")).await;
        caller.until(&format!("HTTP/1.1 400 say {turn};")).await;
    }
}

#[tokio::test]
async fn it_ends_when_the_caller_leaves() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let (caller, mut call) = open(&gateway, &mut provider).await;
    drop(caller);
    call.wire.closed().await;
}

#[tokio::test]
async fn it_ends_when_both_sides_are_silent_for_too_long() {
    let mut provider = Provider::by_hand();
    let gateway =
        Gateway::builder().provider(&provider).var("upstream_timeout", "500ms").start().await;
    let (mut caller, mut call) = open(&gateway, &mut provider).await;
    caller.closed().await;
    call.wire.closed().await;
}

#[tokio::test]
async fn a_side_that_has_said_all_may_still_listen() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let (mut caller, mut call) = open(&gateway, &mut provider).await;
    caller.send("last words").await;
    caller.finish().await;
    assert_eq!(call.wire.closed().await, b"last words");
    call.wire.send("farewell").await;
    drop(call);
    assert_eq!(caller.closed().await, b"farewell");
}

#[tokio::test]
async fn nobody_is_changed_unasked() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut caller = gateway.connect().await;
    caller.send(get("/function/chat")).await;
    provider.call().await.wire.send(AGREE).await;
    let answer = caller.answer().await;
    assert_eq!(answer.status(), 502, "{answer}");
}

#[tokio::test]
async fn nobody_is_changed_in_the_middle_of_a_request() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut caller = gateway.connect().await;
    let ask = ASK.replace("GET", "POST").replace("\r\n\r\n", "\r\nContent-Length: 10\r\n\r\nfirst");
    caller.send(ask).await;
    let mut call = provider.call().await;
    call.wire.until("first").await;
    call.wire.send(AGREE).await;
    assert_eq!(caller.head().await.status(), 502);
}

#[tokio::test]
async fn a_header_that_connection_does_not_name_asks_for_nothing() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut caller = gateway.connect().await;
    caller.send("GET /function/chat HTTP/1.1\r\nHost: g\r\nUpgrade: chat\r\n\r\n").await;
    let mut call = provider.call().await;
    assert_eq!(call.head.header("upgrade"), None);
    call.answer(200, "plain").await;
    assert_eq!(caller.answer().await.text(), "plain");
}

#[tokio::test]
async fn a_function_that_does_not_agree_just_answers() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut caller = gateway.connect().await;
    caller.send(ASK).await;
    let mut call = provider.call().await;
    call.answer(426, "not here").await;
    assert_eq!(caller.answer().await.text(), "not here");
    // Both connections go on with what they were.
    provider.keep(call);
    caller.send(get("/function/chat")).await;
    provider.call().await.answer(200, "plain").await;
    assert_eq!(caller.answer().await.text(), "plain");
}

#[tokio::test]
async fn the_api_changes_no_protocols() {
    let provider = Provider::by_hand();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let gateway =
        Gateway::builder().provider(&provider).var("logs_provider_url", url).start().await;
    let mut caller = gateway.connect().await;
    caller.send(ASK.replace("/function/chat", "/system/logs?name=echo")).await;
    let (tcp, _) = listener.accept().await.unwrap();
    let mut logs = Wire::new(tcp);
    let head = logs.head().await;
    assert_eq!((head.header("upgrade"), head.header("connection")), (None, None));
    logs.send(AGREE).await;
    assert_eq!(caller.head().await.status(), 502);
}

#[tokio::test]
async fn nobody_is_changed_to_another_http() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    // Such a connection would reach whatever the provider has, past this gateway's rules.
    for protocol in ["h2c", "H2C", "websocket, h2c", "TLS/1.0", "HTTP/2.0"] {
        let mut caller = gateway.connect().await;
        caller
            .send(format!(
                "GET /function/chat HTTP/1.1\r\nHost: g\r\nConnection: Upgrade, HTTP2-Settings\r\n\
                 Upgrade: {protocol}\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n\r\n"
            ))
            .await;
        let mut call = provider.call().await;
        assert_eq!(call.head.header("upgrade"), None, "{protocol}");
        assert_eq!(call.head.header("http2-settings"), None);
        call.answer(200, "plain").await;
        assert_eq!(caller.answer().await.text(), "plain");
    }
}
