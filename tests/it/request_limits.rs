//! Requests above a limit are refused with a specific status, and affect no others.

use std::fmt::Write as _;
use std::time::Duration;

use crate::support::connection::{get, post};
use crate::support::eventually;
use crate::support::gateway::Gateway;
use crate::support::provider::Provider;

#[tokio::test]
async fn calls_above_the_concurrency_limit_are_refused() {
    let mut provider = Provider::manual();
    let gateway = Gateway::builder().provider(&provider).var("max_calls", "2").start().await;
    eventually("the gateway is ready", async || gateway.is_ready().await).await;
    let mut clients = Vec::new();
    let mut calls = Vec::new();
    for _ in 0..2 {
        let mut client = gateway.connect().await;
        client.send(get("/function/slow")).await;
        calls.push(provider.next_call().await);
        clients.push(client);
    }
    let refused = gateway.get("/function/slow").await;
    assert_eq!(refused.status(), 503);
    assert!(refused.header("retry-after").unwrap().parse::<u64>().is_ok());
    assert!(refused.text().contains(refused.header("x-call-id").unwrap()), "{refused}");
    let unready = gateway.get("/_/ready").await;
    assert_eq!(unready.status(), 503);
    assert!(unready.json()["reasons"].to_string().contains("max_calls"), "{unready}");
    assert_eq!(gateway.get("/_/healthz").await.status(), 200);

    let mut call = calls.remove(0);
    call.respond(200, "done").await;
    assert_eq!(clients[0].read_response().await.text(), "done");
    provider.reuse_connection(call);
    eventually("the gateway is ready again", async || gateway.is_ready().await).await;
    clients[0].send(get("/function/slow")).await;
    provider.next_call().await.respond(200, "next").await;
    assert_eq!(clients[0].read_response().await.text(), "next");
    gateway.wait_for_metric("the calls are counted", |m| m.calls("unknown", "503") == 1).await;
}

#[tokio::test]
async fn a_connection_above_the_limit_waits_for_an_idle_one() {
    let mut provider = Provider::manual();
    let gateway = Gateway::builder()
        .provider(&provider)
        .var("max_connections", "2")
        .var("threads", "1")
        .start()
        .await;
    let (mut first, mut second) = (gateway.connect().await, gateway.connect().await);
    first.send(get("/function/slow")).await;
    let mut first_call = provider.next_call().await;
    second.send(get("/function/slow")).await;
    let mut second_call = provider.next_call().await;
    let mut third = gateway.connect().await;
    third.send(get("/_/healthz")).await;
    let early = tokio::time::timeout(Duration::from_millis(300), third.try_read_head()).await;
    assert!(early.is_err(), "answered: {early:?}");
    first_call.respond(200, "done").await;
    assert_eq!(first.read_response().await.text(), "done");
    // Idle now, it is closed for the next connection.
    assert_eq!(third.read_response().await.status(), 200);
    second_call.respond(200, "done").await;
    assert_eq!(second.read_response().await.text(), "done");
}

#[tokio::test]
async fn request_heads_are_limited_to_a_mebibyte() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let request = |length: usize| {
        let pad = "p".repeat(length);
        format!("GET /function/echo HTTP/1.1\r\nHost: g\r\nX-Pad: {pad}\r\n\r\n")
    };
    let mut client = gateway.connect().await;
    let written = client.send(request(1_000_000));
    let (call, ()) = tokio::join!(provider.next_call(), written);
    let mut call = call;
    assert_eq!(call.head.header("x-pad").map(str::len), Some(1_000_000));
    call.respond(200, "ok").await;
    assert_eq!(client.read_response().await.status(), 200);

    let mut client = gateway.connect().await;
    // The request is refused before it is complete, so the last bytes may meet a closed connection.
    let _ = client.try_send(request((1 << 20) + 1000)).await;
    assert_eq!(client.read_head().await.status(), 431);
}

#[tokio::test]
async fn a_response_with_a_large_head_passes() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    client.send(get("/function/echo")).await;
    let mut call = provider.next_call().await;
    let pad = "p".repeat(500_000);
    call.connection
        .send(format!("HTTP/1.1 200 OK\r\nX-Pad: {pad}\r\nContent-Length: 2\r\n\r\nok"))
        .await;
    let response = client.read_response().await;
    assert_eq!((response.text(), response.header("x-pad").map(str::len)), ("ok", Some(500_000)));
}

fn many_headers(count: usize) -> String {
    (0..count).fold(String::new(), |mut many, number| {
        let _ = write!(many, "X-Many-{number}: {number}\r\n");
        many
    })
}

fn count_many(headers: &[(String, String)]) -> usize {
    headers.iter().filter(|(name, _)| name.starts_with("x-many-")).count()
}

#[tokio::test]
async fn many_headers_pass_in_one_write_in_pieces_and_on_a_reused_connection() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    for (headers, pieces) in [(3, 1), (255, 1), (255, 7), (3, 1)] {
        let many = many_headers(headers);
        let head = format!("GET /function/echo HTTP/1.1\r\nHost: g\r\n{many}\r\n");
        for piece in head.as_bytes().chunks(head.len().div_ceil(pieces)) {
            client.send(piece).await;
        }
        let mut call = provider.next_call().await;
        assert_eq!(count_many(&call.head.headers), headers);
        let some = many_headers(90);
        call.connection.send(format!("HTTP/1.1 200 OK\r\n{some}Content-Length: 2\r\n\r\nok")).await;
        assert_eq!(count_many(&client.read_response().await.head.headers), 90);
    }
}

#[tokio::test]
async fn many_headers_pass_while_another_request_is_in_progress() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    for headers in [150, 255] {
        let mut client = gateway.connect().await;
        client.send(get("/function/echo")).await;
        let mut first = provider.next_call().await;
        let many = many_headers(headers);
        client.send(format!("GET /function/echo HTTP/1.1\r\nHost: g\r\n{many}\r\n")).await;
        first.connection.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
        assert_eq!(client.read_response().await.status(), 200);
        drop(first);
        let mut second = provider.next_call().await;
        assert_eq!(count_many(&second.head.headers), headers);
        second.connection.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
        assert_eq!(client.read_response().await.status(), 200);
    }
}

#[tokio::test]
async fn too_many_headers_are_refused_in_requests_and_responses() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    let many = many_headers(300);
    client.send(format!("GET /function/echo HTTP/1.1\r\nHost: g\r\n{many}\r\n")).await;
    assert_eq!(client.read_response().await.head.status(), 431);
    let mut client = gateway.connect().await;
    client.send("GET /function/echo HTTP/1.1\r\nHost: g\r\n\r\n").await;
    let mut call = provider.next_call().await;
    call.connection.send(format!("HTTP/1.1 200 OK\r\n{many}Content-Length: 2\r\n\r\nok")).await;
    assert_eq!(client.read_response().await.head.status(), 502);
}

#[tokio::test]
async fn a_long_target_passes_and_a_longer_one_is_refused() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let target = format!("/function/echo?q={}", "q".repeat(60 << 10));
    let mut client = gateway.connect().await;
    client.send(get(&target)).await;
    let mut call = provider.next_call().await;
    assert_eq!(call.head.target(), target);
    call.respond(200, "ok").await;
    assert_eq!(client.read_response().await.status(), 200);
    let target = format!("/function/echo?q={}", "q".repeat(70 << 10));
    let status = gateway.get(&target).await.status();
    assert!(matches!(status, 400 | 414), "{status}");
}

#[tokio::test]
async fn a_target_too_long_with_the_providers_path_is_refused() {
    let provider = Provider::manual();
    let base = format!("{}/{}", provider.url(), "b".repeat(6 << 10));
    let gateway = Gateway::builder().var("functions_provider_url", base).start().await;
    let target = format!("/function/echo?q={}", "q".repeat(60 << 10));
    let response = gateway.get(&target).await;
    assert_eq!(response.status(), 414, "{response}");
}

#[tokio::test]
async fn pipelined_calls_are_answered_in_order() {
    let provider = Provider::builder()
        .handler(async |mut call| {
            let body = String::from_utf8(call.read_body().await.ok()?).ok()?;
            call.connection
                .send(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()))
                .await;
            Some(call.connection)
        })
        .start();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    let requests: String =
        (0..50).map(|number| post("/function/echo", &format!("number {number}"))).collect();
    client.send(requests).await;
    for number in 0..50 {
        assert_eq!(client.read_response().await.text(), format!("number {number}"));
    }
}

#[tokio::test]
async fn http_1_0_clients_receive_no_chunks() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    client.send("GET /function/echo HTTP/1.0\r\n\r\n").await;
    let mut call = provider.next_call().await;
    assert!(call.head.start.ends_with("HTTP/1.1"), "{}", call.head.start);
    call.connection.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    call.connection.send_chunk("all ").await;
    call.connection.send_chunk("of it").await;
    call.connection.send("0\r\n\r\n").await;
    let response = client.read_response().await;
    assert_eq!((response.text(), response.header("transfer-encoding")), ("all of it", None));
}

#[tokio::test]
async fn a_target_that_is_no_path_is_refused() {
    let provider = Provider::replying("hello");
    let gateway = Gateway::in_front_of(&provider).await;
    for start in ["GET *", "CONNECT provider:80", "CONNECT /function/echo:80"] {
        let mut client = gateway.connect().await;
        let response =
            client.exchange(format!("{start} HTTP/1.1\r\nHost: provider:80\r\n\r\n")).await;
        assert!((400..500).contains(&response.status()), "{start}: {response}");
    }
    assert_eq!(provider.call_count(), 0);
}

#[tokio::test]
async fn any_thread_can_accept_the_last_connection() {
    let provider = Provider::replying("hello");
    let gateway = Gateway::builder()
        .provider(&provider)
        .var("max_connections", "2")
        .var("threads", "4")
        .start()
        .await;
    for _ in 0..20 {
        let (mut first, mut second) = (gateway.connect().await, gateway.connect().await);
        assert_eq!(first.get("/_/healthz").await.status(), 200);
        assert_eq!(second.get("/_/healthz").await.status(), 200);
    }
}
