//! Requests as faas-cli and other clients send them, against `gateway up`.

use crate::support::connection::{Connection, Response};
use crate::support::workspace::{Up, Workspace};

const STACK: &str = "functions: {echo: {fprocess: cat}}";

/// Sends an API request with a JSON body.
async fn api(up: &Up<'_>, method: &str, target: &str, body: &serde_json::Value) -> Response {
    let body = body.to_string();
    let length = body.len();
    let request = format!(
        "{method} {target} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Content-Length: {length}\r\n\r\n{body}"
    );
    Connection::connect(up.gateway).await.exchange(request).await
}

#[tokio::test]
async fn a_namespace_can_be_named_in_the_body_only() {
    let workspace = Workspace::new();
    let up = workspace.up(STACK, &[]).await;
    let named = serde_json::json!({ "name": "dev", "labels": { "team": "a" } });
    let target = "/system/namespace/";
    assert_eq!(api(&up, "PUT", target, &named).await.status(), 404);
    assert_eq!(api(&up, "POST", target, &named).await.status(), 201);
    assert_eq!(api(&up, "POST", target, &named).await.status(), 409);
    let got = api(&up, "GET", target, &serde_json::json!({ "name": "dev" })).await;
    assert_eq!((got.status(), got.json()), (200, named.clone()));
    assert_eq!(api(&up, "PUT", target, &named).await.status(), 202);
    let listed = up.get("/system/namespaces", "").await.json();
    assert_eq!(listed, serde_json::json!(["dev", "openfaas-fn"]));
    for method in ["GET", "POST", "PUT", "DELETE"] {
        let response = api(&up, method, target, &serde_json::json!({})).await;
        assert_eq!(response.status(), 400, "{method}: {response}");
        assert!(response.text().contains("name is missing"), "{method}: {response}");
    }
    assert_eq!(api(&up, "DELETE", target, &named).await.status(), 202);
    assert_eq!(api(&up, "GET", target, &named).await.status(), 404);
    up.terminate_and_wait().await;
}

#[tokio::test]
async fn the_base64_value_of_a_secret_takes_precedence() {
    let workspace = Workspace::new();
    let up = workspace.up(STACK, &[]).await;
    let secret = serde_json::json!({ "name": "key", "value": "a?b", "rawValue": "YQBi" });
    let created = api(&up, "POST", "/system/secrets", &secret).await;
    assert_eq!(created.status(), 201, "{created}");
    let function = serde_json::json!({
        "service": "show", "envProcess": "sh -c 'od -An -tx1 $secrets_path/key'", "secrets": ["key"],
    });
    assert_eq!(api(&up, "POST", "/system/functions", &function).await.status(), 202);
    assert_eq!(up.post("/function/show", "").await.text().trim(), "61 00 62");
    up.terminate_and_wait().await;
}

#[tokio::test]
async fn invalid_log_queries_are_refused_with_a_reason() {
    let workspace = Workspace::new();
    let up = workspace.up(STACK, &[]).await;
    for (target, status, reason) in [
        ("/system/logs?name=nobody", 404, "function nobody"),
        ("/system/logs?name=echo&namespace=dev", 404, "function echo.dev"),
        ("/system/logs", 400, "names no function"),
        ("/system/logs?name=", 400, "names no function"),
        ("/system/logs?name=echo&tail=many", 400, "tail: \"many\" is not a whole number"),
        ("/system/logs?name=echo&tail=1.5", 400, "tail: \"1.5\""),
        ("/system/logs?name=echo&since=noon", 400, "since: \"noon\""),
    ] {
        let response = up.get(target, "").await;
        assert_eq!(response.status(), status, "{target}: {response}");
        assert!(response.text().contains(reason), "{target}: {response}");
    }
    for tail in ["", "&tail=-1", "&tail=10", "&tail="] {
        assert_eq!(up.get(&format!("/system/logs?name=echo{tail}"), "").await.status(), 200);
    }
    up.terminate_and_wait().await;
}

#[tokio::test]
async fn gateway_and_provider_report_the_commit() {
    let workspace = Workspace::new();
    let up = workspace.up(STACK, &[]).await;
    let info = up.get("/system/info", "").await.json();
    let repository = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(".git").exists();
    let sha = info["version"]["sha"].as_str().unwrap();
    assert!(sha.len() == 40 && sha.bytes().all(|b| b.is_ascii_hexdigit()) || !repository, "{info}");
    assert_eq!(info["provider"]["version"]["sha"], sha);
    up.terminate_and_wait().await;
}

#[tokio::test]
async fn every_function_has_the_faas_function_label() {
    let workspace = Workspace::new();
    let stack = "functions: {echo: {fprocess: cat}, other: {fprocess: cat, labels: {team: a}}}";
    let up = workspace.up(stack, &[]).await;
    let listed = up.get("/system/functions", "").await.json();
    for function in listed.as_array().unwrap() {
        assert_eq!(function["labels"]["faas_function"], function["name"]);
    }
    assert_eq!(up.get("/system/function/other", "").await.json()["labels"]["team"], "a");
    up.terminate_and_wait().await;
}
