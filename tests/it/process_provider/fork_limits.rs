//! Timeouts, concurrency limits and aborted requests of functions that fork a process for each request.

use std::time::Duration;

use axum::body::Body;
use http::{Method, StatusCode};
use http_body_util::BodyExt;
use serde_json::json;

use super::support::{Provider, is_running, pid_in, request, until_gone};

#[tokio::test]
async fn a_timeout_is_answered_504_and_kills_the_whole_group() {
    let provider = Provider::start().await;
    let path = provider.path("pid");
    let script = format!("sh -c 'sleep 1000 & echo $! > {}; wait'", path.display());
    provider.deploy("slow", &script, json!({ "exec_timeout": "300ms" })).await;
    let answer = provider.get("/function/slow").await;
    assert_eq!(answer.status, StatusCode::GATEWAY_TIMEOUT);
    assert!(answer.text().contains("exec_timeout of 300ms"), "{}", answer.text());
    until_gone(pid_in(&path).await).await;
    provider.until_logged("slow", "Killed: exec_timeout").await;
    provider.stop().await;
}

#[tokio::test]
async fn what_a_process_leaves_behind_ends_with_its_call() {
    let provider = Provider::start().await;
    let path = provider.path("pid");
    let script = format!("sh -c 'sleep 1000 >&- 2>&- & echo $! > {}; echo ok'", path.display());
    provider.deploy("littering", &script, json!({})).await;
    assert_eq!(provider.get("/function/littering").await.text(), "ok\n");
    until_gone(pid_in(&path).await).await;
    provider.stop().await;
}

#[tokio::test]
async fn a_caller_who_leaves_ends_the_process() {
    let provider = Provider::start().await;
    let path = provider.path("pid");
    let script = |rest: &str| format!("sh -c 'echo $$ > {}; {rest}'", path.display());
    provider.deploy("silent", &script("sleep 1000; true"), json!({})).await;
    let call = provider.send(request(Method::GET, "/function/silent", Body::empty()));
    tokio::select! {
        _ = call => panic!("it does not answer"),
        pid = pid_in(&path) => assert!(is_running(pid)),
    }
    // The call has been dropped, and its connection with it.
    until_gone(pid_in(&path).await).await;

    std::fs::remove_file(&path).unwrap();
    provider.deploy("talking", &script("yes"), json!({})).await;
    let call = request(Method::GET, "/function/talking", Body::empty());
    let mut answer = provider.send(call).await;
    assert_eq!(answer.status(), StatusCode::OK);
    assert!(
        answer.body_mut().frame().await.unwrap().unwrap().data_ref().unwrap().starts_with(b"y")
    );
    let pid = pid_in(&path).await;
    drop(answer);
    until_gone(pid).await;
    provider.stop().await;
}

#[tokio::test]
async fn a_caller_who_reads_nothing_does_not_stretch_the_deadline() {
    let provider = Provider::start().await;
    let path = provider.path("pid");
    let script = format!("sh -c 'echo $$ > {}; exec yes'", path.display());
    provider.deploy("f", &script, json!({ "exec_timeout": "300ms" })).await;
    let answer = provider.send(request(Method::GET, "/function/f", Body::empty())).await;
    until_gone(pid_in(&path).await).await;
    assert!(answer.into_body().collect().await.is_err());
    provider.stop().await;
}

#[tokio::test]
async fn a_process_that_fails_behind_the_held_back_output_breaks_the_answer_off() {
    let provider = Provider::start().await;
    provider.deploy("late", "sh -c 'head -c 2000000 /dev/zero; exit 3'", json!({})).await;
    let answer = provider.send(request(Method::GET, "/function/late", Body::empty())).await;
    assert_eq!(answer.status(), StatusCode::OK);
    assert!(answer.into_body().collect().await.is_err());
    provider.stop().await;
}

#[tokio::test]
async fn calls_beyond_max_inflight_are_answered_429_until_there_are_more_replicas() {
    let provider = Provider::start().await;
    let (started, gate) = (provider.path("pid"), provider.path("gate"));
    let script = format!(
        "sh -c 'echo $$ > {}; until [ -e {} ]; do sleep 0.02; done; echo ok'",
        started.display(),
        gate.display()
    );
    provider.deploy("one", &script, json!({ "max_inflight": "1" })).await;
    let busy = async {
        pid_in(&started).await;
        let answer = provider.get("/function/one").await;
        assert_eq!(answer.status, StatusCode::TOO_MANY_REQUESTS);
        assert!(answer.header("retry-after").is_some());
        provider.scale("one", 2).await;
        std::fs::remove_file(&started).unwrap();
        let second = async {
            pid_in(&started).await;
            std::fs::write(&gate, "").unwrap();
        };
        tokio::join!(provider.get("/function/one"), second).0
    };
    let (first, second) = tokio::join!(provider.get("/function/one"), busy);
    assert_eq!((first.text(), second.text()), ("ok\n", "ok\n"));
    provider.stop().await;
}

#[tokio::test]
async fn one_call_after_another_never_meets_max_inflight() {
    let provider = Provider::start().await;
    provider.deploy("cat", "cat", json!({ "max_inflight": "1" })).await;
    for _ in 0..50 {
        assert_eq!(provider.post("/function/cat", "x").await.text(), "x");
    }
    provider.stop().await;
}

#[tokio::test]
async fn a_function_without_replicas_is_not_called() {
    let provider = Provider::start().await;
    provider.deploy("cat", "cat", json!({})).await;
    provider.scale("cat", 0).await;
    let answer = provider.get("/function/cat").await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(answer.header("x-openfaas-internal"), Some("proxy"));
    assert!(answer.text().contains("scaled to zero"), "{}", answer.text());
    let status = provider.status("cat").await;
    assert_eq!((&status["replicas"], &status["availableReplicas"]), (&json!(0), &json!(0)));
    provider.scale("cat", 3).await;
    assert_eq!(provider.status("cat").await["availableReplicas"], 3);
    assert_eq!(provider.post("/function/cat", "x").await.text(), "x");
    provider.stop().await;
}

#[tokio::test]
async fn headers_beyond_what_an_environment_holds_are_answered_431() {
    let provider = Provider::start().await;
    provider.deploy("cat", "cat", json!({})).await;
    let mut call = request(Method::GET, "/function/cat", Body::empty());
    call.headers_mut().insert("x-large", "x".repeat(200_000).parse().unwrap());
    let answer = provider.request(call).await;
    assert_eq!(answer.status.as_u16(), 431, "{}", answer.text());
    provider.stop().await;
}

#[tokio::test]
async fn processes_that_run_when_the_provider_stops_are_asked_to_end() {
    let provider = Provider::start().await;
    let (pid, asked) = (provider.path("pid"), provider.path("asked"));
    let script = format!(
        "sh -c 'trap \"echo yes > {}; exit 0\" TERM; echo $$ > {}; while true; do sleep 0.02; done'",
        asked.display(),
        pid.display()
    );
    provider.deploy("patient", &script, json!({})).await;
    let stop = async {
        let pid = pid_in(&pid).await;
        provider.process.stop(Duration::from_secs(10)).await;
        assert!(!is_running(pid));
    };
    let (answer, ()) = tokio::join!(provider.get("/function/patient"), stop);
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(asked.exists());
    provider.stop().await;
}
