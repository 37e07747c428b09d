//! Methods and targets (RFC 9110, 7.6.2 and 9.3; RFC 9112, 3.2): which requests are forwarded, and with which host.

use crate::support::gateway::Gateway;
use crate::support::provider::Provider;

const METHODS: &str = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS";

#[tokio::test]
async fn connect_and_trace_are_not_allowed() {
    let provider = Provider::replying("called");
    let gateway = Gateway::in_front_of(&provider).await;
    for start in [
        "CONNECT /function/echo",
        "CONNECT provider:80",
        "CONNECT /system/functions",
        "CONNECT /",
        "TRACE /function/echo",
        "TRACE /function/echo/a?b",
        "TRACE http://gateway.test/function/echo",
    ] {
        let mut client = gateway.connect().await;
        let response =
            client.exchange(format!("{start} HTTP/1.1\r\nHost: provider:80\r\n\r\n")).await;
        assert_eq!((response.status(), response.header("allow")), (405, Some(METHODS)), "{start}");
        assert!(response.text().contains("method"), "{response}");
        // The refusal is an HTTP response, and the connection can be reused.
        assert_eq!(client.get("/_/healthz").await.status(), 200, "{start}");
    }
    let mut client = gateway.connect().await;
    let response = client.exchange("TRACE /system/functions HTTP/1.1\r\nHost: g\r\n\r\n").await;
    assert_eq!(response.status(), 405, "{response}");
    assert!(response.header("allow").unwrap().contains("DELETE"), "{response}");
    assert_eq!(provider.call_count(), 0);
}

#[tokio::test]
async fn the_authority_of_an_absolute_target_replaces_the_host() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    for (target, version, host, expect) in [
        ("http://target.test/function/echo?a=1", "1.1", "Host: other.test\r\n", "target.test"),
        ("https://target.test:8443/function/echo?a=1", "1.1", "Host: x\r\n", "target.test:8443"),
        ("HTTP://[::1]:80/function/echo?a=1", "1.1", "Host: x\r\n", "[::1]:80"),
        ("http://target.test/function/echo?a=1", "1.0", "", "target.test"),
    ] {
        let mut client = gateway.connect().await;
        client.send(format!("GET {target} HTTP/{version}\r\n{host}\r\n")).await;
        let mut call = provider.next_call().await;
        assert_eq!(call.head.target(), "/function/echo?a=1", "{target}");
        assert_eq!(call.head.header("x-forwarded-host"), Some(expect), "{target}");
        assert_eq!(call.head.header("host"), Some(&*provider.address.to_string()), "{target}");
        call.respond(200, "ok").await;
        assert_eq!(client.read_response().await.status(), 200);
    }
}

#[tokio::test]
async fn an_absolute_target_that_is_not_a_url_of_http_is_refused() {
    let provider = Provider::replying("called");
    let gateway = Gateway::in_front_of(&provider).await;
    for (start, host, what) in [
        ("GET http://user:secret@target.test/function/echo", "target.test", "user information"),
        ("GET http://user@target.test/function/echo", "target.test", "user information"),
        ("GET https://@target.test/function/echo", "target.test", "user information"),
        ("GET ftp://target.test/function/echo", "target.test", "http"),
        ("GET http://:80/function/echo", "target.test", "host"),
        ("GET target.test:80", "target.test", "neither a path nor a URL"),
        ("GET *", "target.test", "OPTIONS"),
        // The Host header must be well-formed anyway (RFC 9112, 3.2).
        ("GET http://target.test/function/echo", "a b", "Host"),
        ("GET http://target.test/function/echo", "a\r\nHost: b", "Host"),
    ] {
        let mut client = gateway.connect().await;
        let response = client.exchange(format!("{start} HTTP/1.1\r\nHost: {host}\r\n\r\n")).await;
        assert_eq!(response.status(), 400, "{start}: {response}");
        assert!(response.text().contains(what), "{start}: {response}");
        assert!(!response.text().contains("secret"), "{response}");
    }
    let mut client = gateway.connect().await;
    let response = client.exchange("GET http://target.test/function/echo HTTP/1.1\r\n\r\n").await;
    assert_eq!(response.status(), 400, "{response}");
    assert_eq!(provider.call_count(), 0);
}

#[tokio::test]
async fn the_host_check_of_the_api_uses_an_absolute_target() {
    let provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let host = gateway.address;
    let status = async |target: &str| {
        let head =
            format!("GET {target} HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\n\r\n");
        gateway.connect().await.exchange(head).await.status()
    };
    assert_eq!(status("/system/functions").await, 200);
    assert_eq!(status("http://elsewhere.test/system/functions").await, 403);
}

#[tokio::test]
async fn options_for_the_gateway_list_its_methods() {
    let provider = Provider::replying("called");
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    for request in [
        "OPTIONS * HTTP/1.1\r\nHost: g\r\n\r\n",
        "OPTIONS * HTTP/1.1\r\nHost: g\r\nMax-Forwards: 3\r\n\r\n",
        "OPTIONS /function/echo HTTP/1.1\r\nHost: g\r\nMax-Forwards: 0\r\n\r\n",
        "OPTIONS /function/echo HTTP/1.1\r\nHost: g\r\nMax-Forwards: 000\r\n\r\n",
    ] {
        let response = client.exchange(request).await;
        assert_eq!(
            (response.status(), response.header("allow")),
            (200, Some(METHODS)),
            "{request}"
        );
        assert_eq!(response.header("content-length"), Some("0"), "{response}");
    }
    assert_eq!(provider.call_count(), 0);
}

#[tokio::test]
async fn max_forwards_limits_forwarded_options() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    for (method, sent, expect) in [
        ("OPTIONS", Some("1"), Some("0")),
        ("OPTIONS", Some("70"), Some("69")),
        ("OPTIONS", Some("99999999999999999999999"), Some("18446744073709551614")),
        ("OPTIONS", None, None),
        // The header has no meaning for other methods.
        ("GET", Some("0"), Some("0")),
    ] {
        let mut client = gateway.connect().await;
        let line = sent.map(|sent| format!("Max-Forwards: {sent}\r\n")).unwrap_or_default();
        client.send(format!("{method} /function/echo HTTP/1.1\r\nHost: g\r\n{line}\r\n")).await;
        let mut call = provider.next_call().await;
        assert_eq!(call.head.header("max-forwards"), expect, "{method} {sent:?}");
        call.respond(200, "ok").await;
        assert_eq!(client.read_response().await.text(), "ok");
    }
    for lines in ["Max-Forwards: x", "Max-Forwards: -1", "Max-Forwards: 1\r\nMax-Forwards: 2"] {
        let mut client = gateway.connect().await;
        let head = format!("OPTIONS /function/echo HTTP/1.1\r\nHost: g\r\n{lines}\r\n\r\n");
        let response = client.exchange(head).await;
        assert_eq!(response.status(), 400, "{lines}: {response}");
        assert!(response.text().contains("Max-Forwards"), "{response}");
    }
}
