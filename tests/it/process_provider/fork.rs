use std::convert::Infallible;

use axum::body::Body;
use bytes::Bytes;
use http::{Method, StatusCode};
use http_body_util::channel::Channel;
use serde_json::json;

use super::support::{Provider, eventually, request};

#[tokio::test]
async fn the_request_body_is_stdin_and_stdout_is_the_response() {
    let provider = Provider::start().await;
    provider.deploy("cat", "cat", json!({})).await;
    let response = provider.post("/function/cat", "hello").await;
    assert_eq!((response.status, response.text()), (StatusCode::OK, "hello"));
    assert_eq!(response.header("content-length"), Some("5"));
    assert!(response.header("x-duration-seconds").unwrap().parse::<f64>().unwrap() < 30.0);
    assert_eq!(provider.get("/function/cat.openfaas-fn").await.status, StatusCode::OK);
    assert_eq!(provider.get("/function/cat.dev").await.status, StatusCode::NOT_FOUND);
    provider.stop().await;
}

#[tokio::test]
async fn large_bodies_are_streamed_in_both_directions() {
    let provider = Provider::start().await;
    provider.deploy("cat", "cat", json!({})).await;
    provider.deploy("sum", "sha512sum", json!({})).await;
    let body: Bytes = (0..9_000_000_u32).map(|i| (i % 251) as u8).collect();
    let response = provider.post("/function/cat", body.clone()).await;
    assert_eq!(response.status, StatusCode::OK);
    assert!(response.body == body, "{} bytes came back", response.body.len());
    std::fs::write(provider.path("body"), &body).unwrap();
    let sum = std::process::Command::new("sha512sum").arg(provider.path("body")).output().unwrap();
    let response = provider.post("/function/sum", body).await;
    assert_eq!(response.text()[..128], String::from_utf8(sum.stdout).unwrap()[..128]);
    provider.stop().await;
}

#[tokio::test]
async fn a_request_is_described_in_a_clean_environment() {
    let provider = Provider::start().await;
    provider.deploy("env", "env", json!({ "colour": "blue" })).await;
    let mut call = request(Method::PUT, "/function/env/a%20b/c?x=1&y", Body::from("1234"));
    call.headers_mut().insert("x-call-id", "id-1".parse().unwrap());
    call.headers_mut().append("accept", "a".parse().unwrap());
    call.headers_mut().append("accept", "b".parse().unwrap());
    call.headers_mut().insert("path", "FAKE".parse().unwrap());
    let response = provider.request(call).await;
    let lines: Vec<_> = response.text().lines().collect();
    for line in [
        "colour=blue",
        "Http_Method=PUT",
        "Http_Path=/a%20b/c",
        "Http_Query=x=1&y",
        "Http_Host=provider",
        "Http_ContentLength=4",
        "Http_Content_Length=4",
        "Http_X_Call_Id=id-1",
        "Http_Accept=a, b",
    ] {
        assert!(lines.contains(&line), "{line} is not in {lines:?}");
    }
    assert!(lines.iter().any(|line| line.starts_with("secrets_path=/")), "{lines:?}");
    assert!(!lines.iter().any(|line| line.starts_with("CARGO")), "{lines:?}");
    let response = provider.get("/function/env").await;
    assert!(response.text().contains("Http_Path=/\n"), "{}", response.text());
    let (sender, body) = Channel::<Bytes, Infallible>::new(1);
    drop(sender);
    let response = provider.post("/function/env/", Body::new(body)).await;
    assert!(response.text().contains("Http_ContentLength=-1\n"), "{}", response.text());
    assert!(response.text().contains("Http_Transfer_Encoding=chunked\n"), "{}", response.text());

    provider.deploy("env", "env", json!({ "cgi_headers": "false" })).await;
    let response = provider.get("/function/env").await;
    assert!(!response.text().contains("Http_"), "{}", response.text());
    provider.stop().await;
}

#[tokio::test]
async fn functions_have_the_usual_limit_of_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let own = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: own.maximum, ..own }).unwrap();
    let provider = Provider::start().await;
    // After a pause, because the limit is set on the running process.
    provider.deploy("f", "sh -c 'sleep 0.2; ulimit -Sn; ulimit -Hn'", json!({})).await;
    let maximum = own.maximum.map_or_else(|| "unlimited".to_owned(), |n| n.to_string());
    let soft = own.maximum.map_or(1024, |n| n.min(1024));
    assert_eq!(provider.get("/function/f").await.text(), format!("{soft}\n{maximum}\n"));
    provider.stop().await;
}

#[tokio::test]
async fn the_content_type_is_configured_copied_or_detected() {
    let provider = Provider::start().await;
    provider.deploy("cat", "cat", json!({})).await;
    provider.deploy("html", "cat", json!({ "content_type": "text/html" })).await;
    let typed = |name: &str| {
        let mut call = request(Method::POST, &format!("/function/{name}"), Body::from("{}"));
        call.headers_mut().insert("content-type", "application/json".parse().unwrap());
        call
    };
    let response = provider.request(typed("cat")).await;
    assert_eq!(response.header("content-type"), Some("application/json"));
    let response = provider.request(typed("html")).await;
    assert_eq!(response.header("content-type"), Some("text/html"));
    let response = provider.post("/function/cat", "text").await;
    assert_eq!(response.header("content-type"), Some("text/plain; charset=utf-8"));
    let response = provider.post("/function/cat", &b"\xff\xfe"[..]).await;
    assert_eq!(response.header("content-type"), Some("application/octet-stream"));
    provider.stop().await;
}

#[tokio::test]
async fn a_failing_process_is_a_500_with_its_output() {
    let provider = Provider::start().await;
    let script = "sh -c 'echo out; echo err >&2; exit 3'";
    provider.deploy("both", script, json!({})).await;
    provider.deploy("apart", script, json!({ "combine_output": "false" })).await;
    provider.deploy("mute", "false", json!({})).await;
    let response = provider.get("/function/both").await;
    assert_eq!((response.status.as_u16(), response.text()), (500, "out\nerr\n"));
    assert_eq!(response.header("x-openfaas-internal"), None);
    let response = provider.get("/function/apart").await;
    assert_eq!((response.status.as_u16(), response.text()), (500, "out\n"));
    provider.wait_for_log("apart", "err").await;
    let response = provider.get("/function/mute").await;
    assert_eq!((response.status.as_u16(), response.text()), (500, "exit status: 1\n"));
    provider.stop().await;
}

#[tokio::test]
async fn the_output_of_each_call_is_logged() {
    let provider = Provider::start().await;
    provider.deploy("echo", "echo hello", json!({ "write_debug": "true" })).await;
    provider.get("/function/echo").await;
    provider.wait_for_log("echo", "Wrote 6 Bytes - Duration: ").await;
    let logs = provider.logs("echo").await;
    assert!(logs.contains(&"Forking fprocess.".to_owned()) && logs.contains(&"hello".to_owned()));
    provider.stop().await;
}

#[tokio::test]
async fn unread_input_does_not_delay_the_response() {
    let provider = Provider::start().await;
    provider.deploy("early", "echo ok", json!({})).await;
    provider.deploy("late", "sh -c 'sleep 0.2; echo ok'", json!({})).await;
    provider.deploy("closed", "sh -c 'exec <&-; sleep 0.2; echo ok'", json!({})).await;
    for name in ["early", "late", "closed"] {
        let response = provider.post(&format!("/function/{name}"), vec![b'x'; 6_000_000]).await;
        assert_eq!((response.status.as_u16(), response.text()), (200, "ok\n"), "{name}");
    }
    provider.stop().await;
}

#[tokio::test]
async fn input_is_passed_on_as_it_arrives() {
    let provider = Provider::start().await;
    let first = provider.path("first");
    let script = format!("sh -c 'read line; echo $line > {}; cat'", first.display());
    provider.deploy("lines", &script, json!({})).await;
    let (mut sender, body) = Channel::<Bytes, Infallible>::new(1);
    let send = async {
        sender.send_data("one\n".into()).await.unwrap();
        // The second chunk is sent only after the process has reported the first.
        eventually(async || first.exists()).await;
        sender.send_data("two\n".into()).await.unwrap();
        drop(sender);
    };
    let (response, ()) = tokio::join!(provider.post("/function/lines", Body::new(body)), send);
    assert_eq!(response.text(), "two\n");
    assert_eq!(std::fs::read_to_string(first).unwrap(), "one\n");
    provider.stop().await;
}
