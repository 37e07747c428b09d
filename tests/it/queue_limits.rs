//! Queued calls: what is refused, how much is stored, and who has access.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::support::gateway::Gateway;
use crate::support::queue::{fast_retry, replying_with, with_embedded_queue};

#[tokio::test]
async fn without_a_queue_the_response_names_the_setting() {
    let provider = fast_retry().start();
    let gateway = Gateway::in_front_of(&provider).await;
    let response = gateway.send_async("echo", &[], "x").await;
    assert_eq!(response.status(), 501);
    assert!(response.text().contains("queue=embedded"), "{response}");
    for target in ["/async-function/some-id", "/system/queues", "/system/calls"] {
        assert_eq!(gateway.get(target).await.status(), 501, "{target}");
    }
}

#[tokio::test]
async fn other_methods_receive_405_with_allow() {
    let (state, provider) = (tempfile::tempdir().unwrap(), fast_retry().start());
    let gateway = with_embedded_queue(&provider, state.path()).start().await;
    let headers = [
        "Origin: http://page.test",
        "Access-Control-Request-Method: POST",
        "Access-Control-Request-Headers: x-own",
    ];
    for target in ["/async-function/echo", "/async-function/echo/", "/async-function/echo/a/b"] {
        let response = gateway.request("OPTIONS", target, &headers).await;
        assert_eq!(
            (response.status(), response.header("access-control-allow-origin")),
            (204, Some("*"))
        );
        assert!(response.header("access-control-allow-methods").unwrap().contains("POST"));
        let headers = response.header("access-control-allow-headers").unwrap();
        assert!(headers.contains("X-Delay-Seconds") && !headers.contains("x-own"), "{response}");
        let response = gateway.request("PUT", target, &[]).await;
        assert_eq!(response.status(), 405, "{response}");
        assert!(response.header("allow").unwrap().contains("POST"), "{response}");
    }
    for target in ["/async-function/unknown-id", "/async-function/unknown-id/result"] {
        assert_eq!(gateway.get(target).await.status(), 404);
    }
    assert_eq!(gateway.send_async("unknown", &[], "").await.status(), 404);
    for wish in [
        "X-Callback-Url: /relative",
        "X-Callback-Url: http://hooks:99999/",
        "X-Callback-Url: http://h/%zz",
        "X-Callback-Url: http://h/a%2?b",
        "X-Delay-Seconds: soon",
        "X-Max-Attempts: 0",
    ] {
        assert_eq!(gateway.send_async("echo", &[wish], "").await.status(), 400, "{wish}");
    }
    assert_eq!(provider.call_count(), 0);
}

#[tokio::test]
async fn a_body_that_is_too_large_is_refused() {
    let (state, provider) = (tempfile::tempdir().unwrap(), replying_with(&[200], ""));
    let gateway = with_embedded_queue(&provider, state.path())
        .var("max_async_body_bytes", "1000")
        .start()
        .await;
    let whole = "x".repeat(1000);
    gateway.enqueue("echo", &[], &whole).await;

    // Before the body is sent.
    let head = "POST /async-function/echo HTTP/1.1\r\nHost: g\r\n";
    let mut client = gateway.connect().await;
    let response = client.exchange(format!("{head}Content-Length: 1001\r\n\r\n")).await;
    assert_eq!(response.status(), 413, "{response}");
    let mut client = gateway.connect().await;
    client.send(format!("{head}Transfer-Encoding: chunked\r\n\r\n")).await;
    client.send_chunk(&whole).await;
    client.send_chunk("x").await;
    // A body without an end.
    assert_eq!(client.read_response().await.status(), 413);
}

#[tokio::test]
async fn chunked_bodies_use_the_budget_that_they_need() {
    let (state, provider) = (tempfile::tempdir().unwrap(), replying_with(&[200], ""));
    let gateway = with_embedded_queue(&provider, state.path()).start().await;
    let mut clients = Vec::new();
    for _ in 0..100 {
        let mut client = gateway.connect().await;
        let head = "POST /async-function/echo HTTP/1.1\r\nHost: g\r\n";
        client.send(format!("{head}Transfer-Encoding: chunked\r\n\r\n")).await;
        client.send_chunk("some").await;
        clients.push(client);
    }
    for mut client in clients {
        assert_eq!(client.exchange("0\r\n\r\n").await.status(), 202);
    }
}

#[tokio::test]
async fn cross_origin_pages_can_read_allowed_responses() {
    let (state, provider) = (tempfile::tempdir().unwrap(), replying_with(&[200], ""));
    let gateway = with_embedded_queue(&provider, state.path()).start().await;
    for (headers, allowed) in [(&["Origin: http://page.test"][..], Some("*")), (&[], None)] {
        let response = gateway.send_async("echo", headers, "").await;
        assert_eq!(response.status(), 202);
        assert_eq!(response.header("access-control-allow-origin"), allowed);
        let state = format!("/async-function/{}", response.header("x-call-id").unwrap());
        let response = gateway.request("GET", &state, headers).await;
        assert_eq!(response.header("access-control-allow-origin"), allowed);
        let response = gateway.request("GET", "/system/queues", headers).await;
        assert_eq!(response.header("access-control-allow-origin"), None);
    }
}

#[tokio::test]
async fn a_full_queue_is_a_503() {
    let (state, provider) = (tempfile::tempdir().unwrap(), fast_retry().start());
    let gateway = with_embedded_queue(&provider, state.path())
        .var("max_pending_calls", "1")
        .var("with_worker", "false")
        .start()
        .await;
    let id = gateway.enqueue("echo", &["Idempotency-Key: mine"], "").await;
    let response = gateway.send_async("echo", &[], "").await;
    assert_eq!(response.status(), 503, "{response}");
    assert!(response.header("retry-after").is_some(), "{response}");
    // A call that has its capacity keeps it.
    assert_eq!(gateway.enqueue("echo", &["Idempotency-Key: mine"], "").await, id);
    let queues = gateway.get("/system/queues").await.json();
    assert_eq!((&queues[0]["pending"], &queues[0]["running"]), (&1.into(), &0.into()));
    assert_eq!(gateway.cancel(&id).await.status(), 204);
    gateway.enqueue("echo", &[], "").await;
    assert_eq!(provider.call_count(), 0);
}

#[tokio::test]
async fn a_stored_response_is_truncated_at_its_limit() {
    let (state, provider) = (tempfile::tempdir().unwrap(), replying_with(&[200], "0123456789"));
    for (most, kept, truncated) in [("9", "012345678", Some("true")), ("10", "0123456789", None)] {
        let gateway = with_embedded_queue(&provider, state.path())
            .var("max_result_body_bytes", most)
            .start()
            .await;
        let id = gateway.enqueue("echo", &[], "").await;
        gateway.wait_for_state(&id, "succeeded").await;
        let result = gateway.result(&id).await;
        assert_eq!((result.text(), result.header("x-truncated")), (kept, truncated));
        assert!(gateway.terminate().await.success());
    }
}

#[tokio::test]
async fn stored_results_expire() {
    let (state, provider) = (tempfile::tempdir().unwrap(), replying_with(&[200], ""));
    let gateway =
        with_embedded_queue(&provider, state.path()).var("result_ttl", "1s").start().await;
    let id = gateway.enqueue("echo", &["Idempotency-Key: mine"], "").await;
    crate::support::eventually("the result expires", async || {
        gateway.get(&format!("/async-function/{id}")).await.status() == 404
    })
    .await;
    assert_eq!(gateway.result(&id).await.status(), 404);
    crate::support::eventually("its key belongs to another call", async || {
        gateway.enqueue("echo", &["Idempotency-Key: mine"], "").await != id
    })
    .await;
}

#[tokio::test]
async fn a_chosen_id_gives_no_access() {
    let (state, provider) = (tempfile::tempdir().unwrap(), replying_with(&[200], "secret"));
    std::fs::write(state.path().join("basic-auth-user"), "admin").unwrap();
    std::fs::write(state.path().join("basic-auth-password"), "s3cret").unwrap();
    let gateway = with_embedded_queue(&provider, state.path())
        .var("basic_auth", "true")
        .var("secret_mount_path", state.path().display())
        .start()
        .await;
    let admin = format!("Authorization: Basic {}", STANDARD.encode("admin:s3cret"));
    let admin: &[&str] = &[&admin];
    let made = gateway.enqueue("echo", &[], "").await;
    let chosen = gateway.enqueue("echo", &["X-Call-Id: chosen"], "").await;
    gateway.wait_for_state(&made, "succeeded").await;
    assert_eq!(gateway.result(&made).await.text(), "secret");

    let target = format!("/async-function/{chosen}");
    crate::support::eventually("the other call is executed", async || {
        gateway.request("GET", &target, admin).await.json()["state"] == "succeeded"
    })
    .await;
    let result = format!("{target}/result");
    for (method, target, expect) in [
        ("GET", target.as_str(), 200),
        ("GET", result.as_str(), 200),
        ("DELETE", target.as_str(), 409),
        ("GET", "/system/queues", 200),
        ("GET", "/system/calls", 200),
        ("POST", "/system/queues/purge?state=queued", 200),
        ("POST", "/system/calls/x/retry", 404),
        ("DELETE", "/system/calls/x", 404),
    ] {
        let response = gateway.request(method, target, &[]).await;
        assert_eq!(response.status(), 401, "{method} {target}: {response}");
        let response = gateway.request(method, target, admin).await;
        assert_eq!(response.status(), expect, "{method} {target}: {response}");
    }
}

#[tokio::test]
async fn an_empty_secret_stops_the_start() {
    let (state, provider) = (tempfile::tempdir().unwrap(), fast_retry().start());
    std::fs::write(state.path().join("callback-secret"), " \n").unwrap();
    let gateway = with_embedded_queue(&provider, state.path());
    let ended = gateway.var("secret_mount_path", state.path().display()).run_to_exit(&[]).await;
    let stderr = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("callback-secret is empty"), "{stderr}");
}

#[tokio::test]
async fn queue_metrics_count_operations_and_depths() {
    let (state, provider) = (tempfile::tempdir().unwrap(), replying_with(&[503, 200, 400], ""));
    let gateway = with_embedded_queue(&provider, state.path()).start().await;
    let id = gateway.enqueue("echo", &[], "").await;
    gateway.wait_for_state(&id, "succeeded").await;
    let dead = gateway.enqueue("echo", &["X-Max-Attempts: 1"], "").await;
    gateway.wait_for_state(&dead, "failed").await;
    gateway.enqueue("echo", &["X-Delay-Seconds: 3600"], "").await;
    let queue = "{queue_name=\"embedded\"}";
    let function = "{function_name=\"echo.fn\",queue_name=\"embedded\"}";
    let expect = [
        format!("queue_worker_messages_submitted_total{queue} 3"),
        format!("queue_worker_messages_processed_total{queue} 2"),
        format!("gateway_queue_attempts_total{queue} 3"),
        format!("gateway_queue_retries_total{queue} 1"),
        format!("gateway_queue_dead_letters_total{queue} 0"),
        "gateway_queue_publish_seconds_count 3".to_owned(),
        format!("queue_worker_pending_messages{function} 0"),
        format!("queue_worker_function_invocation_inflight{function} 0"),
        format!("gateway_queue_delayed_messages{function} 1"),
        format!("gateway_queue_dead_letter_messages{function} 0"),
        format!("gateway_queue_oldest_age_seconds{function} 0"),
    ];
    gateway
        .wait_for_metric("everything is counted", |metrics| {
            expect.iter().all(|line| metrics.text.lines().any(|shown| shown == line))
        })
        .await;
}
