//! What is too much is refused with a status that says so, and nothing else suffers from it.

use std::fmt::Write as _;
use std::time::Duration;

use crate::support::eventually;
use crate::support::gateway::Gateway;
use crate::support::provider::Provider;
use crate::support::wire::{get, post};

#[tokio::test]
async fn calls_beyond_the_limit_are_refused_until_others_end() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::builder().provider(&provider).var("max_calls", "2").start().await;
    eventually("ready", async || gateway.is_ready().await).await;
    let mut callers = Vec::new();
    let mut calls = Vec::new();
    for _ in 0..2 {
        let mut caller = gateway.connect().await;
        caller.send(get("/function/slow")).await;
        calls.push(provider.call().await);
        callers.push(caller);
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
    call.answer(200, "done").await;
    assert_eq!(callers[0].answer().await.text(), "done");
    provider.keep(call);
    eventually("ready again", async || gateway.is_ready().await).await;
    callers[0].send(get("/function/slow")).await;
    provider.call().await.answer(200, "next").await;
    assert_eq!(callers[0].answer().await.text(), "next");
    gateway.metrics_show("counted", |m| m.calls("unknown", "503") == 1).await;
}

#[tokio::test]
async fn a_connection_beyond_the_limit_waits_for_one_that_is_not_in_use() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::builder()
        .provider(&provider)
        .var("max_connections", "2")
        .var("threads", "1")
        .start()
        .await;
    let (mut first, mut second) = (gateway.connect().await, gateway.connect().await);
    first.send(get("/function/slow")).await;
    let mut first_call = provider.call().await;
    second.send(get("/function/slow")).await;
    let mut second_call = provider.call().await;
    let mut third = gateway.connect().await;
    third.send(get("/_/healthz")).await;
    let early = tokio::time::timeout(Duration::from_millis(300), third.try_head()).await;
    assert!(early.is_err(), "answered: {early:?}");
    first_call.answer(200, "done").await;
    assert_eq!(first.answer().await.text(), "done");
    // Idle from now on, it makes room.
    assert_eq!(third.answer().await.status(), 200);
    second_call.answer(200, "done").await;
    assert_eq!(second.answer().await.text(), "done");
}

#[tokio::test]
async fn a_head_of_almost_a_mebibyte_passes_and_a_larger_one_is_refused() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let request = |length: usize| {
        let pad = "p".repeat(length);
        format!("GET /function/echo HTTP/1.1\r\nHost: g\r\nX-Pad: {pad}\r\n\r\n")
    };
    let mut caller = gateway.connect().await;
    let written = caller.send(request(1_000_000));
    let (call, ()) = tokio::join!(provider.call(), written);
    let mut call = call;
    assert_eq!(call.head.header("x-pad").map(str::len), Some(1_000_000));
    call.answer(200, "ok").await;
    assert_eq!(caller.answer().await.status(), 200);

    let mut caller = gateway.connect().await;
    // Refused before it is read whole: the end of it may find nobody.
    let _ = caller.try_send(request((1 << 20) + 1000)).await;
    assert_eq!(caller.head().await.status(), 431);
}

#[tokio::test]
async fn an_answer_with_a_large_head_passes() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut caller = gateway.connect().await;
    caller.send(get("/function/echo")).await;
    let mut call = provider.call().await;
    let pad = "p".repeat(500_000);
    call.wire.send(format!("HTTP/1.1 200 OK\r\nX-Pad: {pad}\r\nContent-Length: 2\r\n\r\nok")).await;
    let answer = caller.answer().await;
    assert_eq!((answer.text(), answer.header("x-pad").map(str::len)), ("ok", Some(500_000)));
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
async fn many_headers_pass_at_once_and_in_pieces_and_on_a_connection_that_had_few() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut caller = gateway.connect().await;
    for (headers, pieces) in [(3, 1), (255, 1), (255, 7), (3, 1)] {
        let many = many_headers(headers);
        let head = format!("GET /function/echo HTTP/1.1\r\nHost: g\r\n{many}\r\n");
        for piece in head.as_bytes().chunks(head.len().div_ceil(pieces)) {
            caller.send(piece).await;
        }
        let mut call = provider.call().await;
        assert_eq!(count_many(&call.head.headers), headers);
        let some = many_headers(90);
        call.wire.send(format!("HTTP/1.1 200 OK\r\n{some}Content-Length: 2\r\n\r\nok")).await;
        assert_eq!(count_many(&caller.answer().await.head.headers), 90);
    }
}

#[tokio::test]
async fn many_headers_pass_while_another_request_is_answered() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    for headers in [150, 255] {
        let mut caller = gateway.connect().await;
        caller.send(get("/function/echo")).await;
        let mut first = provider.call().await;
        let many = many_headers(headers);
        caller.send(format!("GET /function/echo HTTP/1.1\r\nHost: g\r\n{many}\r\n")).await;
        first.wire.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
        assert_eq!(caller.answer().await.status(), 200);
        drop(first);
        let mut second = provider.call().await;
        assert_eq!(count_many(&second.head.headers), headers);
        second.wire.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
        assert_eq!(caller.answer().await.status(), 200);
    }
}

#[tokio::test]
async fn too_many_headers_are_refused_on_either_side() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut caller = gateway.connect().await;
    let many = many_headers(300);
    caller.send(format!("GET /function/echo HTTP/1.1\r\nHost: g\r\n{many}\r\n")).await;
    assert_eq!(caller.answer().await.head.status(), 431);
    let mut caller = gateway.connect().await;
    caller.send("GET /function/echo HTTP/1.1\r\nHost: g\r\n\r\n").await;
    let mut call = provider.call().await;
    call.wire.send(format!("HTTP/1.1 200 OK\r\n{many}Content-Length: 2\r\n\r\nok")).await;
    assert_eq!(caller.answer().await.head.status(), 502);
}

#[tokio::test]
async fn a_long_target_passes_and_a_longer_one_is_refused() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let target = format!("/function/echo?q={}", "q".repeat(60 << 10));
    let mut caller = gateway.connect().await;
    caller.send(get(&target)).await;
    let mut call = provider.call().await;
    assert_eq!(call.head.target(), target);
    call.answer(200, "ok").await;
    assert_eq!(caller.answer().await.status(), 200);
    let target = format!("/function/echo?q={}", "q".repeat(70 << 10));
    let status = gateway.get(&target).await.status();
    assert!(matches!(status, 400 | 414), "{status}");
}

#[tokio::test]
async fn a_target_that_only_the_providers_path_makes_too_long_is_refused() {
    let provider = Provider::by_hand();
    let base = format!("{}/{}", provider.url(), "b".repeat(6 << 10));
    let gateway = Gateway::builder().var("functions_provider_url", base).start().await;
    let target = format!("/function/echo?q={}", "q".repeat(60 << 10));
    let answer = gateway.get(&target).await;
    assert_eq!(answer.status(), 414, "{answer}");
}

#[tokio::test]
async fn pipelined_calls_are_answered_in_order() {
    let provider = Provider::builder()
        .answering(async |mut call| {
            let body = String::from_utf8(call.body().await.ok()?).ok()?;
            call.wire
                .send(format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len()))
                .await;
            Some(call.wire)
        })
        .start();
    let gateway = Gateway::before(&provider).await;
    let mut caller = gateway.connect().await;
    let requests: String =
        (0..50).map(|number| post("/function/echo", &format!("number {number}"))).collect();
    caller.send(requests).await;
    for number in 0..50 {
        assert_eq!(caller.answer().await.text(), format!("number {number}"));
    }
}

#[tokio::test]
async fn a_caller_of_http_1_0_gets_no_chunks() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut caller = gateway.connect().await;
    caller.send("GET /function/echo HTTP/1.0\r\n\r\n").await;
    let mut call = provider.call().await;
    assert!(call.head.start.ends_with("HTTP/1.1"), "{}", call.head.start);
    call.wire.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    call.wire.send_chunk("all ").await;
    call.wire.send_chunk("of it").await;
    call.wire.send("0\r\n\r\n").await;
    let answer = caller.answer().await;
    assert_eq!((answer.text(), answer.header("transfer-encoding")), ("all of it", None));
}

#[tokio::test]
async fn a_target_that_is_no_path_is_refused() {
    let provider = Provider::saying("hello");
    let gateway = Gateway::before(&provider).await;
    for start in ["GET *", "CONNECT provider:80", "CONNECT /function/echo:80"] {
        let mut caller = gateway.connect().await;
        let answer = caller.ask(format!("{start} HTTP/1.1\r\nHost: provider:80\r\n\r\n")).await;
        assert!((400..500).contains(&answer.status()), "{start}: {answer}");
    }
    assert_eq!(provider.calls(), 0);
}

#[tokio::test]
async fn the_last_place_for_a_connection_can_be_taken_on_any_thread() {
    let provider = Provider::saying("hello");
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
