//! Methods and targets (RFC 9110, 7.6.2 and 9.3; RFC 9112, 3.2): which requests are forwarded, and with which host.

use crate::support::gateway::Gateway;
use crate::support::provider::Provider;

const METHODS: &str = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS";

#[tokio::test]
async fn connect_and_trace_are_not_allowed() {
    let provider = Provider::saying("called");
    let gateway = Gateway::before(&provider).await;
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
        let answer = client.ask(format!("{start} HTTP/1.1\r\nHost: provider:80\r\n\r\n")).await;
        assert_eq!((answer.status(), answer.header("allow")), (405, Some(METHODS)), "{start}");
        assert!(answer.text().contains("method"), "{answer}");
        // The client is told in HTTP, and can go on with it.
        assert_eq!(client.get("/_/healthz").await.status(), 200, "{start}");
    }
    let mut client = gateway.connect().await;
    let answer = client.ask("TRACE /system/functions HTTP/1.1\r\nHost: g\r\n\r\n").await;
    assert_eq!(answer.status(), 405, "{answer}");
    assert!(answer.header("allow").unwrap().contains("DELETE"), "{answer}");
    assert_eq!(provider.calls(), 0);
}

#[tokio::test]
async fn the_authority_of_an_absolute_target_replaces_the_host() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    for (target, version, host, expect) in [
        ("http://target.test/function/echo?a=1", "1.1", "Host: other.test\r\n", "target.test"),
        ("https://target.test:8443/function/echo?a=1", "1.1", "Host: x\r\n", "target.test:8443"),
        ("HTTP://[::1]:80/function/echo?a=1", "1.1", "Host: x\r\n", "[::1]:80"),
        ("http://target.test/function/echo?a=1", "1.0", "", "target.test"),
    ] {
        let mut client = gateway.connect().await;
        client.send(format!("GET {target} HTTP/{version}\r\n{host}\r\n")).await;
        let mut call = provider.call().await;
        assert_eq!(call.head.target(), "/function/echo?a=1", "{target}");
        assert_eq!(call.head.header("x-forwarded-host"), Some(expect), "{target}");
        assert_eq!(call.head.header("host"), Some(&*provider.address.to_string()), "{target}");
        call.answer(200, "ok").await;
        assert_eq!(client.answer().await.status(), 200);
    }
}

#[tokio::test]
async fn an_absolute_target_that_is_not_a_url_of_http_is_refused() {
    let provider = Provider::saying("called");
    let gateway = Gateway::before(&provider).await;
    for (start, host, what) in [
        ("GET http://user:secret@target.test/function/echo", "target.test", "user information"),
        ("GET http://user@target.test/function/echo", "target.test", "user information"),
        ("GET https://@target.test/function/echo", "target.test", "user information"),
        ("GET ftp://target.test/function/echo", "target.test", "http"),
        ("GET http://:80/function/echo", "target.test", "host"),
        ("GET target.test:80", "target.test", "neither a path nor a URL"),
        ("GET *", "target.test", "OPTIONS"),
        // The header must be well-formed all the same (RFC 9112, 3.2).
        ("GET http://target.test/function/echo", "a b", "Host"),
        ("GET http://target.test/function/echo", "a\r\nHost: b", "Host"),
    ] {
        let mut client = gateway.connect().await;
        let answer = client.ask(format!("{start} HTTP/1.1\r\nHost: {host}\r\n\r\n")).await;
        assert_eq!(answer.status(), 400, "{start}: {answer}");
        assert!(answer.text().contains(what), "{start}: {answer}");
        assert!(!answer.text().contains("secret"), "{answer}");
    }
    let mut client = gateway.connect().await;
    let answer = client.ask("GET http://target.test/function/echo HTTP/1.1\r\n\r\n").await;
    assert_eq!(answer.status(), 400, "{answer}");
    assert_eq!(provider.calls(), 0);
}

#[tokio::test]
async fn the_host_that_guards_the_api_is_that_of_an_absolute_target() {
    let provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let host = gateway.address;
    let status = async |target: &str| {
        let head =
            format!("GET {target} HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\n\r\n");
        gateway.connect().await.ask(head).await.status()
    };
    assert_eq!(status("/system/functions").await, 200);
    assert_eq!(status("http://elsewhere.test/system/functions").await, 403);
}

#[tokio::test]
async fn options_about_the_gateway_itself_name_its_methods() {
    let provider = Provider::saying("called");
    let gateway = Gateway::before(&provider).await;
    let mut client = gateway.connect().await;
    for request in [
        "OPTIONS * HTTP/1.1\r\nHost: g\r\n\r\n",
        "OPTIONS * HTTP/1.1\r\nHost: g\r\nMax-Forwards: 3\r\n\r\n",
        "OPTIONS /function/echo HTTP/1.1\r\nHost: g\r\nMax-Forwards: 0\r\n\r\n",
        "OPTIONS /function/echo HTTP/1.1\r\nHost: g\r\nMax-Forwards: 000\r\n\r\n",
    ] {
        let answer = client.ask(request).await;
        assert_eq!((answer.status(), answer.header("allow")), (200, Some(METHODS)), "{request}");
        assert_eq!(answer.header("content-length"), Some("0"), "{answer}");
    }
    assert_eq!(provider.calls(), 0);
}

#[tokio::test]
async fn options_are_forwarded_as_often_as_max_forwards_says() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    for (method, sent, expect) in [
        ("OPTIONS", Some("1"), Some("0")),
        ("OPTIONS", Some("70"), Some("69")),
        ("OPTIONS", Some("99999999999999999999999"), Some("18446744073709551614")),
        ("OPTIONS", None, None),
        // It has no meaning for other methods.
        ("GET", Some("0"), Some("0")),
    ] {
        let mut client = gateway.connect().await;
        let line = sent.map(|sent| format!("Max-Forwards: {sent}\r\n")).unwrap_or_default();
        client.send(format!("{method} /function/echo HTTP/1.1\r\nHost: g\r\n{line}\r\n")).await;
        let mut call = provider.call().await;
        assert_eq!(call.head.header("max-forwards"), expect, "{method} {sent:?}");
        call.answer(200, "ok").await;
        assert_eq!(client.answer().await.text(), "ok");
    }
    for lines in ["Max-Forwards: x", "Max-Forwards: -1", "Max-Forwards: 1\r\nMax-Forwards: 2"] {
        let mut client = gateway.connect().await;
        let head = format!("OPTIONS /function/echo HTTP/1.1\r\nHost: g\r\n{lines}\r\n\r\n");
        let answer = client.ask(head).await;
        assert_eq!(answer.status(), 400, "{lines}: {answer}");
        assert!(answer.text().contains("Max-Forwards"), "{answer}");
    }
}
