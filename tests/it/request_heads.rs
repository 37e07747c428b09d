//! Heads of requests that are refused before they are routed, and versions of HTTP other than 1.1 (RFC 9112, 2.3).

use crate::support::gateway::Gateway;
use crate::support::provider::Provider;
use crate::support::wire::{Answer, Wire, get};

fn is_explained(answer: &Answer, expect: u16, what: &str, sent: &str) {
    assert_eq!(answer.status(), expect, "{sent:?}: {answer}");
    assert!(answer.text().contains(what), "{sent:?}: {answer}");
    assert!(answer.header("content-type").is_some_and(|t| t.starts_with("text/plain")), "{answer}");
    assert_eq!(answer.header("connection"), Some("close"), "{sent:?}: {answer}");
    assert!(answer.header("date").is_some(), "{answer}");
}

#[tokio::test]
async fn a_head_that_cannot_be_read_is_answered_with_what_is_wrong() {
    let provider = Provider::saying("called");
    let gateway = Gateway::before(&provider).await;
    let many = "X-Many: 1\r\n".repeat(300);
    let long = "q".repeat(70 << 10);
    for (start, lines, expect, what) in [
        ("GE(T /function/echo HTTP/1.1", "Host: g", 400, "method"),
        ("GET /function/echo/a b HTTP/1.1", "Host: g", 400, "version"),
        ("GET /function/echo/a\x01b HTTP/1.1", "Host: g", 400, "target"),
        ("GET /function/echo/^ HTTP/1.1", "Host: g\r\nX Y: z", 400, "header"),
        ("GET /function/echo", "Host: g", 400, "target"),
        ("GET /function/echo HTTP/1", "Host: g", 400, "version"),
        ("GET /function/echo http/1.1", "Host: g", 400, "version"),
        ("GET /function/echo HTTP/1.1", "Host : g", 400, "header"),
        ("GET /function/echo HTTP/1.1", "Host: g\r\nNonsense", 400, "header"),
        ("GET /function/echo HTTP/1.1", "Host: g\r\nA: b\0c", 400, "header"),
        ("GET http:///function/echo HTTP/1.1", "Host: g", 400, "target"),
        ("POST /function/echo HTTP/1.1", "Host: g\r\nContent-Length: x", 400, "Content-Length"),
        ("POST /function/echo HTTP/1.1", "Host: g\r\nContent-Length: 1, 2", 400, "Content-Length"),
        (
            "POST /function/echo HTTP/1.1",
            "Host: g\r\nContent-Length: 1\r\nContent-Length: 2",
            400,
            "Content-Length",
        ),
        (
            "POST /function/echo HTTP/1.1",
            "Host: g\r\nContent-Length: 18446744073709551615",
            400,
            "Content-Length",
        ),
        (
            "POST /function/echo HTTP/1.1",
            "Host: g\r\nContent-Length: 18446744073709551616",
            400,
            "Content-Length",
        ),
        ("GET /function/echo HTTP/2.0", "Host: g", 505, "HTTP/1.1"),
        ("GET /function/echo HTTP/0.9", "Host: g", 505, "HTTP/1.1"),
        ("GET /function/echo HTTP/9.9", "Host: g", 505, "HTTP/1.1"),
        ("GET /function/echo HTTP/1.1", &format!("Host: g\r\n{many}A: b"), 431, "256 headers"),
        (&format!("GET /function/echo?{long} HTTP/1.1"), "Host: g", 414, "target"),
    ] {
        for before in ["", &get("/function/echo")] {
            let mut client = gateway.connect().await;
            client.send(format!("{before}{start}\r\n{lines}\r\n\r\n")).await;
            if !before.is_empty() {
                assert_eq!(client.answer().await.text(), "called");
            }
            is_explained(&client.answer().await, expect, what, start);
            assert_eq!(client.closed().await, b"", "{start}");
        }
    }
    // The metrics port has the same eyes.
    let mut client = Wire::connect(gateway.metrics_address).await;
    let sent = "GET /metrics HTTP/1.1\r\nHost: g\r\nX Y: z\r\n\r\n";
    is_explained(&client.ask(sent).await, 400, "header", sent);
    gateway
        .metrics_show("only good requests were forwarded", |m| {
            m.calls("unknown", "200") + m.calls("echo.fn", "200") == provider.calls() as u64
        })
        .await;
    assert_eq!(provider.calls(), 21);
}

#[tokio::test]
async fn the_refusal_of_a_head_request_has_no_body() {
    let provider = Provider::saying("called");
    let gateway = Gateway::before(&provider).await;
    let many = "X-Many: 1\r\n".repeat(300);
    for (start, lines, expect) in [
        ("HEAD /function/echo HTTP/1.1", "Host : g", 400),
        ("HEAD /function/echo HTTP/1.1", "Host: g\r\nContent-Length: x", 400),
        ("HEAD /function/echo HTTP/1.1", "Host: g\r\nTransfer-Encoding: gzip", 400),
        ("HEAD /function/echo HTTP/2.0", "Host: g", 505),
        ("HEAD /function/echo HTTP/1.1", &format!("Host: g\r\n{many}A: b"), 431),
    ] {
        let mut client = gateway.connect().await;
        client.send(format!("{start}\r\n{lines}\r\n\r\n")).await;
        let head = client.head().await;
        assert_eq!((head.status(), head.header("connection")), (expect, Some("close")), "{lines}");
        assert_eq!(client.closed().await, b"", "{start}\r\n{lines}");
    }
}

#[tokio::test]
async fn a_response_that_looks_like_a_refusal_passes_as_it_is() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut client = gateway.connect().await;
    let text = "HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
    client.send(get("/function/echo")).await;
    let mut call = provider.call().await;
    call.wire.send("HTTP/1.1 200 OK\r\nContent-Length: ").await;
    call.wire.send(format!("{}\r\n\r\n", text.len())).await;
    let head = client.head().await;
    assert_eq!(head.status(), 200);
    // Its body is written by itself.
    call.wire.send(text).await;
    assert_eq!(client.body(&head).await.unwrap(), text.as_bytes());
    provider.keep(call);
    client.send(get("/function/echo")).await;
    let mut call = provider.call().await;
    call.wire.send(text).await;
    let answer = client.answer().await;
    assert_eq!((answer.status(), answer.text()), (400, ""));
}

#[tokio::test]
async fn the_preface_of_http_2_is_answered() {
    let provider = Provider::saying("called");
    let gateway = Gateway::before(&provider).await;
    let preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    for pieces in [1, 2, preface.len()] {
        let mut client = gateway.connect().await;
        for piece in preface.as_bytes().chunks(preface.len().div_ceil(pieces)) {
            let _ = client.try_send(piece).await;
        }
        is_explained(&client.answer().await, 505, "HTTP/1.1", preface);
    }
    let mut client = gateway.connect().await;
    assert_eq!(client.get("/function/echo").await.text(), "called");
    is_explained(&client.ask(preface).await, 505, "HTTP/1.1", preface);
}

#[tokio::test]
async fn a_higher_minor_version_is_treated_as_1_1() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut client = gateway.connect().await;
    for version in ["1.2", "1.9", "1.1", "1.3"] {
        // The digit comes alone, or behind the rest, or a second request comes with it.
        let request =
            format!("POST /function/echo HTTP/{version}\r\nHost: g\r\nContent-Length: 5\r\n\r\n");
        let at = request.find(version).unwrap();
        for cuts in [vec![], vec![at + 2], vec![at + 3], vec![at + 2, at + 3], vec![3, at]] {
            let mut from = 0;
            for cut in cuts {
                client.send(&request[from..cut]).await;
                from = cut;
            }
            client.send(format!("{}hello", &request[from..])).await;
            let mut call = provider.call().await;
            assert_eq!(call.head.start, "POST /function/echo HTTP/1.1");
            assert_eq!(call.body().await.unwrap(), b"hello");
            call.wire.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await;
            call.wire.send_chunk("ok").await;
            call.wire.send("0\r\n\r\n").await;
            let answer = client.answer().await;
            assert!(answer.head.start.starts_with("HTTP/1.1 200"), "{answer}");
            assert_eq!(
                (answer.text(), answer.header("transfer-encoding")),
                ("ok", Some("chunked"))
            );
            provider.keep(call);
        }
    }
}

#[tokio::test]
async fn pipelined_requests_of_a_higher_version_are_answered_in_order() {
    let provider = Provider::saying("called");
    let gateway = Gateway::before(&provider).await;
    let mut client = gateway.connect().await;
    let requests = "GET /function/echo HTTP/1.5\r\nHost: g\r\n\r\n".repeat(50);
    client.send(requests).await;
    for _ in 0..50 {
        assert_eq!(client.answer().await.text(), "called");
    }
}

#[tokio::test]
async fn every_refusal_of_the_gateway_has_a_body() {
    let provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    for (request, expect) in [
        ("GET /nowhere HTTP/1.1\r\nHost: g\r\n\r\n", 404),
        ("PATCH /system/functions HTTP/1.1\r\nHost: g\r\n\r\n", 405),
        ("PATCH /system/secrets HTTP/1.1\r\nHost: g\r\n\r\n", 405),
        ("PUT /async-function/echo HTTP/1.1\r\nHost: g\r\nContent-Length: 0\r\n\r\n", 405),
        ("POST /healthz HTTP/1.1\r\nHost: g\r\nContent-Length: 0\r\n\r\n", 405),
        ("POST / HTTP/1.1\r\nHost: g\r\nContent-Length: 0\r\n\r\n", 405),
        ("GET /function/ HTTP/1.1\r\nHost: g\r\n\r\n", 404),
        ("GET /function/a%20b HTTP/1.1\r\nHost: g\r\n\r\n", 404),
        ("GET /function/echo/.. HTTP/1.1\r\nHost: g\r\n\r\n", 400),
        ("GET /function/echo HTTP/1.1\r\n\r\n", 400),
        ("POST /system/alert HTTP/1.1\r\nHost: g\r\nContent-Length: 1\r\n\r\nx", 400),
        ("POST /system/scale-function/echo HTTP/1.1\r\nHost: g\r\nContent-Length: 1\r\n\r\nx", 400),
        ("GET /system/calls/%ff HTTP/1.1\r\nHost: g\r\n\r\n", 405),
        ("DELETE /system/calls/%ff HTTP/1.1\r\nHost: g\r\n\r\n", 400),
        ("GET /system/function/%ff HTTP/1.1\r\nHost: g\r\n\r\n", 400),
        ("GET /system/functions HTTP/1.1\r\nHost: g\r\nOrigin: http://x\r\n\r\n", 403),
    ] {
        let mut client = gateway.connect().await;
        let answer = client.ask(request).await;
        assert_eq!(answer.status(), expect, "{request:?}: {answer}");
        assert!(!answer.text().trim().is_empty(), "{request:?}: {answer}");
        assert!(answer.header("content-type").is_some(), "{request:?}: {answer}");
        if expect == 405 {
            assert!(answer.header("allow").is_some_and(|allow| !allow.is_empty()), "{answer}");
        }
    }
}
