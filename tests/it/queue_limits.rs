//! Queued calls: what is refused, how much is kept, and who may know.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::support::gateway::Gateway;
use crate::support::queue::{answering, patient, queueing};

#[tokio::test]
async fn without_a_queue_it_is_told_how_to_get_one() {
    let provider = patient().start();
    let gateway = Gateway::before(&provider).await;
    let answer = gateway.queue("echo", &[], "x").await;
    assert_eq!(answer.status(), 501);
    assert!(answer.text().contains("queue=embedded"), "{answer}");
    for target in ["/async-function/some-id", "/system/queues", "/system/calls"] {
        assert_eq!(gateway.get(target).await.status(), 501, "{target}");
    }
}

#[tokio::test]
async fn other_methods_are_told_what_there_is() {
    let (state, provider) = (tempfile::tempdir().unwrap(), patient().start());
    let gateway = queueing(&provider, state.path()).start().await;
    let headers = [
        "Origin: http://page.test",
        "Access-Control-Request-Method: POST",
        "Access-Control-Request-Headers: x-own",
    ];
    for target in ["/async-function/echo", "/async-function/echo/", "/async-function/echo/a/b"] {
        let answer = gateway.ask("OPTIONS", target, &headers).await;
        assert_eq!(
            (answer.status(), answer.header("access-control-allow-origin")),
            (204, Some("*"))
        );
        assert!(answer.header("access-control-allow-methods").unwrap().contains("POST"));
        let headers = answer.header("access-control-allow-headers").unwrap();
        assert!(headers.contains("X-Delay-Seconds") && !headers.contains("x-own"), "{answer}");
        let answer = gateway.ask("PUT", target, &[]).await;
        assert_eq!(answer.status(), 405, "{answer}");
        assert!(answer.header("allow").unwrap().contains("POST"), "{answer}");
    }
    for target in ["/async-function/unknown-id", "/async-function/unknown-id/result"] {
        assert_eq!(gateway.get(target).await.status(), 404);
    }
    assert_eq!(gateway.queue("unknown", &[], "").await.status(), 404);
    for wish in [
        "X-Callback-Url: /relative",
        "X-Callback-Url: http://hooks:99999/",
        "X-Callback-Url: http://h/%zz",
        "X-Callback-Url: http://h/a%2?b",
        "X-Delay-Seconds: soon",
        "X-Max-Attempts: 0",
    ] {
        assert_eq!(gateway.queue("echo", &[wish], "").await.status(), 400, "{wish}");
    }
    assert_eq!(provider.calls(), 0);
}

#[tokio::test]
async fn a_body_that_is_too_large_is_refused() {
    let (state, provider) = (tempfile::tempdir().unwrap(), answering(&[200], ""));
    let gateway =
        queueing(&provider, state.path()).var("max_async_body_bytes", "1000").start().await;
    let whole = "x".repeat(1000);
    gateway.queued("echo", &[], &whole).await;

    // Before any of it is sent.
    let head = "POST /async-function/echo HTTP/1.1\r\nHost: g\r\n";
    let mut caller = gateway.connect().await;
    let answer = caller.ask(format!("{head}Content-Length: 1001\r\n\r\n")).await;
    assert_eq!(answer.status(), 413, "{answer}");
    let mut caller = gateway.connect().await;
    caller.send(format!("{head}Transfer-Encoding: chunked\r\n\r\n")).await;
    caller.send_chunk(&whole).await;
    caller.send_chunk("x").await;
    // Without an end.
    assert_eq!(caller.answer().await.status(), 413);
}

#[tokio::test]
async fn bodies_of_unknown_length_take_the_room_that_they_need() {
    let (state, provider) = (tempfile::tempdir().unwrap(), answering(&[200], ""));
    let gateway = queueing(&provider, state.path()).start().await;
    let mut callers = Vec::new();
    for _ in 0..100 {
        let mut caller = gateway.connect().await;
        let head = "POST /async-function/echo HTTP/1.1\r\nHost: g\r\n";
        caller.send(format!("{head}Transfer-Encoding: chunked\r\n\r\n")).await;
        caller.send_chunk("some").await;
        callers.push(caller);
    }
    for mut caller in callers {
        assert_eq!(caller.ask("0\r\n\r\n").await.status(), 202);
    }
}

#[tokio::test]
async fn pages_of_others_may_read_what_they_may_ask() {
    let (state, provider) = (tempfile::tempdir().unwrap(), answering(&[200], ""));
    let gateway = queueing(&provider, state.path()).start().await;
    for (headers, allowed) in [(&["Origin: http://page.test"][..], Some("*")), (&[], None)] {
        let answer = gateway.queue("echo", headers, "").await;
        assert_eq!(answer.status(), 202);
        assert_eq!(answer.header("access-control-allow-origin"), allowed);
        let state = format!("/async-function/{}", answer.header("x-call-id").unwrap());
        let answer = gateway.ask("GET", &state, headers).await;
        assert_eq!(answer.header("access-control-allow-origin"), allowed);
        let answer = gateway.ask("GET", "/system/queues", headers).await;
        assert_eq!(answer.header("access-control-allow-origin"), None);
    }
}

#[tokio::test]
async fn a_queue_that_is_full_says_so() {
    let (state, provider) = (tempfile::tempdir().unwrap(), patient().start());
    let gateway = queueing(&provider, state.path())
        .var("max_pending_calls", "1")
        .var("with_worker", "false")
        .start()
        .await;
    let id = gateway.queued("echo", &["Idempotency-Key: mine"], "").await;
    let answer = gateway.queue("echo", &[], "").await;
    assert_eq!(answer.status(), 503, "{answer}");
    assert!(answer.header("retry-after").is_some(), "{answer}");
    // One that has its place keeps it.
    assert_eq!(gateway.queued("echo", &["Idempotency-Key: mine"], "").await, id);
    let queues = gateway.get("/system/queues").await.json();
    assert_eq!((&queues[0]["pending"], &queues[0]["running"]), (&1.into(), &0.into()));
    assert_eq!(gateway.cancel(&id).await.status(), 204);
    gateway.queued("echo", &[], "").await;
    assert_eq!(provider.calls(), 0);
}

#[tokio::test]
async fn so_much_of_an_answer_is_kept() {
    let (state, provider) = (tempfile::tempdir().unwrap(), answering(&[200], "0123456789"));
    for (most, kept, truncated) in [("9", "012345678", Some("true")), ("10", "0123456789", None)] {
        let gateway =
            queueing(&provider, state.path()).var("max_result_body_bytes", most).start().await;
        let id = gateway.queued("echo", &[], "").await;
        gateway.becomes(&id, "succeeded").await;
        let result = gateway.result(&id).await;
        assert_eq!((result.text(), result.header("x-truncated")), (kept, truncated));
        assert!(gateway.terminate().await.success());
    }
}

#[tokio::test]
async fn what_is_kept_is_forgotten_after_a_while() {
    let (state, provider) = (tempfile::tempdir().unwrap(), answering(&[200], ""));
    let gateway = queueing(&provider, state.path()).var("result_ttl", "1s").start().await;
    let id = gateway.queued("echo", &["Idempotency-Key: mine"], "").await;
    crate::support::eventually("it is forgotten", async || {
        gateway.get(&format!("/async-function/{id}")).await.status() == 404
    })
    .await;
    assert_eq!(gateway.result(&id).await.status(), 404);
    crate::support::eventually("its key stands for another", async || {
        gateway.queued("echo", &["Idempotency-Key: mine"], "").await != id
    })
    .await;
}

#[tokio::test]
async fn an_id_that_can_be_guessed_opens_nothing() {
    let (state, provider) = (tempfile::tempdir().unwrap(), answering(&[200], "secret"));
    std::fs::write(state.path().join("basic-auth-user"), "admin").unwrap();
    std::fs::write(state.path().join("basic-auth-password"), "s3cret").unwrap();
    let gateway = queueing(&provider, state.path())
        .var("basic_auth", "true")
        .var("secret_mount_path", state.path().display())
        .start()
        .await;
    let admin = format!("Authorization: Basic {}", STANDARD.encode("admin:s3cret"));
    let admin: &[&str] = &[&admin];
    let made = gateway.queued("echo", &[], "").await;
    let chosen = gateway.queued("echo", &["X-Call-Id: chosen"], "").await;
    gateway.becomes(&made, "succeeded").await;
    assert_eq!(gateway.result(&made).await.text(), "secret");

    let target = format!("/async-function/{chosen}");
    crate::support::eventually("the other is made", async || {
        gateway.ask("GET", &target, admin).await.json()["state"] == "succeeded"
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
        let answer = gateway.ask(method, target, &[]).await;
        assert_eq!(answer.status(), 401, "{method} {target}: {answer}");
        let answer = gateway.ask(method, target, admin).await;
        assert_eq!(answer.status(), expect, "{method} {target}: {answer}");
    }
}

#[tokio::test]
async fn a_secret_that_is_empty_is_refused_at_the_start() {
    let (state, provider) = (tempfile::tempdir().unwrap(), patient().start());
    std::fs::write(state.path().join("callback-secret"), " \n").unwrap();
    let gateway = queueing(&provider, state.path());
    let ended = gateway.var("secret_mount_path", state.path().display()).output(&[]).await;
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(1), "{said}");
    assert!(said.contains("callback-secret is empty"), "{said}");
}

#[tokio::test]
async fn what_the_queue_does_and_holds_is_counted() {
    let (state, provider) = (tempfile::tempdir().unwrap(), answering(&[503, 200, 400], ""));
    let gateway = queueing(&provider, state.path()).start().await;
    let id = gateway.queued("echo", &[], "").await;
    gateway.becomes(&id, "succeeded").await;
    let dead = gateway.queued("echo", &["X-Max-Attempts: 1"], "").await;
    gateway.becomes(&dead, "failed").await;
    gateway.queued("echo", &["X-Delay-Seconds: 3600"], "").await;
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
        .metrics_show("all is counted", |metrics| {
            expect.iter().all(|line| metrics.text.lines().any(|it| it == line))
        })
        .await;
}
