use std::time::Duration;

use axum::body::Body;
use http::{Method, StatusCode};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::support::{DEADLINE, Provider, request};

/// Next line of a followed log; `None` at its end.
async fn next_line(body: &mut Incoming) -> Option<Value> {
    let frame = timeout(DEADLINE, body.frame()).await.expect("a line in time")?;
    let data = frame.expect("the body was not aborted").into_data().unwrap();
    // Each line is flushed when it is written, so it arrives as one chunk.
    Some(serde_json::from_slice(&data).expect("one complete line"))
}

#[tokio::test]
async fn followed_logs_are_streamed_until_the_provider_stops() {
    let provider = Provider::start().await;
    let script = "sh -c 'echo $Http_Query >&2'";
    provider.deploy("f", script, json!({ "combine_output": "false" })).await;
    provider.get("/function/f?first").await;
    provider.wait_for_log("f", "Wrote ").await;
    let call = request(Method::GET, "/system/logs?name=f&tail=0&follow=1", Body::empty());
    let mut follow = provider.send(call).await;
    assert_eq!(follow.status(), StatusCode::OK);
    assert_eq!(follow.headers()["content-type"], "application/x-ndjson");

    provider.get("/function/f?second").await;
    let mut texts = Vec::new();
    while !texts.iter().any(|text: &String| text.starts_with("Wrote ")) {
        let line = next_line(follow.body_mut()).await.unwrap();
        assert_eq!((&line["name"], &line["namespace"]), (&json!("f"), &json!("openfaas-fn")));
        assert!(line["instance"].as_str().unwrap().starts_with("f-"));
        assert!(line["timestamp"].as_str().unwrap().ends_with('Z'));
        texts.push(line["text"].as_str().unwrap().to_owned());
    }
    assert!(texts.contains(&"second".to_owned()) && !texts.contains(&"first".to_owned()));
    provider.process.stop(Duration::from_secs(5)).await;
    assert_eq!(next_line(follow.body_mut()).await, None);
    provider.stop().await;
}

#[tokio::test]
async fn followed_logs_end_when_the_function_is_deleted() {
    let provider = Provider::start().await;
    provider.deploy("f", "cat", json!({})).await;
    let call = request(Method::GET, "/system/logs?name=f&follow=true", Body::empty());
    let mut follow = provider.send(call).await;
    let name = json!({ "functionName": "f" });
    provider.api(Method::DELETE, "/system/functions", name).await;
    assert_eq!(next_line(follow.body_mut()).await, None);
    provider.stop().await;
}

#[tokio::test]
async fn logs_are_selected_by_tail_since_and_instance() {
    let provider = Provider::start().await;
    provider.deploy("f", "echo", json!({})).await;
    provider.get("/function/f").await;
    provider.wait_for_log("f", "Wrote ").await;
    let all = provider.get("/system/logs?name=f&tail=-1&namespace=openfaas-fn").await;
    let lines: Vec<&str> = all.text().lines().collect();
    assert_eq!(lines.len(), 2);
    let first: Value = serde_json::from_str(lines[0]).unwrap();
    let instance = first["instance"].as_str().unwrap();
    let select = async |query: String| provider.get(&format!("/system/logs?name=f&{query}")).await;
    assert_eq!(select("tail=1".to_owned()).await.text().lines().collect::<Vec<_>>(), lines[1..]);
    assert_eq!(select(format!("instance={instance}")).await.text(), all.text());
    assert_eq!(select("instance=f-0".to_owned()).await.text(), "");
    assert_eq!(select("since=1h".to_owned()).await.text(), all.text());
    assert_eq!(select("since=2999-01-01T00:00:00Z".to_owned()).await.text(), "");
    for wrong in ["tail=x", "since=x", "follow=x"] {
        assert_eq!(select(wrong.to_owned()).await.status, StatusCode::BAD_REQUEST, "{wrong}");
    }
    assert_eq!(provider.get("/system/logs").await.status, StatusCode::BAD_REQUEST);
    assert_eq!(provider.get("/system/logs?name=g").await.status, StatusCode::NOT_FOUND);
    provider.stop().await;
}
