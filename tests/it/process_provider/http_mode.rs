use std::collections::BTreeSet;

use axum::body::Body;
use bytes::Bytes;
use http::{Method, StatusCode};
use http_body_util::BodyExt;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::support::{Provider, eventually, is_running, request, until_gone};

const REPLICA: &str =
    concat!("python3 ", env!("CARGO_MANIFEST_DIR"), "/tests/it/process_provider/replica.py");

/// Deploys a function of one replica, without waiting for it.
async fn deploy(provider: &Provider, name: &str, mut env: Value) {
    env["mode"] = json!("http");
    env["gate"] = json!(provider.path("gate"));
    provider.deploy(name, REPLICA, env).await;
}

/// The process that answers.
async fn pid(provider: &Provider, name: &str) -> u32 {
    provider.get(&format!("/function/{name}/")).await.text().parse().unwrap()
}

#[tokio::test]
async fn calls_are_passed_on_and_answers_back() {
    let provider = Provider::start().await;
    deploy(&provider, "f", json!({})).await;
    provider.until_available("f", 1).await;
    let mut call = request(Method::GET, "/function/f/seen/a%2Fb?x=%20y", Body::empty());
    call.headers_mut().insert("x-call-id", "id-1".parse().unwrap());
    call.headers_mut().insert("connection", "x-hop".parse().unwrap());
    call.headers_mut().insert("x-hop", "1".parse().unwrap());
    let answer = provider.request(call).await;
    assert!(answer.header("x-duration-seconds").is_some());
    assert_eq!(pid(&provider, "f").await, pid(&provider, "f").await);
    let seen = provider.get("/function/f/seen?x=%20y").await.json();
    assert_eq!(seen["path"], "/seen?x=%20y");
    assert_eq!(seen["headers"]["host"], "provider");
    assert_eq!(seen["headers"].get("x-hop"), None);

    let body: Bytes = (0..5_000_000_u32).map(|i| (i % 251) as u8).collect();
    let answer = provider.post("/function/f/echo", body.clone()).await;
    assert!(answer.body == body, "{} bytes came back", answer.body.len());
    provider.until_logged("f", "served /echo").await;
    provider.stop().await;
}

#[tokio::test]
async fn a_function_that_is_not_ready_is_answered_503() {
    let provider = Provider::start().await;
    deploy(&provider, "f", json!({ "ready_path": "/ready" })).await;
    provider.until_logged("f", "served /ready").await;
    assert_eq!(provider.status("f").await["availableReplicas"], 0);
    let answer = provider.get("/function/f").await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(answer.header("x-openfaas-internal"), Some("proxy"));
    assert!(answer.text().contains("no replica that is ready"), "{}", answer.text());
    std::fs::write(provider.path("gate"), "").unwrap();
    provider.until_available("f", 1).await;
    assert_eq!(provider.get("/function/f").await.status, StatusCode::OK);
    provider.stop().await;
}

#[tokio::test]
async fn calls_go_to_the_least_loaded_replica_and_beyond_max_inflight_to_none() {
    let provider = Provider::start().await;
    deploy(&provider, "f", json!({ "max_inflight": "1" })).await;
    provider.scale("f", 2).await;
    provider.until_available("f", 2).await;
    let full = async {
        eventually(async || {
            provider.logs("f").await.iter().filter(|line| *line == "waiting").count() == 2
        })
        .await;
        let answer = provider.get("/function/f").await;
        std::fs::write(provider.path("gate"), "").unwrap();
        answer
    };
    let (one, two, refused) =
        tokio::join!(provider.get("/function/f/wait"), provider.get("/function/f/wait"), full);
    assert_ne!(one.text(), two.text());
    assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS);
    assert!(refused.header("retry-after").is_some());
    for _ in 0..50 {
        // One after another, they never meet the limit.
        assert_eq!(provider.get("/function/f").await.status, StatusCode::OK);
    }
    provider.stop().await;
}

#[tokio::test]
async fn who_asks_how_a_function_is_may_wait_until_it_is_ready() {
    let provider = Provider::start().await;
    deploy(&provider, "f", json!({ "ready_path": "/ready" })).await;
    provider.until_logged("f", "served /ready").await;
    let ask = async |preference: &'static str| {
        let mut question = request(Method::GET, "/system/function/f", Body::empty());
        question.headers_mut().insert("prefer", preference.parse().unwrap());
        provider.request(question).await.json()["availableReplicas"].clone()
    };
    assert_eq!(ask("respond-async, wait=0").await, 0);
    assert_eq!(ask("wait=1").await, 0);
    let mut waits = Box::pin(ask("wait=25"));
    let early = tokio::time::timeout(std::time::Duration::from_millis(300), &mut waits).await;
    assert!(early.is_err(), "answered before it was ready");
    std::fs::write(provider.path("gate"), "").unwrap();
    assert_eq!(waits.await, 1);
    // Nothing comes of waiting for replicas that nobody wants.
    provider.scale("f", 0).await;
    assert_eq!(ask("wait=25").await, 0);
    provider.stop().await;
}

#[tokio::test]
async fn a_replica_that_dies_is_started_again() {
    let provider = Provider::start().await;
    deploy(&provider, "f", json!({})).await;
    provider.until_available("f", 1).await;
    let before = pid(&provider, "f").await;
    let answer = provider.get("/function/f/die").await;
    assert_eq!(answer.status, StatusCode::BAD_GATEWAY);
    // The function has seen the call: nobody may take this for one that can be made again without harm.
    assert_eq!(answer.header("x-openfaas-internal"), None);
    provider.until_logged("f", "Replica died: exit status: 1").await;
    provider.until_available("f", 1).await;
    assert_ne!(pid(&provider, "f").await, before);
    provider.stop().await;
}

/// The leader lives on, so that nobody but a caller notices that its server is gone.
#[tokio::test]
async fn a_call_that_one_replica_refuses_goes_to_another() {
    let provider = Provider::start().await;
    let command = format!("sh -c '{REPLICA} & wait $!; sleep 1000'");
    provider.deploy("f", &command, json!({ "mode": "http" })).await;
    provider.scale("f", 2).await;
    provider.until_available("f", 2).await;
    let first = pid(&provider, "f").await;
    for body in [Some("hello"), None] {
        let server = Pid::from_raw(first.try_into().unwrap()).unwrap();
        if body.is_some() {
            kill_process(server, Signal::KILL).unwrap();
            // With all its threads, which hold its sockets until they have ended.
            eventually(async || !std::path::Path::new(&format!("/proc/{first}")).exists()).await;
        }
        let answer = match body {
            Some(body) => provider.post("/function/f", body).await,
            None => provider.get("/function/f").await,
        };
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text());
        assert_ne!(answer.text(), first.to_string());
    }
    provider.until_available("f", 1).await;
    provider.process.stop(std::time::Duration::from_millis(100)).await;
    provider.stop().await;
}

#[tokio::test]
async fn a_function_cannot_speak_for_its_provider() {
    let provider = Provider::start().await;
    deploy(&provider, "f", json!({})).await;
    provider.until_available("f", 1).await;
    let answer = provider.get("/function/f/forged").await;
    assert_eq!((answer.status.as_u16(), answer.text()), (503, "mine"));
    assert_eq!(answer.header("x-openfaas-internal"), None);
    assert_eq!(answer.header("x-gateway-reason"), None);
    assert_eq!(answer.header("x-kept"), Some("forged"));
    provider.stop().await;
}

#[tokio::test]
async fn an_answer_that_breaks_off_breaks_off_for_the_caller_too() {
    let provider = Provider::start().await;
    deploy(&provider, "f", json!({})).await;
    provider.until_available("f", 1).await;
    let answer = provider.send(request(Method::GET, "/function/f/broken", Body::empty())).await;
    assert_eq!(answer.status(), StatusCode::OK);
    assert!(answer.into_body().collect().await.is_err());
    provider.stop().await;
}

#[tokio::test]
async fn scaling_down_ends_calls_first_and_to_zero_ends_all() {
    let provider = Provider::start().await;
    deploy(&provider, "f", json!({})).await;
    provider.until_available("f", 1).await;
    let scale = async {
        provider.until_logged("f", "waiting").await;
        provider.scale("f", 0).await;
        let answer = provider.get("/function/f").await;
        assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
        std::fs::write(provider.path("gate"), "").unwrap();
    };
    let (answer, ()) = tokio::join!(provider.get("/function/f/wait"), scale);
    assert_eq!(answer.status, StatusCode::OK);
    until_gone(answer.text().parse().unwrap()).await;
    assert_eq!(provider.status("f").await["availableReplicas"], 0);

    provider.scale("f", 3).await;
    provider.until_available("f", 3).await;
    provider.scale("f", 1).await;
    provider.until_available("f", 1).await;
    assert_eq!(provider.get("/function/f").await.status, StatusCode::OK);
    provider.stop().await;
}

#[tokio::test]
async fn an_update_is_called_once_it_is_ready_and_the_version_before_until_then() {
    let provider = Provider::start().await;
    deploy(&provider, "f", json!({})).await;
    provider.until_available("f", 1).await;
    let before = pid(&provider, "f").await;
    let update = json!({ "version": "two", "ready_path": "/ready" });
    deploy(&provider, "f", update).await;
    provider.until_logged("f", "served /ready").await;
    assert_eq!(pid(&provider, "f").await, before);
    assert_eq!(provider.status("f").await["availableReplicas"], 1);
    std::fs::write(provider.path("gate"), "").unwrap();
    eventually(async || provider.get("/function/f").await.text() == "two").await;
    until_gone(before).await;
    // Back to a process for each call: the replicas are not needed any more.
    provider.deploy("f", "echo three", json!({})).await;
    assert_eq!(provider.get("/function/f").await.text(), "three\n");
    provider.stop().await;
}

#[tokio::test]
async fn a_function_that_takes_too_long_is_answered_504() {
    let provider = Provider::start().await;
    deploy(&provider, "f", json!({ "exec_timeout": "1s" })).await;
    provider.until_available("f", 1).await;
    let answer = provider.get("/function/f/wait").await;
    assert_eq!(answer.status, StatusCode::GATEWAY_TIMEOUT);
    provider.stop().await;
}

#[tokio::test]
async fn usage_is_that_of_the_functions_processes() {
    let provider = Provider::start().await;
    deploy(&provider, "f", json!({})).await;
    provider.until_available("f", 1).await;
    assert_eq!(provider.status("f").await.get("usage"), None);
    provider.get("/system/function/f?usage=1").await;
    provider.get("/function/f/spin").await;
    let status = provider.get("/system/function/f?usage=true").await.json();
    assert!(status["usage"]["totalMemoryBytes"].as_f64().unwrap() > 1e6, "{status}");
    assert!(status["usage"]["cpu"].as_f64().unwrap() > 1.0, "{status}");
    provider.stop().await;
}

#[tokio::test]
async fn no_process_is_left_when_the_provider_has_stopped_or_the_function_is_deleted() {
    let provider = Provider::start().await;
    deploy(&provider, "kept", json!({})).await;
    deploy(&provider, "deleted", json!({})).await;
    provider.scale("kept", 2).await;
    provider.until_available("kept", 2).await;
    provider.until_available("deleted", 1).await;
    let deleted = pid(&provider, "deleted").await;
    provider.api(Method::DELETE, "/system/functions", json!({ "functionName": "deleted" })).await;
    until_gone(deleted).await;
    let recorded = || -> BTreeSet<u32> {
        let records = std::fs::read_dir(provider.path("state/running")).unwrap();
        records.map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect()
    };
    // A record goes right after its process.
    eventually(async || recorded().len() == 2).await;
    let running = recorded();
    provider.stop().await;
    assert!(running.iter().all(|pid| !is_running(*pid)));
}

#[tokio::test]
async fn a_replica_sees_a_secret_change_while_it_runs() {
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
    provider.until_available("f", 1).await;
    assert_eq!(provider.get("/function/f/secret").await.text(), "one");
    provider.api(Method::PUT, "/system/secrets", secret("two")).await;
    assert_eq!(provider.get("/function/f/secret").await.text(), "two");
    provider.stop().await;
}
