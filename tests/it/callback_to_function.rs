//! Callbacks to functions of the gateway itself: they are invoked without a connection, like requests of any client.

use std::path::Path;

use tempfile::TempDir;

use crate::support::eventually;
use crate::support::gateway::{Builder, Gateway};
use crate::support::provider::{Invocation, Provider};
use crate::support::queue::{fast_retry, with_embedded_queue};

/// A gateway with credentials that must not leak, and whose callbacks may reach no address of this machine.
fn with_credentials(provider: &Provider, state: &Path) -> Builder {
    std::fs::write(state.join("basic-auth-user"), "admin").unwrap();
    std::fs::write(state.join("basic-auth-password"), "hidden").unwrap();
    with_embedded_queue(provider, state)
        .var("callback_allowlist", "auto")
        .var("basic_auth", "true")
        .var("secret_mount_path", state.display())
}

async fn start() -> (TempDir, Provider, Gateway) {
    let (state, provider) = (tempfile::tempdir().unwrap(), fast_retry().start());
    let gateway = with_credentials(&provider, state.path()).start().await;
    (state, provider, gateway)
}

/// Responds to the first function of a chain, with headers that must not be forwarded.
async fn respond_first(mut call: Invocation) {
    call.read_body().await.unwrap();
    let head = "HTTP/1.1 201 X\r\nContent-Type: text/x-own\r\nX-Own: kept\r\nX-Delay-Seconds: 600\r\n\
                X-Callback-Url: http://127.0.0.1:1/\r\nIdempotency-Key: k\r\nX-Max-Attempts: 9\r\n\
                X-Expires-Seconds: 1\r\nAuthorization: Basic eDp5\r\nCookie: a=b\r\n\
                X-Gateway-Callbacks: 0\r\nX-Forwarded-For: 1.2.3.4\r\nForwarded: for=1.2.3.4\r\n\
                Origin: http://a\r\nContent-Length: 5\r\n\r\nfirst";
    call.connection.send(head).await;
}

/// Checks which parts of the first function's response the callback contains.
fn assert_callback(call: &Invocation, id: &str) {
    for (name, expect) in [
        ("x-gateway-callback", Some("1")),
        ("x-gateway-callbacks", Some("1")),
        ("x-function-name", Some("echo.fn")),
        ("x-function-status", Some("201")),
        ("content-type", Some("text/x-own")),
        ("content-length", Some("5")),
        ("x-own", Some("kept")),
        ("x-call-id", Some(id)),
        ("authorization", None),
        ("cookie", None),
        ("x-callback-url", None),
        ("x-delay-seconds", None),
        ("x-expires-seconds", None),
        ("x-max-attempts", None),
        ("idempotency-key", None),
        ("x-forwarded-for", Some("127.0.0.1")),
        ("forwarded", None),
        ("origin", None),
    ] {
        assert_eq!(call.head.header(name), expect, "{name}");
        assert!(call.head.headers.iter().filter(|(n, _)| n == name).count() <= 1, "{name}");
    }
    assert!(call.head.header("x-start-time").is_some());
}

#[tokio::test]
async fn a_callback_to_a_function_of_this_gateway_invokes_it() {
    let (_state, mut provider, gateway) = start().await;
    let port = gateway.address.port();
    let callback =
        format!("X-Callback-Url: http://localhost:{port}/function/next.dev/a%2Fb//?c=%20");
    let id = gateway.enqueue("echo", &[&callback], "start").await;
    respond_first(provider.next_call().await).await;
    let mut next = provider.next_call().await;
    assert_eq!(
        (next.head.method(), next.head.target()),
        ("POST", "/function/next.dev/a%2Fb//?c=%20")
    );
    assert_callback(&next, &id);
    assert_eq!(next.head.header("x-forwarded-host"), Some(format!("localhost:{port}").as_str()));
    assert_eq!(next.read_body().await.unwrap(), b"first");
    let inflight = "gateway_function_invocation_inflight{function_name=\"next.dev\"} 1";
    let started = "gateway_function_invocation_started{function_name=\"next.dev\"} 1";
    next.send_response(200, b"second").await;
    let counted = "gateway_function_invocation_total{code=\"200\",function_name=\"next.dev\"} 1";
    gateway
        .wait_for_metric("the metric is updated", |metrics| {
            metrics.text.contains(counted) && metrics.text.contains(started)
        })
        .await;
    assert!(!gateway.metrics().await.text.contains(inflight));
    let call_status = gateway.wait_for_state(&id, "succeeded").await;
    assert!(call_status["reason"].is_null(), "{call_status}");
    assert_eq!(gateway.result(&id).await.text(), "first");
}

#[tokio::test]
async fn a_callback_to_async_function_enqueues_a_call() {
    let (_state, mut provider, gateway) = start().await;
    // The same function, body and id would be the same call.
    let callback = format!(
        "X-Callback-Url: http://127.0.0.1:{}/async-function/echo?n",
        gateway.address.port()
    );
    let id = gateway.enqueue("echo?n", &[&callback], "first").await;
    respond_first(provider.next_call().await).await;
    let mut next = provider.next_call().await;
    assert_eq!(next.head.target(), "/function/echo.fn?n");
    assert_eq!(next.read_body().await.unwrap(), b"first");
    let other = next.head.header("x-call-id").unwrap().to_owned();
    assert_ne!(other, id);
    assert_callback(&next, &other);
    next.send_response(200, b"second").await;
    gateway.wait_for_state(&id, "succeeded").await;
    gateway.wait_for_state(&other, "succeeded").await;
    assert_eq!(gateway.result(&other).await.text(), "second");
}

#[tokio::test]
async fn a_failing_function_fails_its_callback() {
    let (_state, mut provider, gateway) = start().await;
    let port = gateway.address.port();
    let callback = format!("X-Callback-Url: http://127.0.0.1:{port}/function/next");
    let id = gateway.enqueue("echo", &[&callback], "").await;
    respond_first(provider.next_call().await).await;
    let mut next = provider.next_call().await;
    next.respond(418, "no").await;
    // Otherwise its connection would be reused.
    drop(next);
    let call_status = gateway.wait_for_state(&id, "succeeded").await;
    assert!(call_status["reason"].as_str().unwrap().contains("answered with 418"), "{call_status}");
    // An unknown function is not queried again.
    let callback = format!("X-Callback-Url: http://127.0.0.1:{port}/async-function/unknown");
    let id = gateway.enqueue("echo", &[&callback], "").await;
    respond_first(provider.next_call().await).await;
    let call_status = gateway.wait_for_state(&id, "succeeded").await;
    assert!(call_status["reason"].as_str().unwrap().contains("answered with 404"), "{call_status}");
}

#[tokio::test]
async fn a_chain_of_callbacks_is_limited() {
    let (_state, mut provider, gateway) = start().await;
    let port = gateway.address.port();
    let callback = format!("X-Callback-Url: http://127.0.0.1:{port}/function/next");
    gateway.enqueue("echo", &[&callback, "X-Gateway-Callbacks: 7"], "").await;
    respond_first(provider.next_call().await).await;
    let mut eighth = provider.next_call().await;
    assert_eq!(eighth.head.header("x-gateway-callbacks"), Some("8"));
    eighth.respond(200, "").await;
    drop(eighth);
    // A second, smaller value does not reset the count.
    let both = ["X-Gateway-Callbacks: 0", "X-Gateway-Callbacks: 8"];
    for count in [&both[1..], &both[..]] {
        let headers: Vec<&str> = [callback.as_str()].iter().chain(count).copied().collect();
        let id = gateway.enqueue("echo", &headers, "").await;
        respond_first(provider.next_call().await).await;
        let call_status = gateway.wait_for_state(&id, "succeeded").await;
        assert!(call_status["reason"].as_str().unwrap().contains("8 callbacks"), "{call_status}");
    }
    for count in ["9", "-1", "many", ""] {
        let header = format!("X-Gateway-Callbacks: {count}");
        let refused = gateway.send_async("echo", &[&header], "").await;
        assert_eq!(refused.status(), 508, "{refused}");
    }
    assert_eq!(provider.call_count(), 2 + 2);
}

#[tokio::test]
async fn only_function_paths_are_invoked() {
    let (_state, mut provider, gateway) = start().await;
    let port = gateway.address.port();
    for (path, reason) in [
        ("/system/functions", "not allowed"),
        ("//function/next", "not allowed"),
        ("/Function/next", "not allowed"),
        ("/function%2Fnext", "not allowed"),
        ("/function/next/../../system/functions", "not allowed"),
        ("/function/%2e%2e/system/functions", "not allowed"),
        ("/function/next/%2E%2E%2f..%5csystem", "not allowed"),
        ("/function/", "answered with 404"),
        ("/function/a%20b", "answered with 404"),
        ("/async-function//x", "answered with 404"),
    ] {
        let callback = format!("X-Callback-Url: http://127.0.0.1:{port}{path}");
        let id = gateway.enqueue("echo", &[&callback], "").await;
        respond_first(provider.next_call().await).await;
        let call_status = gateway.wait_for_state(&id, "succeeded").await;
        assert!(
            call_status["reason"].as_str().unwrap_or_default().contains(reason),
            "{path}: {call_status}"
        );
    }
    eventually("nothing else was called", async || provider.call_count() == 10).await;
}
