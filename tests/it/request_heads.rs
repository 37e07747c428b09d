//! Request heads that are refused before routing, and versions of HTTP other than 1.1 (RFC 9112, 2.3).

use crate::support::connection::{Connection, Response, get};
use crate::support::gateway::Gateway;
use crate::support::provider::Provider;

fn assert_refusal(response: &Response, expect: u16, what: &str, sent: &str) {
    assert_eq!(response.status(), expect, "{sent:?}: {response}");
    assert!(response.text().contains(what), "{sent:?}: {response}");
    assert!(
        response.header("content-type").is_some_and(|t| t.starts_with("text/plain")),
        "{response}"
    );
    assert_eq!(response.header("connection"), Some("close"), "{sent:?}: {response}");
    assert!(response.header("date").is_some(), "{response}");
}

#[tokio::test]
async fn a_malformed_head_is_refused_with_a_reason() {
    let provider = Provider::replying("called");
    let gateway = Gateway::in_front_of(&provider).await;
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
                assert_eq!(client.read_response().await.text(), "called");
            }
            assert_refusal(&client.read_response().await, expect, what, start);
            assert_eq!(client.read_to_close().await, b"", "{start}");
        }
    }
    // The metrics port uses the same parser.
    let mut client = Connection::connect(gateway.metrics_address).await;
    let sent = "GET /metrics HTTP/1.1\r\nHost: g\r\nX Y: z\r\n\r\n";
    assert_refusal(&client.exchange(sent).await, 400, "header", sent);
    gateway
        .wait_for_metric("only good requests were forwarded", |m| {
            m.calls("unknown", "200") + m.calls("echo.fn", "200") == provider.call_count() as u64
        })
        .await;
    assert_eq!(provider.call_count(), 21);
}

#[tokio::test]
async fn a_refused_head_request_has_no_response_body() {
    let provider = Provider::replying("called");
    let gateway = Gateway::in_front_of(&provider).await;
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
        let head = client.read_head().await;
        assert_eq!((head.status(), head.header("connection")), (expect, Some("close")), "{lines}");
        assert_eq!(client.read_to_close().await, b"", "{start}\r\n{lines}");
    }
}

#[tokio::test]
async fn a_response_that_looks_like_a_refusal_passes_unchanged() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    let text = "HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
    client.send(get("/function/echo")).await;
    let mut call = provider.next_call().await;
    call.connection.send("HTTP/1.1 200 OK\r\nContent-Length: ").await;
    call.connection.send(format!("{}\r\n\r\n", text.len())).await;
    let head = client.read_head().await;
    assert_eq!(head.status(), 200);
    // The body is sent separately.
    call.connection.send(text).await;
    assert_eq!(client.read_body(&head).await.unwrap(), text.as_bytes());
    provider.reuse_connection(call);
    client.send(get("/function/echo")).await;
    let mut call = provider.next_call().await;
    call.connection.send(text).await;
    let response = client.read_response().await;
    assert_eq!((response.status(), response.text()), (400, ""));
}

#[tokio::test]
async fn the_http_2_preface_is_refused_with_a_response() {
    let provider = Provider::replying("called");
    let gateway = Gateway::in_front_of(&provider).await;
    let preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    for pieces in [1, 2, preface.len()] {
        let mut client = gateway.connect().await;
        for piece in preface.as_bytes().chunks(preface.len().div_ceil(pieces)) {
            let _ = client.try_send(piece).await;
        }
        assert_refusal(&client.read_response().await, 505, "HTTP/1.1", preface);
    }
    let mut client = gateway.connect().await;
    assert_eq!(client.get("/function/echo").await.text(), "called");
    assert_refusal(&client.exchange(preface).await, 505, "HTTP/1.1", preface);
}

#[tokio::test]
async fn a_higher_minor_version_is_treated_as_1_1() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    for version in ["1.2", "1.9", "1.1", "1.3"] {
        // The digit arrives alone, with the rest, or with a second request.
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
            let mut call = provider.next_call().await;
            assert_eq!(call.head.start, "POST /function/echo HTTP/1.1");
            assert_eq!(call.read_body().await.unwrap(), b"hello");
            call.connection.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await;
            call.connection.send_chunk("ok").await;
            call.connection.send("0\r\n\r\n").await;
            let response = client.read_response().await;
            assert!(response.head.start.starts_with("HTTP/1.1 200"), "{response}");
            assert_eq!(
                (response.text(), response.header("transfer-encoding")),
                ("ok", Some("chunked"))
            );
            provider.reuse_connection(call);
        }
    }
}

#[tokio::test]
async fn pipelined_requests_of_a_higher_minor_version_are_answered_in_order() {
    let provider = Provider::replying("called");
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    let requests = "GET /function/echo HTTP/1.5\r\nHost: g\r\n\r\n".repeat(50);
    client.send(requests).await;
    for _ in 0..50 {
        assert_eq!(client.read_response().await.text(), "called");
    }
}

#[tokio::test]
async fn every_refusal_of_the_gateway_has_a_body() {
    let provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
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
        let response = client.exchange(request).await;
        assert_eq!(response.status(), expect, "{request:?}: {response}");
        assert!(!response.text().trim().is_empty(), "{request:?}: {response}");
        assert!(response.header("content-type").is_some(), "{request:?}: {response}");
        if expect == 405 {
            assert!(response.header("allow").is_some_and(|allow| !allow.is_empty()), "{response}");
        }
    }
}
