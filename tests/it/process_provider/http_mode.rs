use std::collections::BTreeSet;

use axum::body::Body;
use bytes::Bytes;
use http::{Method, StatusCode};
use http_body_util::BodyExt;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::support::{Provider, eventually, is_running, request, wait_until_gone};

const REPLICA: &str =
    concat!("python3 ", env!("CARGO_MANIFEST_DIR"), "/tests/it/process_provider/replica.py");

/// Deploys a function of one replica, without waiting for readiness.
async fn deploy(provider: &Provider, name: &str, mut env: Value) {
    env["mode"] = json!("http");
    env["gate"] = json!(provider.path("gate"));
    provider.deploy(name, REPLICA, env).await;
}

/// The id of the process that responds.
async fn pid(provider: &Provider, name: &str) -> u32 {
    provider.get(&format!("/function/{name}/")).await.text().parse().unwrap()
}

#[tokio::test]
async fn requests_and_responses_are_forwarded() {
    let provider = Provider::start().await;
    deploy(&provider, "f", json!({})).await;
    provider.wait_until_available("f", 1).await;
    let mut call = request(Method::GET, "/function/f/seen/a%2Fb?x=%20y", Body::empty());
    call.headers_mut().insert("x-call-id", "id-1".parse().unwrap());
    call.headers_mut().insert("connection", "x-hop".parse().unwrap());
    call.headers_mut().insert("x-hop", "1".parse().unwrap());
    let response = provider.request(call).await;
    assert!(response.header("x-duration-seconds").is_some());
    assert_eq!(pid(&provider, "f").await, pid(&provider, "f").await);
    let seen = provider.get("/function/f/seen?x=%20y").await.json();
    assert_eq!(seen["path"], "/seen?x=%20y");
    assert_eq!(seen["headers"]["host"], "provider");
    assert_eq!(seen["headers"].get("x-hop"), None);

    let body: Bytes = (0..5_000_000_u32).map(|i| (i % 251) as u8).collect();
    let response = provider.post("/function/f/echo", body.clone()).await;
    assert!(response.body == body, "{} bytes came back", response.body.len());
    provider.wait_for_log("f", "served /echo").await;
    provider.stop().await;
}

#[tokio::test]
async fn a_function_that_is_not_ready_is_a_503() {
    let provider = Provider::start().await;
    deploy(&provider, "f", json!({ "ready_path": "/ready" })).await;
    provider.wait_for_log("f", "served /ready").await;
    assert_eq!(provider.status("f").await["availableReplicas"], 0);
    let response = provider.get("/function/f").await;
    assert_eq!(response.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(response.header("x-openfaas-internal"), Some("proxy"));
    assert!(response.text().contains("no ready replica"), "{}", response.text());
    std::fs::write(provider.path("gate"), "").unwrap();
    provider.wait_until_available("f", 1).await;
    assert_eq!(provider.get("/function/f").await.status, StatusCode::OK);
    provider.stop().await;
}

#[tokio::test]
async fn calls_go_to_the_least_loaded_replica_within_max_inflight() {
    let provider = Provider::start().await;
    deploy(&provider, "f", json!({ "max_inflight": "1" })).await;
    provider.scale("f", 2).await;
    provider.wait_until_available("f", 2).await;
    let full = async {
        eventually(async || {
            provider.logs("f").await.iter().filter(|line| *line == "waiting").count() == 2
        })
        .await;
        let response = provider.get("/function/f").await;
        std::fs::write(provider.path("gate"), "").unwrap();
        response
    };
    let (one, two, refused) =
        tokio::join!(provider.get("/function/f/wait"), provider.get("/function/f/wait"), full);
    assert_ne!(one.text(), two.text());
    assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS);
    assert!(refused.header("retry-after").is_some());
    for _ in 0..50 {
        // Sequential calls never reach the limit.
        assert_eq!(provider.get("/function/f").await.status, StatusCode::OK);
    }
    provider.stop().await;
}

#[tokio::test]
async fn a_status_query_can_wait_for_readiness() {
    let provider = Provider::start().await;
    deploy(&provider, "f", json!({ "ready_path": "/ready" })).await;
    provider.wait_for_log("f", "served /ready").await;
    let ask = async |preference: &'static str| {
        let mut question = request(Method::GET, "/system/function/f", Body::empty());
        question.headers_mut().insert("prefer", preference.parse().unwrap());
        provider.request(question).await.json()["availableReplicas"].clone()
    };
    assert_eq!(ask("respond-async, wait=0").await, 0);
    assert_eq!(ask("wait=1").await, 0);
    let mut waits = Box::pin(ask("wait=25"));
    let early = tokio::time::timeout(std::time::Duration::from_millis(300), &mut waits).await;
    assert!(early.is_err(), "responded before it was ready");
    std::fs::write(provider.path("gate"), "").unwrap();
    assert_eq!(waits.await, 1);
    // With zero desired replicas, waiting would be pointless.
    provider.scale("f", 0).await;
    assert_eq!(ask("wait=25").await, 0);
    provider.stop().await;
}

#[tokio::test]
async fn a_replica_that_dies_is_restarted() {
    let provider = Provider::start().await;
    deploy(&provider, "f", json!({})).await;
    provider.wait_until_available("f", 1).await;
    let before = pid(&provider, "f").await;
    let response = provider.get("/function/f/die").await;
    assert_eq!(response.status, StatusCode::BAD_GATEWAY);
    // The function has received the call, so the response must not be marked as safe to retry.
    assert_eq!(response.header("x-openfaas-internal"), None);
    provider.wait_for_log("f", "Replica exited: exit status: 1").await;
    provider.wait_until_available("f", 1).await;
    assert_ne!(pid(&provider, "f").await, before);
    provider.stop().await;
}

/// The process stays alive, so only a call can notice that its server is gone.
#[tokio::test]
async fn a_call_refused_by_one_replica_goes_to_another() {
    let provider = Provider::start().await;
    let command = format!("sh -c '{REPLICA} & wait $!; sleep 1000'");
    provider.deploy("f", &command, json!({ "mode": "http" })).await;
    provider.scale("f", 2).await;
    provider.wait_until_available("f", 2).await;
    let first = pid(&provider, "f").await;
    for body in [Some("hello"), None] {
        let server = Pid::from_raw(first.try_into().unwrap()).unwrap();
        if body.is_some() {
            kill_process(server, Signal::KILL).unwrap();
            // Wait for all threads, which keep the sockets open until they have ended.
            eventually(async || !std::path::Path::new(&format!("/proc/{first}")).exists()).await;
        }
        let response = match body {
            Some(body) => provider.post("/function/f", body).await,
            None => provider.get("/function/f").await,
        };
        assert_eq!(response.status, StatusCode::OK, "{}", response.text());
        assert_ne!(response.text(), first.to_string());
    }
    provider.wait_until_available("f", 1).await;
    provider.process.stop(std::time::Duration::from_millis(100)).await;
    provider.stop().await;
}

#[tokio::test]
async fn a_function_cannot_set_provider_headers() {
    let provider = Provider::start().await;
    deploy(&provider, "f", json!({})).await;
    provider.wait_until_available("f", 1).await;
    let response = provider.get("/function/f/forged").await;
    assert_eq!((response.status.as_u16(), response.text()), (503, "mine"));
    assert_eq!(response.header("x-openfaas-internal"), None);
    assert_eq!(response.header("x-gateway-reason"), None);
    assert_eq!(response.header("x-kept"), Some("forged"));
    provider.stop().await;
}

#[tokio::test]
async fn an_aborted_response_is_aborted_for_the_client() {
    let provider = Provider::start().await;
    deploy(&provider, "f", json!({})).await;
    provider.wait_until_available("f", 1).await;
    let response = provider.send(request(Method::GET, "/function/f/broken", Body::empty())).await;
    assert_eq!(response.status(), StatusCode::OK);
    assert!(response.into_body().collect().await.is_err());
    provider.stop().await;
}

#[tokio::test]
async fn scaling_down_waits_for_running_calls() {
    let provider = Provider::start().await;
    deploy(&provider, "f", json!({})).await;
    provider.wait_until_available("f", 1).await;
    let scale = async {
        provider.wait_for_log("f", "waiting").await;
        provider.scale("f", 0).await;
        let response = provider.get("/function/f").await;
        assert_eq!(response.status, StatusCode::SERVICE_UNAVAILABLE);
        std::fs::write(provider.path("gate"), "").unwrap();
    };
    let (response, ()) = tokio::join!(provider.get("/function/f/wait"), scale);
    assert_eq!(response.status, StatusCode::OK);
    wait_until_gone(response.text().parse().unwrap()).await;
    assert_eq!(provider.status("f").await["availableReplicas"], 0);

    provider.scale("f", 3).await;
    provider.wait_until_available("f", 3).await;
    provider.scale("f", 1).await;
    provider.wait_until_available("f", 1).await;
    assert_eq!(provider.get("/function/f").await.status, StatusCode::OK);
    provider.stop().await;
}

#[tokio::test]
async fn an_update_replaces_the_old_version_once_it_is_ready() {
    let provider = Provider::start().await;
    deploy(&provider, "f", json!({})).await;
    provider.wait_until_available("f", 1).await;
    let before = pid(&provider, "f").await;
    let update = json!({ "version": "two", "ready_path": "/ready" });
    deploy(&provider, "f", update).await;
    provider.wait_for_log("f", "served /ready").await;
    assert_eq!(pid(&provider, "f").await, before);
    assert_eq!(provider.status("f").await["availableReplicas"], 1);
    std::fs::write(provider.path("gate"), "").unwrap();
    eventually(async || provider.get("/function/f").await.text() == "two").await;
    wait_until_gone(before).await;
    // Back to one process per call: the replicas are no longer needed.
    provider.deploy("f", "echo three", json!({})).await;
    assert_eq!(provider.get("/function/f").await.text(), "three\n");
    provider.stop().await;
}

#[tokio::test]
async fn a_function_that_exceeds_its_timeout_is_a_504() {
    let provider = Provider::start().await;
    deploy(&provider, "f", json!({ "exec_timeout": "1s" })).await;
    provider.wait_until_available("f", 1).await;
    let response = provider.get("/function/f/wait").await;
    assert_eq!(response.status, StatusCode::GATEWAY_TIMEOUT);
    provider.stop().await;
}

#[tokio::test]
async fn usage_covers_the_processes_of_the_function() {
    let provider = Provider::start().await;
    deploy(&provider, "f", json!({})).await;
    provider.wait_until_available("f", 1).await;
    assert_eq!(provider.status("f").await.get("usage"), None);
    provider.get("/system/function/f?usage=1").await;
    provider.get("/function/f/spin").await;
    let status = provider.get("/system/function/f?usage=true").await.json();
    assert!(status["usage"]["totalMemoryBytes"].as_f64().unwrap() > 1e6, "{status}");
    assert!(status["usage"]["cpu"].as_f64().unwrap() > 1.0, "{status}");
    provider.stop().await;
}

#[tokio::test]
async fn no_process_is_left_after_a_stop_or_a_deletion() {
    let provider = Provider::start().await;
    deploy(&provider, "kept", json!({})).await;
    deploy(&provider, "deleted", json!({})).await;
    provider.scale("kept", 2).await;
    provider.wait_until_available("kept", 2).await;
    provider.wait_until_available("deleted", 1).await;
    let deleted = pid(&provider, "deleted").await;
    provider.api(Method::DELETE, "/system/functions", json!({ "functionName": "deleted" })).await;
    wait_until_gone(deleted).await;
    let recorded = || -> BTreeSet<u32> {
        let records = std::fs::read_dir(provider.path("state/running")).unwrap();
        records.map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect()
    };
    // A record is deleted right after its process.
    eventually(async || recorded().len() == 2).await;
    let running = recorded();
    provider.stop().await;
    assert!(running.iter().all(|pid| !is_running(*pid)));
}

#[tokio::test]
async fn a_running_replica_sees_a_changed_secret() {
    let provider = Provider::start().await;
    let secret = |value: &str| json!({ "name": "mine", "value": value });
    provider.api(Method::POST, "/system/secrets", secret("one")).await;
    let deployment = json!({
        "service": "f",
        "envProcess": REPLICA,
        "envVars": { "mode": "http" },
        "secrets": ["mine"],
    });
    provider.api(Method::POST, "/system/functions", deployment).await;
    provider.wait_until_available("f", 1).await;
    assert_eq!(provider.get("/function/f/secret").await.text(), "one");
    provider.api(Method::PUT, "/system/secrets", secret("two")).await;
    assert_eq!(provider.get("/function/f/secret").await.text(), "two");
    provider.stop().await;
}
