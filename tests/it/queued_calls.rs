//! Queued calls, from the client to the function, and the requests about them afterwards.

use crate::support::gateway::Gateway;
use crate::support::provider::Provider;
use crate::support::queue::{fast_retry, replying_with, with_embedded_queue};
use crate::support::webhook;

#[tokio::test]
async fn a_queued_call_reaches_the_function_like_a_synchronous_one() {
    let (state, mut provider) = (tempfile::tempdir().unwrap(), fast_retry().start());
    let gateway = with_embedded_queue(&provider, state.path()).start().await;
    let headers = [
        "Content-Type: text/x-mine",
        "X-Own: kept",
        "Connection: x-hop",
        "X-Hop: 1",
        "X-Delay-Seconds: 0",
    ];
    let accepted = gateway.send_async("echo/a%2Fb//c?x=%20&y", &headers, "a body").await;
    assert_eq!((accepted.status(), accepted.text()), (202, ""));
    assert!(accepted.header("x-served-by").unwrap().contains('/'));
    let id = accepted.header("x-call-id").unwrap();

    let mut call = provider.next_call().await;
    assert_eq!(call.read_body().await.unwrap(), b"a body");
    let head = &call.head;
    assert_eq!((head.method(), head.target()), ("POST", "/function/echo.fn/a%2Fb//c?x=%20&y"));
    for (name, expect) in [
        ("host", Some(provider.address.to_string().as_str())),
        ("x-call-id", Some(id)),
        ("x-start-time", accepted.header("x-start-time")),
        ("x-forwarded-host", Some("gateway.test")),
        ("content-type", Some("text/x-mine")),
        ("content-length", Some("6")),
        ("x-own", Some("kept")),
        ("x-delay-seconds", None),
        ("x-hop", None),
    ] {
        assert_eq!(head.header(name), expect, "{name}");
    }
    assert!(head.header("x-forwarded-for").unwrap().starts_with("127.0.0.1"));

    let running = gateway.state(id).await;
    assert_eq!((&running["state"], &running["attempts"]), (&"running".into(), &1.into()));
    assert_eq!(gateway.result(id).await.status(), 409);
    assert_eq!(gateway.cancel(id).await.status(), 409);

    let head = "HTTP/1.1 201 X\r\nContent-Type: text/x-own\r\nX-Two: 1\r\nX-Two: 2\r\n";
    let hop = "Connection: x-hop\r\nX-Hop: 1\r\nContent-Length: 9\r\n\r\n";
    call.connection.send(format!("{head}{hop}an answer")).await;
    let call_status = gateway.wait_for_state(id, "succeeded").await;
    assert_eq!((&call_status["callId"], &call_status["function"]), (&id.into(), &"echo.fn".into()));
    assert_eq!((&call_status["attempts"], &call_status["status"]), (&1.into(), &201.into()));
    let times =
        ["submittedAt", "startedAt", "finishedAt"].map(|name| call_status[name].as_str().unwrap());
    assert!(times.is_sorted(), "{times:?}");
    let result = gateway.result(id).await;
    assert_eq!((result.status(), result.text()), (200, "an answer"));
    assert_eq!(result.header("x-function-status"), Some("201"));
    assert_eq!(result.header("content-type"), Some("text/x-own"));
    assert_eq!(result.head.headers.iter().filter(|(name, _)| name == "x-two").count(), 2);
    assert_eq!((result.header("x-hop"), result.header("x-truncated")), (None, None));
    assert_eq!(gateway.cancel(id).await.status(), 409);
}

/// A directory with the secrets, while they are being replaced.
pub(crate) fn secret() -> tempfile::TempDir {
    let secrets = tempfile::tempdir().unwrap();
    std::fs::write(secrets.path().join("callback-secret"), "whsec_SmVmZQ==\n").unwrap();
    std::fs::write(secrets.path().join("callback-secret-previous"), "the old one\n").unwrap();
    secrets
}

#[tokio::test]
async fn a_failed_call_is_retried_and_sends_one_callback() {
    let (state, secrets) = (tempfile::tempdir().unwrap(), secret());
    let provider = replying_with(&[500, 500, 200], "what do ya want for nothing?");
    let mut receiver = Provider::manual();
    let gateway = with_embedded_queue(&provider, state.path())
        .var("secret_mount_path", secrets.path().display())
        .start()
        .await;
    let callback = format!("X-Callback-Url: {}/function/hook?a=b", receiver.url());
    let id = gateway.enqueue("echo", &[&callback], "").await;

    let mut call = receiver.next_call().await;
    let body = call.read_body().await.unwrap();
    assert_eq!(body, b"what do ya want for nothing?");
    webhook::assert_signed(&call.head, &id, &body, &[b"Jefe", b"the old one"]);
    assert_eq!((call.head.method(), call.head.target()), ("POST", "/function/hook?a=b"));
    for (name, expect) in [
        ("x-call-id", id.as_str()),
        ("x-function-name", "echo.fn"),
        ("x-function-status", "200"),
        ("x-retry", "3"),
        ("x-retry-max", "3"),
    ] {
        assert_eq!(call.head.header(name), Some(expect), "{name}");
    }
    call.send_response(202, b"").await;
    let call_status = gateway.wait_for_state(&id, "succeeded").await;
    assert_eq!((&call_status["attempts"], &call_status["status"]), (&3.into(), &200.into()));
    assert!(call_status["reason"].is_null(), "{call_status}");
    assert_eq!((provider.call_count(), receiver.call_count()), (3, 1));
}

#[tokio::test]
async fn a_refused_callback_does_not_fail_the_call() {
    let (state, provider) = (tempfile::tempdir().unwrap(), replying_with(&[200], "done"));
    let receiver = Provider::manual();
    let gateway = with_embedded_queue(&provider, state.path())
        .var("callback_allowlist", "auto")
        .start()
        .await;
    let callback = format!("X-Callback-Url: {}/function/hook", receiver.url());
    let id = gateway.enqueue("echo", &[&callback], "").await;
    let call_status = gateway.wait_for_state(&id, "succeeded").await;
    assert!(call_status["reason"].as_str().unwrap().contains("not allowed"), "{call_status}");
    assert_eq!((provider.call_count(), receiver.connection_count()), (1, 0));
    assert_eq!(gateway.result(&id).await.text(), "done");
}

/// Ids of the calls that `/system/calls` lists.
pub(crate) async fn listed(gateway: &Gateway, query: &str) -> Vec<String> {
    let response = gateway.get(&format!("/system/calls?{query}")).await;
    assert_eq!(response.status(), 200, "{response}");
    let calls = response.json();
    let calls = calls.as_array().unwrap().iter();
    calls.map(|call| call["callId"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn an_exhausted_call_is_dead_lettered_until_it_is_redriven() {
    let (state, provider) =
        (tempfile::tempdir().unwrap(), replying_with(&[503, 503, 503, 200], "said"));
    let gateway = with_embedded_queue(&provider, state.path()).start().await;
    let id = gateway.enqueue("echo", &[], "").await;
    let call_status = gateway.wait_for_state(&id, "failed").await;
    assert_eq!((&call_status["dead"], &call_status["attempts"]), (&true.into(), &3.into()));
    assert_eq!(call_status["status"], 503);
    let result = gateway.result(&id).await;
    assert_eq!((result.text(), result.header("x-function-status")), ("said", Some("503")));
    assert_eq!(listed(&gateway, "state=dead").await, [id.as_str()]);
    assert_eq!(listed(&gateway, "state=dead&function=other").await, [""; 0]);
    let queues = gateway.get("/system/queues").await.json();
    assert_eq!((&queues[0]["function"], &queues[0]["dead"]), (&"echo.fn".into(), &1.into()));

    let retry = format!("/system/calls/{id}/retry");
    assert_eq!(gateway.post(&retry, "").await.status(), 204);
    let call_status = gateway.wait_for_state(&id, "succeeded").await;
    assert_eq!(
        (&call_status["dead"], &call_status["attempts"]),
        (&serde_json::Value::Null, &1.into())
    );
    assert_eq!(provider.call_count(), 4);
    assert_eq!(listed(&gateway, "state=dead").await, [""; 0]);
    assert_eq!(gateway.post(&retry, "").await.status(), 409);
    assert_eq!(gateway.post("/system/calls/unknown/retry", "").await.status(), 404);
}

#[tokio::test]
async fn an_error_that_is_not_retryable_is_final() {
    let (state, provider) = (tempfile::tempdir().unwrap(), replying_with(&[400], "no"));
    let gateway = with_embedded_queue(&provider, state.path()).start().await;
    let id = gateway.enqueue("echo", &[], "").await;
    let call_status = gateway.wait_for_state(&id, "failed").await;
    assert_eq!((&call_status["attempts"], &call_status["status"]), (&1.into(), &400.into()));
    assert!(call_status["dead"].is_null(), "{call_status}");
    let result = gateway.result(&id).await;
    assert_eq!((result.text(), result.header("x-function-status")), ("no", Some("400")));
    assert_eq!(provider.call_count(), 1);
}

#[tokio::test]
async fn a_client_can_lower_the_number_of_attempts() {
    let (state, provider) = (tempfile::tempdir().unwrap(), replying_with(&[500], "no"));
    let gateway = with_embedded_queue(&provider, state.path()).start().await;
    let id = gateway.enqueue("echo", &["X-Max-Attempts: 1"], "").await;
    let call_status = gateway.wait_for_state(&id, "failed").await;
    assert_eq!((&call_status["attempts"], &call_status["dead"]), (&1.into(), &true.into()));
}
