use axum::body::Body;
use http::{Method, StatusCode};
use serde_json::{Value, json};

use super::support::{Provider, request};

#[tokio::test]
async fn a_function_can_be_deployed_listed_updated_and_deleted() {
    let provider = Provider::start().await;
    let deployment = json!({
        "service": "figlet",
        "image": "figlet:1",
        "envProcess": "cat",
        "envVars": { "a": "b" },
        "constraints": ["node=1"],
        "labels": { "com.openfaas.scale.min": "2" },
        "annotations": { "topic": "t" },
        "limits": { "memory": "128Mi", "cpu": "100m" },
        "requests": { "memory": "64Mi" },
        "readOnlyRootFilesystem": true,
    });
    let response = provider.api(Method::PUT, "/system/functions", deployment.clone()).await;
    assert_eq!(response.status, StatusCode::NOT_FOUND);
    let response = provider.api(Method::POST, "/system/functions", deployment.clone()).await;
    assert_eq!(response.status, StatusCode::ACCEPTED);

    let status = provider.status("figlet").await;
    for (name, mut value) in deployment.as_object().unwrap().clone() {
        if name == "labels" {
            // Clients find the objects of a function by this label.
            value["faas_function"] = json!("figlet");
        }
        let name = if name == "service" { "name" } else { name.as_str() };
        assert_eq!(status[name], value, "{name}");
    }
    assert_eq!(status["namespace"], "openfaas-fn");
    assert_eq!((&status["replicas"], &status["availableReplicas"]), (&json!(2), &json!(2)));
    let created_at = status["createdAt"].as_str().unwrap();
    assert!(created_at.len() == 20 && created_at.ends_with('Z'), "{created_at}");
    let list = provider.get("/system/functions?namespace=openfaas-fn").await.json();
    assert_eq!(list, Value::Array(vec![status.clone()]));
    assert_eq!(provider.get("/system/functions?namespace=other").await.json(), json!([]));

    provider.scale("figlet", 5).await;
    let update = json!({ "service": "figlet", "image": "figlet:2", "envProcess": "tac" });
    let response = provider.api(Method::PUT, "/system/functions", update).await;
    assert_eq!(response.status, StatusCode::ACCEPTED);
    let updated = provider.status("figlet").await;
    assert_eq!((&updated["image"], &updated["replicas"]), (&json!("figlet:2"), &json!(5)));
    assert_eq!(updated["createdAt"], status["createdAt"]);
    assert_eq!(provider.post("/function/figlet", "1\n2\n").await.text(), "2\n1\n");

    let name = json!({ "functionName": "figlet", "namespace": "openfaas-fn" });
    let response = provider.api(Method::DELETE, "/system/functions", name.clone()).await;
    assert_eq!(response.status, StatusCode::ACCEPTED);
    let response = provider.api(Method::DELETE, "/system/functions", name).await;
    assert_eq!(response.status, StatusCode::NOT_FOUND);
    assert_eq!(provider.get("/system/function/figlet").await.status, StatusCode::NOT_FOUND);
    assert_eq!(provider.get("/function/figlet").await.status, StatusCode::NOT_FOUND);
    provider.stop().await;
}

#[tokio::test]
async fn an_invalid_deployment_is_refused_with_a_reason() {
    let provider = Provider::start().await;
    let refused = async |deployment: Value, reason: &str| {
        let response = provider.api(Method::POST, "/system/functions", deployment).await;
        assert_eq!(response.status, StatusCode::BAD_REQUEST, "{}", response.text());
        assert!(response.text().contains(reason), "{}", response.text());
    };
    refused(json!({ "service": "f", "image": "figlet" }), "commands, not images").await;
    refused(json!({ "service": "F", "envProcess": "cat" }), "\"F\" is not a name").await;
    refused(json!({ "service": "../x", "envProcess": "cat" }), "is not a name").await;
    refused(json!({ "service": "f", "envProcess": "no-such-program -x" }), "\"no-such-program\"")
        .await;
    refused(json!({ "service": "f", "envProcess": "cat", "namespace": "dev" }), "namespace dev")
        .await;
    refused(json!({ "service": "f", "envProcess": "cat", "secrets": ["a", "../b"] }), "\"../b\"")
        .await;
    let env = json!({ "exec_timeout": "soon" });
    refused(json!({ "service": "f", "envProcess": "cat", "envVars": env }), "exec_timeout").await;
    let env = json!({ "max_inflight": "many" });
    refused(json!({ "service": "f", "envProcess": "cat", "envVars": env }), "max_inflight").await;
    refused(json!({ "service": "f", "envProcess": ["cat"] }), "not the expected JSON").await;
    let labels = json!({ "com.openfaas.scale.min": "2000" });
    let env = json!({ "mode": "http" });
    refused(
        json!({ "service": "f", "envProcess": "cat", "envVars": env, "labels": labels }),
        "2000 replicas",
    )
    .await;
    assert_eq!(provider.get("/system/functions").await.json(), json!([]));
    provider.stop().await;
}

#[tokio::test]
async fn invalid_json_and_large_bodies_are_refused() {
    let provider = Provider::start().await;
    provider.deploy("f", "cat", json!({})).await;
    for (method, path) in [
        (Method::POST, "/system/functions"),
        (Method::PUT, "/system/functions"),
        (Method::DELETE, "/system/functions"),
        (Method::POST, "/system/scale-function/f"),
        (Method::POST, "/system/secrets"),
        (Method::POST, "/system/namespace/x"),
    ] {
        let response = provider.request(request(method.clone(), path, Body::from("{"))).await;
        assert_eq!(response.status, StatusCode::BAD_REQUEST, "{method} {path}");
        let large = Body::from(vec![b' '; (1 << 20) + 1]);
        let response = provider.request(request(method.clone(), path, large)).await;
        assert_eq!(response.status, StatusCode::PAYLOAD_TOO_LARGE, "{method} {path}");
    }
    provider.stop().await;
}

#[tokio::test]
async fn scaling_needs_a_function_and_a_count() {
    let provider = Provider::start().await;
    provider.deploy("f", "cat", json!({})).await;
    let scale = async |name: &str, body: Value| {
        let path = format!("/system/scale-function/{name}");
        provider.api(Method::POST, &path, body).await.status.as_u16()
    };
    assert_eq!(scale("f", json!({ "serviceName": "f", "replicas": 3 })).await, 202);
    assert_eq!(scale("f.openfaas-fn", json!({ "replicas": 4 })).await, 202);
    assert_eq!(scale("g", json!({ "serviceName": "g", "replicas": 3 })).await, 404);
    assert_eq!(scale("f?namespace=dev", json!({ "replicas": 3 })).await, 404);
    assert_eq!(scale("f", json!({ "serviceName": "f" })).await, 400);
    assert_eq!(scale("f", json!({ "serviceName": "f", "replicas": -1 })).await, 400);
    assert_eq!(provider.status("f").await["replicas"], 4);
    provider.stop().await;
}

#[tokio::test]
async fn namespaces_can_be_created_and_deleted_when_empty() {
    let provider = Provider::start().await;
    let namespace = async |method: Method, name: &str| {
        let body = json!({ "name": name, "labels": { "team": "a" } });
        provider.api(method, &format!("/system/namespace/{name}"), body).await.status.as_u16()
    };
    assert_eq!(provider.get("/system/namespaces").await.json(), json!(["openfaas-fn"]));
    assert_eq!(namespace(Method::POST, "dev").await, 201);
    assert_eq!(namespace(Method::POST, "dev").await, 409);
    assert_eq!(namespace(Method::POST, "Dev").await, 400);
    assert_eq!(namespace(Method::PUT, "dev").await, 202);
    assert_eq!(namespace(Method::PUT, "prod").await, 404);
    assert_eq!(provider.get("/system/namespaces").await.json(), json!(["dev", "openfaas-fn"]));
    let dev = provider.get("/system/namespace/dev").await.json();
    assert_eq!(dev, json!({ "name": "dev", "labels": { "team": "a" } }));
    assert_eq!(provider.get("/system/namespace/prod").await.status, StatusCode::NOT_FOUND);

    let deployment = json!({ "service": "f", "namespace": "dev", "envProcess": "cat" });
    let response = provider.api(Method::POST, "/system/functions", deployment).await;
    assert_eq!(response.status, StatusCode::ACCEPTED);
    assert_eq!(provider.post("/function/f.dev", "x").await.text(), "x");
    assert_eq!(provider.get("/function/f").await.status, StatusCode::NOT_FOUND);
    assert_eq!(provider.get("/system/function/f?namespace=dev").await.status, StatusCode::OK);

    assert_eq!(namespace(Method::DELETE, "dev").await, 409);
    let name = json!({ "functionName": "f", "namespace": "dev" });
    provider.api(Method::DELETE, "/system/functions", name).await;
    assert_eq!(namespace(Method::DELETE, "dev").await, 202);
    assert_eq!(namespace(Method::DELETE, "dev").await, 404);
    assert_eq!(namespace(Method::DELETE, "openfaas-fn").await, 409);
    provider.stop().await;
}

#[tokio::test]
async fn the_provider_reports_its_version_and_health() {
    let provider = Provider::start().await;
    let info = provider.get("/system/info").await.json();
    assert_eq!((&info["provider"], &info["orchestration"]), (&json!("process"), &json!("process")));
    assert!(info["version"]["release"].is_string() && info["version"]["sha"].is_string());
    let health = provider.get("/healthz").await;
    assert_eq!((health.status, health.text()), (StatusCode::OK, "OK"));
    assert_eq!(provider.get("/nowhere").await.status, StatusCode::NOT_FOUND);
    let response = provider.request(request(Method::POST, "/healthz", Body::empty())).await;
    assert_eq!(response.status, StatusCode::METHOD_NOT_ALLOWED);
    provider.stop().await;
}

#[tokio::test]
async fn unknown_resources_are_refused_with_a_text() {
    let provider = Provider::start().await;
    let response = provider.get("/nowhere").await;
    assert_eq!((response.status, response.text()), (StatusCode::NOT_FOUND, "no such path\n"));
    let response = provider.api(Method::PATCH, "/system/functions", json!({})).await;
    assert_eq!(response.status, StatusCode::METHOD_NOT_ALLOWED);
    assert!(response.header("allow").unwrap().contains("POST"), "{response:?}");
    assert!(!response.text().is_empty());
    provider.stop().await;
}
