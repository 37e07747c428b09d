//! Timeouts, concurrency limits and aborted requests of functions that fork a process for each request.

use std::time::Duration;

use axum::body::Body;
use http::{Method, StatusCode};
use http_body_util::BodyExt;
use serde_json::json;

use super::support::{Provider, is_running, read_pid, request, wait_until_gone};

#[tokio::test]
async fn a_timeout_is_a_504_and_kills_the_process_group() {
    let provider = Provider::start().await;
    let path = provider.path("pid");
    let script = format!("sh -c 'sleep 1000 & echo $! > {}; wait'", path.display());
    provider.deploy("slow", &script, json!({ "exec_timeout": "300ms" })).await;
    let response = provider.get("/function/slow").await;
    assert_eq!(response.status, StatusCode::GATEWAY_TIMEOUT);
    assert!(response.text().contains("exec_timeout of 300ms"), "{}", response.text());
    wait_until_gone(read_pid(&path).await).await;
    provider.wait_for_log("slow", "Killed: exec_timeout").await;
    provider.stop().await;
}

#[tokio::test]
async fn background_processes_end_with_their_call() {
    let provider = Provider::start().await;
    let path = provider.path("pid");
    let script = format!("sh -c 'sleep 1000 >&- 2>&- & echo $! > {}; echo ok'", path.display());
    provider.deploy("littering", &script, json!({})).await;
    assert_eq!(provider.get("/function/littering").await.text(), "ok\n");
    wait_until_gone(read_pid(&path).await).await;
    provider.stop().await;
}

#[tokio::test]
async fn a_disconnect_ends_the_process() {
    let provider = Provider::start().await;
    let path = provider.path("pid");
    let script = |rest: &str| format!("sh -c 'echo $$ > {}; {rest}'", path.display());
    provider.deploy("silent", &script("sleep 1000; true"), json!({})).await;
    let call = provider.send(request(Method::GET, "/function/silent", Body::empty()));
    tokio::select! {
        _ = call => panic!("the server does not respond"),
        pid = read_pid(&path) => assert!(is_running(pid)),
    }
    // The call has been dropped together with its connection.
    wait_until_gone(read_pid(&path).await).await;

    std::fs::remove_file(&path).unwrap();
    provider.deploy("talking", &script("yes"), json!({})).await;
    let call = request(Method::GET, "/function/talking", Body::empty());
    let mut response = provider.send(call).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert!(
        response.body_mut().frame().await.unwrap().unwrap().data_ref().unwrap().starts_with(b"y")
    );
    let pid = read_pid(&path).await;
    drop(response);
    wait_until_gone(pid).await;
    provider.stop().await;
}

#[tokio::test]
async fn a_client_that_does_not_read_does_not_extend_the_timeout() {
    let provider = Provider::start().await;
    let path = provider.path("pid");
    let script = format!("sh -c 'echo $$ > {}; exec yes'", path.display());
    provider.deploy("f", &script, json!({ "exec_timeout": "300ms" })).await;
    let response = provider.send(request(Method::GET, "/function/f", Body::empty())).await;
    wait_until_gone(read_pid(&path).await).await;
    assert!(response.into_body().collect().await.is_err());
    provider.stop().await;
}

#[tokio::test]
async fn a_process_that_fails_after_the_buffered_output_aborts_the_response() {
    let provider = Provider::start().await;
    provider.deploy("late", "sh -c 'head -c 2000000 /dev/zero; exit 3'", json!({})).await;
    let response = provider.send(request(Method::GET, "/function/late", Body::empty())).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert!(response.into_body().collect().await.is_err());
    provider.stop().await;
}

#[tokio::test]
async fn calls_above_max_inflight_are_a_429_until_there_are_more_replicas() {
    let provider = Provider::start().await;
    let (started, gate) = (provider.path("pid"), provider.path("gate"));
    let script = format!(
        "sh -c 'echo $$ > {}; until [ -e {} ]; do sleep 0.02; done; echo ok'",
        started.display(),
        gate.display()
    );
    provider.deploy("one", &script, json!({ "max_inflight": "1" })).await;
    let busy = async {
        read_pid(&started).await;
        let response = provider.get("/function/one").await;
        assert_eq!(response.status, StatusCode::TOO_MANY_REQUESTS);
        assert!(response.header("retry-after").is_some());
        provider.scale("one", 2).await;
        std::fs::remove_file(&started).unwrap();
        let second = async {
            read_pid(&started).await;
            std::fs::write(&gate, "").unwrap();
        };
        tokio::join!(provider.get("/function/one"), second).0
    };
    let (first, second) = tokio::join!(provider.get("/function/one"), busy);
    assert_eq!((first.text(), second.text()), ("ok\n", "ok\n"));
    provider.stop().await;
}

#[tokio::test]
async fn sequential_calls_never_exceed_max_inflight() {
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
    let response = provider.get("/function/cat").await;
    assert_eq!(response.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(response.header("x-openfaas-internal"), Some("proxy"));
    assert!(response.text().contains("scaled to zero"), "{}", response.text());
    let status = provider.status("cat").await;
    assert_eq!((&status["replicas"], &status["availableReplicas"]), (&json!(0), &json!(0)));
    provider.scale("cat", 3).await;
    assert_eq!(provider.status("cat").await["availableReplicas"], 3);
    assert_eq!(provider.post("/function/cat", "x").await.text(), "x");
    provider.stop().await;
}

#[tokio::test]
async fn headers_too_large_for_an_environment_are_a_431() {
    let provider = Provider::start().await;
    provider.deploy("cat", "cat", json!({})).await;
    let mut call = request(Method::GET, "/function/cat", Body::empty());
    call.headers_mut().insert("x-large", "x".repeat(200_000).parse().unwrap());
    let response = provider.request(call).await;
    assert_eq!(response.status.as_u16(), 431, "{}", response.text());
    provider.stop().await;
}

#[tokio::test]
async fn running_processes_are_terminated_when_the_provider_stops() {
    let provider = Provider::start().await;
    let (pid, asked) = (provider.path("pid"), provider.path("asked"));
    let script = format!(
        "sh -c 'trap \"echo yes > {}; exit 0\" TERM; echo $$ > {}; while true; do sleep 0.02; done'",
        asked.display(),
        pid.display()
    );
    provider.deploy("patient", &script, json!({})).await;
    let stop = async {
        let pid = read_pid(&pid).await;
        provider.process.stop(Duration::from_secs(10)).await;
        assert!(!is_running(pid));
    };
    let (response, ()) = tokio::join!(provider.get("/function/patient"), stop);
    assert_eq!(response.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(asked.exists());
    provider.stop().await;
}
