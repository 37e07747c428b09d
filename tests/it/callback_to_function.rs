//! Callbacks to functions of the gateway itself: they are called without a connection, as any client would call them.

use std::path::Path;

use tempfile::TempDir;

use crate::support::eventually;
use crate::support::gateway::{Builder, Gateway};
use crate::support::provider::{Call, Provider};
use crate::support::queue::{patient, queueing};

/// A gateway with credentials that it must not give away, and that may call back to nothing on this machine.
fn guarded(provider: &Provider, state: &Path) -> Builder {
    std::fs::write(state.join("basic-auth-user"), "admin").unwrap();
    std::fs::write(state.join("basic-auth-password"), "hidden").unwrap();
    queueing(provider, state)
        .var("callback_allowlist", "auto")
        .var("basic_auth", "true")
        .var("secret_mount_path", state.display())
}

async fn start() -> (TempDir, Provider, Gateway) {
    let (state, provider) = (tempfile::tempdir().unwrap(), patient().start());
    let gateway = guarded(&provider, state.path()).start().await;
    (state, provider, gateway)
}

/// Answers the first function of a chain with headers that are not to get further.
async fn answer_first(mut call: Call) {
    call.body().await.unwrap();
    let head = "HTTP/1.1 201 X\r\nContent-Type: text/x-own\r\nX-Own: kept\r\nX-Delay-Seconds: 600\r\n\
                X-Callback-Url: http://127.0.0.1:1/\r\nIdempotency-Key: k\r\nX-Max-Attempts: 9\r\n\
                X-Expires-Seconds: 1\r\nAuthorization: Basic eDp5\r\nCookie: a=b\r\n\
                X-Gateway-Callbacks: 0\r\nX-Forwarded-For: 1.2.3.4\r\nForwarded: for=1.2.3.4\r\n\
                Origin: http://a\r\nContent-Length: 5\r\n\r\nfirst";
    call.wire.send(head).await;
}

/// What is sent of the first function's answer, and what is not.
fn check(call: &Call, id: &str) {
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
async fn a_callback_to_a_function_of_this_gateway_calls_it() {
    let (_state, mut provider, gateway) = start().await;
    let port = gateway.address.port();
    let callback =
        format!("X-Callback-Url: http://localhost:{port}/function/next.dev/a%2Fb//?c=%20");
    let id = gateway.queued("echo", &[&callback], "start").await;
    answer_first(provider.call().await).await;
    let mut next = provider.call().await;
    assert_eq!(
        (next.head.method(), next.head.target()),
        ("POST", "/function/next.dev/a%2Fb//?c=%20")
    );
    check(&next, &id);
    assert_eq!(next.head.header("x-forwarded-host"), Some(format!("localhost:{port}").as_str()));
    assert_eq!(next.body().await.unwrap(), b"first");
    let inflight = "gateway_function_invocation_inflight{function_name=\"next.dev\"} 1";
    let started = "gateway_function_invocation_started{function_name=\"next.dev\"} 1";
    next.answer_with(200, b"second").await;
    let counted = "gateway_function_invocation_total{code=\"200\",function_name=\"next.dev\"} 1";
    gateway
        .metrics_show("it is counted", |it| it.text.contains(counted) && it.text.contains(started))
        .await;
    assert!(!gateway.metrics().await.text.contains(inflight));
    let told = gateway.becomes(&id, "succeeded").await;
    assert!(told["reason"].is_null(), "{told}");
    assert_eq!(gateway.result(&id).await.text(), "first");
}

#[tokio::test]
async fn a_callback_may_queue_a_call_of_this_gateway() {
    let (_state, mut provider, gateway) = start().await;
    // The same function with the same body, under the same id, would be the same call.
    let callback = format!(
        "X-Callback-Url: http://127.0.0.1:{}/async-function/echo?n",
        gateway.address.port()
    );
    let id = gateway.queued("echo?n", &[&callback], "first").await;
    answer_first(provider.call().await).await;
    let mut next = provider.call().await;
    assert_eq!(next.head.target(), "/function/echo.fn?n");
    assert_eq!(next.body().await.unwrap(), b"first");
    let other = next.head.header("x-call-id").unwrap().to_owned();
    assert_ne!(other, id);
    check(&next, &other);
    next.answer_with(200, b"second").await;
    gateway.becomes(&id, "succeeded").await;
    gateway.becomes(&other, "succeeded").await;
    assert_eq!(gateway.result(&other).await.text(), "second");
}

#[tokio::test]
async fn a_function_that_fails_fails_the_callback() {
    let (_state, mut provider, gateway) = start().await;
    let port = gateway.address.port();
    let callback = format!("X-Callback-Url: http://127.0.0.1:{port}/function/next");
    let id = gateway.queued("echo", &[&callback], "").await;
    answer_first(provider.call().await).await;
    let mut next = provider.call().await;
    next.answer(418, "no").await;
    // Its connection would be used again.
    drop(next);
    let told = gateway.becomes(&id, "succeeded").await;
    assert!(told["reason"].as_str().unwrap().contains("answered with 418"), "{told}");
    // One that is not there is not asked for again.
    let callback = format!("X-Callback-Url: http://127.0.0.1:{port}/async-function/unknown");
    let id = gateway.queued("echo", &[&callback], "").await;
    answer_first(provider.call().await).await;
    let told = gateway.becomes(&id, "succeeded").await;
    assert!(told["reason"].as_str().unwrap().contains("answered with 404"), "{told}");
}

#[tokio::test]
async fn a_chain_of_callbacks_ends() {
    let (_state, mut provider, gateway) = start().await;
    let port = gateway.address.port();
    let callback = format!("X-Callback-Url: http://127.0.0.1:{port}/function/next");
    gateway.queued("echo", &[&callback, "X-Gateway-Callbacks: 7"], "").await;
    answer_first(provider.call().await).await;
    let mut eighth = provider.call().await;
    assert_eq!(eighth.head.header("x-gateway-callbacks"), Some("8"));
    eighth.answer(200, "").await;
    drop(eighth);
    // A smaller number beside the true one does not reset the count.
    let both = ["X-Gateway-Callbacks: 0", "X-Gateway-Callbacks: 8"];
    for count in [&both[1..], &both[..]] {
        let headers: Vec<&str> = [callback.as_str()].iter().chain(count).copied().collect();
        let id = gateway.queued("echo", &headers, "").await;
        answer_first(provider.call().await).await;
        let told = gateway.becomes(&id, "succeeded").await;
        assert!(told["reason"].as_str().unwrap().contains("8 callbacks"), "{told}");
    }
    for count in ["9", "-1", "many", ""] {
        let header = format!("X-Gateway-Callbacks: {count}");
        let refused = gateway.queue("echo", &[&header], "").await;
        assert_eq!(refused.status(), 508, "{refused}");
    }
    assert_eq!(provider.calls(), 2 + 2);
}

#[tokio::test]
async fn only_paths_of_functions_are_called() {
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
        let id = gateway.queued("echo", &[&callback], "").await;
        answer_first(provider.call().await).await;
        let told = gateway.becomes(&id, "succeeded").await;
        assert!(told["reason"].as_str().unwrap_or_default().contains(reason), "{path}: {told}");
    }
    eventually("nothing else was called", async || provider.calls() == 10).await;
}
