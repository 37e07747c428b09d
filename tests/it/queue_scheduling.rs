//! When queued calls are executed, and when they are not: delay, expiry, cancellation, duplicates, fair scheduling.

use std::time::{Duration, Instant};

use crate::support::eventually;
use crate::support::provider::Provider;
use crate::support::queue::{fast_retry, replying_with, with_embedded_queue};

#[tokio::test]
async fn a_delayed_call_is_not_executed_before_its_time() {
    let (state, mut provider) = (tempfile::tempdir().unwrap(), fast_retry().start());
    let gateway = with_embedded_queue(&provider, state.path()).start().await;
    let began = Instant::now();
    let id = gateway.enqueue("echo", &["X-Delay-Seconds: 1"], "").await;
    let later = gateway.enqueue("echo", &["X-Delay-Seconds: 3600"], "").await;
    let call_status = gateway.state(&later).await;
    assert_eq!((&call_status["state"], &call_status["attempts"]), (&"queued".into(), &0.into()));
    assert!(
        call_status["nextAttemptAt"].as_str() > call_status["submittedAt"].as_str(),
        "{call_status}"
    );
    provider.next_call().await.respond(200, "").await;
    assert!(began.elapsed() >= Duration::from_secs(1), "made after {:?}", began.elapsed());
    let call_status = gateway.wait_for_state(&id, "succeeded").await;
    assert!(call_status["nextAttemptAt"].is_null(), "{call_status}");
}

#[tokio::test]
async fn a_cancelled_call_is_not_executed() {
    let (state, provider) = (tempfile::tempdir().unwrap(), replying_with(&[200], ""));
    let gateway = with_embedded_queue(&provider, state.path()).start().await;
    let cancelled = gateway.enqueue("echo", &["X-Delay-Seconds: 3", "X-Call-Id: mine"], "").await;
    // It would have been executed before this one.
    let behind = gateway.enqueue("echo", &["X-Delay-Seconds: 3"], "").await;
    assert_eq!(gateway.cancel(&cancelled).await.status(), 204);
    let call_status = gateway.state(&cancelled).await;
    assert_eq!((&call_status["state"], &call_status["attempts"]), (&"cancelled".into(), &0.into()));
    assert!(
        call_status["finishedAt"].is_string() && call_status["nextAttemptAt"].is_null(),
        "{call_status}"
    );
    gateway.wait_for_state(&behind, "succeeded").await;
    assert_eq!(provider.call_count(), 1);
    assert_eq!(gateway.state(&cancelled).await["state"], "cancelled");
    for id in [&cancelled, &behind] {
        assert_eq!(gateway.cancel(id).await.status(), 409);
    }
    assert_eq!(gateway.result(&cancelled).await.status(), 404);
    assert_eq!(gateway.cancel("unknown").await.status(), 404);
    // Operators use another path.
    let id = gateway.enqueue("echo", &["X-Delay-Seconds: 3600"], "").await;
    assert_eq!(gateway.request("DELETE", &format!("/system/calls/{id}"), &[]).await.status(), 204);
    assert_eq!(gateway.state(&id).await["state"], "cancelled");
}

#[tokio::test]
async fn an_expired_call_is_not_executed() {
    let (state, provider) = (tempfile::tempdir().unwrap(), replying_with(&[200], ""));
    let mut receiver = Provider::manual();
    let gateway = with_embedded_queue(&provider, state.path()).start().await;
    let callback = format!("X-Callback-Url: {}/function/hook", receiver.url());
    let headers = ["X-Delay-Seconds: 2", "X-Expires-Seconds: 1", &callback];
    let id = gateway.enqueue("echo", &headers, "").await;
    let mut call = receiver.next_call().await;
    assert_eq!(call.read_body().await.unwrap(), b"");
    assert_eq!(call.head.header("x-function-status"), Some("504"));
    assert_eq!(call.head.header("x-retry"), Some("0"));
    call.send_response(200, b"").await;
    let call_status = gateway.wait_for_state(&id, "failed").await;
    assert!(call_status["reason"].as_str().unwrap().contains("expired"), "{call_status}");
    assert!(call_status["status"].is_null() && call_status["startedAt"].is_null(), "{call_status}");
    assert_eq!(call_status["attempts"], 0);
    assert_eq!(provider.call_count(), 0);
}

#[tokio::test]
async fn a_call_with_an_idempotency_key_is_executed_once() {
    let (state, provider) = (tempfile::tempdir().unwrap(), replying_with(&[200], ""));
    let gateway = with_embedded_queue(&provider, state.path()).start().await;
    let first = gateway.enqueue("echo", &["Idempotency-Key: a b"], "").await;
    assert_eq!(gateway.enqueue("echo", &["Idempotency-Key: a b"], "").await, first);
    assert_eq!(gateway.enqueue("echo", &["X-Call-Id: mine"], "").await, "mine");
    assert_eq!(gateway.enqueue("echo", &["X-Call-Id: mine"], "").await, "mine");
    gateway.wait_for_state(&first, "succeeded").await;
    gateway.wait_for_state("mine", "succeeded").await;
    // A finished call is not executed again either.
    assert_eq!(gateway.enqueue("echo", &["Idempotency-Key: a b"], "").await, first);
    assert_eq!(gateway.enqueue("echo", &["X-Call-Id: mine"], "").await, "mine");
    // It would be executed after them.
    let last = gateway.enqueue("echo", &[], "").await;
    gateway.wait_for_state(&last, "succeeded").await;
    assert_eq!(provider.call_count(), 3);
}

#[tokio::test]
async fn a_hanging_function_does_not_block_others() {
    let (state, provider) = (
        tempfile::tempdir().unwrap(),
        fast_retry()
            .handler(async |mut call| {
                if call.head.target().contains("/stuck") {
                    std::future::pending::<()>().await;
                }
                call.respond(200, "").await;
                Some(call.connection)
            })
            .start(),
    );
    let gateway =
        with_embedded_queue(&provider, state.path()).var("max_inflight", "4").start().await;
    for _ in 0..20 {
        gateway.enqueue("stuck", &[], "").await;
    }
    eventually("some of them hang", async || provider.call_count() >= 2).await;
    for _ in 0..3 {
        let id = gateway.enqueue("swift", &[], "").await;
        gateway.wait_for_state(&id, "succeeded").await;
    }
}

#[tokio::test]
async fn a_different_call_with_the_same_id_is_executed_too() {
    let (state, mut provider) = (tempfile::tempdir().unwrap(), fast_retry().start());
    let gateway = with_embedded_queue(&provider, state.path()).start().await;
    let (mine, mut seen) = (["X-Call-Id: mine"], Vec::new());
    assert_eq!(gateway.enqueue("echo/a", &mine, "1").await, "mine");
    let mut ids = vec!["mine".to_owned()];
    for (target, body) in [("other/a", "1"), ("echo/b", "1"), ("echo/a", "2")] {
        let id = gateway.enqueue(target, &mine, body).await;
        assert!(!ids.contains(&id), "{id}");
        ids.push(id);
    }
    assert_eq!(gateway.enqueue("echo/a", &mine, "1").await, "mine");
    // A generated id is forwarded like a chosen one.
    let executed = gateway.enqueue("echo", &[], "first").await;
    let again = gateway.enqueue("echo", &[&format!("X-Call-Id: {executed}")], "second").await;
    assert_ne!(again, executed);
    for _ in 0..6 {
        let mut call = provider.next_call().await;
        seen.push(call.head.header("x-call-id").unwrap().to_owned());
        call.respond(200, "").await;
    }
    for id in ids.iter().chain([&executed, &again]) {
        gateway.wait_for_state(id, "succeeded").await;
    }
    seen.sort_unstable();
    let mut expect = vec![executed.as_str(), &executed, "mine", "mine", "mine", "mine"];
    expect.sort_unstable();
    assert_eq!(seen, expect);
    assert_eq!(provider.call_count(), 6);
}
