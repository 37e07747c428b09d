//! When queued calls are executed, and when they are not: delay, expiry, cancellation, duplicates, fair scheduling.

use std::time::{Duration, Instant};

use crate::support::eventually;
use crate::support::provider::Provider;
use crate::support::queue::{answering, patient, queueing};

#[tokio::test]
async fn a_delayed_call_is_not_made_before_its_time() {
    let (state, mut provider) = (tempfile::tempdir().unwrap(), patient().start());
    let gateway = queueing(&provider, state.path()).start().await;
    let began = Instant::now();
    let id = gateway.queued("echo", &["X-Delay-Seconds: 1"], "").await;
    let later = gateway.queued("echo", &["X-Delay-Seconds: 3600"], "").await;
    let told = gateway.state(&later).await;
    assert_eq!((&told["state"], &told["attempts"]), (&"queued".into(), &0.into()));
    assert!(told["nextAttemptAt"].as_str() > told["submittedAt"].as_str(), "{told}");
    provider.call().await.answer(200, "").await;
    assert!(began.elapsed() >= Duration::from_secs(1), "made after {:?}", began.elapsed());
    let told = gateway.becomes(&id, "succeeded").await;
    assert!(told["nextAttemptAt"].is_null(), "{told}");
}

#[tokio::test]
async fn a_call_that_is_taken_back_is_not_made() {
    let (state, provider) = (tempfile::tempdir().unwrap(), answering(&[200], ""));
    let gateway = queueing(&provider, state.path()).start().await;
    let cancelled = gateway.queued("echo", &["X-Delay-Seconds: 3", "X-Call-Id: mine"], "").await;
    // It would have come before this one.
    let behind = gateway.queued("echo", &["X-Delay-Seconds: 3"], "").await;
    assert_eq!(gateway.cancel(&cancelled).await.status(), 204);
    let told = gateway.state(&cancelled).await;
    assert_eq!((&told["state"], &told["attempts"]), (&"cancelled".into(), &0.into()));
    assert!(told["finishedAt"].is_string() && told["nextAttemptAt"].is_null(), "{told}");
    gateway.becomes(&behind, "succeeded").await;
    assert_eq!(provider.calls(), 1);
    assert_eq!(gateway.state(&cancelled).await["state"], "cancelled");
    for id in [&cancelled, &behind] {
        assert_eq!(gateway.cancel(id).await.status(), 409);
    }
    assert_eq!(gateway.result(&cancelled).await.status(), 404);
    assert_eq!(gateway.cancel("unknown").await.status(), 404);
    // Operators have a way of their own.
    let id = gateway.queued("echo", &["X-Delay-Seconds: 3600"], "").await;
    assert_eq!(gateway.ask("DELETE", &format!("/system/calls/{id}"), &[]).await.status(), 204);
    assert_eq!(gateway.state(&id).await["state"], "cancelled");
}

#[tokio::test]
async fn a_call_that_has_expired_is_not_made() {
    let (state, provider) = (tempfile::tempdir().unwrap(), answering(&[200], ""));
    let mut receiver = Provider::by_hand();
    let gateway = queueing(&provider, state.path()).start().await;
    let callback = format!("X-Callback-Url: {}/function/hook", receiver.url());
    let headers = ["X-Delay-Seconds: 2", "X-Expires-Seconds: 1", &callback];
    let id = gateway.queued("echo", &headers, "").await;
    let mut call = receiver.call().await;
    assert_eq!(call.body().await.unwrap(), b"");
    assert_eq!(call.head.header("x-function-status"), Some("504"));
    assert_eq!(call.head.header("x-retry"), Some("0"));
    call.answer_with(200, b"").await;
    let told = gateway.becomes(&id, "failed").await;
    assert!(told["reason"].as_str().unwrap().contains("expired"), "{told}");
    assert!(told["status"].is_null() && told["startedAt"].is_null(), "{told}");
    assert_eq!(told["attempts"], 0);
    assert_eq!(provider.calls(), 0);
}

#[tokio::test]
async fn a_call_that_is_queued_twice_is_made_once() {
    let (state, provider) = (tempfile::tempdir().unwrap(), answering(&[200], ""));
    let gateway = queueing(&provider, state.path()).start().await;
    let first = gateway.queued("echo", &["Idempotency-Key: a b"], "").await;
    assert_eq!(gateway.queued("echo", &["Idempotency-Key: a b"], "").await, first);
    assert_eq!(gateway.queued("echo", &["X-Call-Id: mine"], "").await, "mine");
    assert_eq!(gateway.queued("echo", &["X-Call-Id: mine"], "").await, "mine");
    gateway.becomes(&first, "succeeded").await;
    gateway.becomes("mine", "succeeded").await;
    // One that is over is not made again either.
    assert_eq!(gateway.queued("echo", &["Idempotency-Key: a b"], "").await, first);
    assert_eq!(gateway.queued("echo", &["X-Call-Id: mine"], "").await, "mine");
    // It would come behind them.
    let last = gateway.queued("echo", &[], "").await;
    gateway.becomes(&last, "succeeded").await;
    assert_eq!(provider.calls(), 3);
}

#[tokio::test]
async fn a_function_whose_calls_hang_holds_up_no_other() {
    let (state, provider) = (
        tempfile::tempdir().unwrap(),
        patient()
            .answering(async |mut call| {
                if call.head.target().contains("/stuck") {
                    std::future::pending::<()>().await;
                }
                call.answer(200, "").await;
                Some(call.wire)
            })
            .start(),
    );
    let gateway = queueing(&provider, state.path()).var("max_inflight", "4").start().await;
    for _ in 0..20 {
        gateway.queued("stuck", &[], "").await;
    }
    eventually("some of them hang", async || provider.calls() >= 2).await;
    for _ in 0..3 {
        let id = gateway.queued("swift", &[], "").await;
        gateway.becomes(&id, "succeeded").await;
    }
}

#[tokio::test]
async fn another_call_under_the_same_id_is_made_as_well() {
    let (state, mut provider) = (tempfile::tempdir().unwrap(), patient().start());
    let gateway = queueing(&provider, state.path()).start().await;
    let (mine, mut seen) = (["X-Call-Id: mine"], Vec::new());
    assert_eq!(gateway.queued("echo/a", &mine, "1").await, "mine");
    let mut ids = vec!["mine".to_owned()];
    for (target, body) in [("other/a", "1"), ("echo/b", "1"), ("echo/a", "2")] {
        let id = gateway.queued(target, &mine, body).await;
        assert!(!ids.contains(&id), "{id}");
        ids.push(id);
    }
    assert_eq!(gateway.queued("echo/a", &mine, "1").await, "mine");
    // An id that a gateway made is passed on like any other.
    let made = gateway.queued("echo", &[], "first").await;
    let again = gateway.queued("echo", &[&format!("X-Call-Id: {made}")], "second").await;
    assert_ne!(again, made);
    for _ in 0..6 {
        let mut call = provider.call().await;
        seen.push(call.head.header("x-call-id").unwrap().to_owned());
        call.answer(200, "").await;
    }
    for id in ids.iter().chain([&made, &again]) {
        gateway.becomes(id, "succeeded").await;
    }
    seen.sort_unstable();
    let mut expect = vec![made.as_str(), &made, "mine", "mine", "mine", "mine"];
    expect.sort_unstable();
    assert_eq!(seen, expect);
    assert_eq!(provider.calls(), 6);
}
