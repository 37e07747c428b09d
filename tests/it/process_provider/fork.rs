use std::convert::Infallible;

use axum::body::Body;
use bytes::Bytes;
use http::{Method, StatusCode};
use http_body_util::channel::Channel;
use serde_json::json;

use super::support::{Provider, eventually, request};

#[tokio::test]
async fn the_body_goes_in_and_the_output_comes_back() {
    let provider = Provider::start().await;
    provider.deploy("cat", "cat", json!({})).await;
    let answer = provider.post("/function/cat", "hello").await;
    assert_eq!((answer.status, answer.text()), (StatusCode::OK, "hello"));
    assert_eq!(answer.header("content-length"), Some("5"));
    assert!(answer.header("x-duration-seconds").unwrap().parse::<f64>().unwrap() < 30.0);
    assert_eq!(provider.get("/function/cat.openfaas-fn").await.status, StatusCode::OK);
    assert_eq!(provider.get("/function/cat.dev").await.status, StatusCode::NOT_FOUND);
    provider.stop().await;
}

#[tokio::test]
async fn large_bodies_stream_both_ways() {
    let provider = Provider::start().await;
    provider.deploy("cat", "cat", json!({})).await;
    provider.deploy("sum", "sha512sum", json!({})).await;
    let body: Bytes = (0..9_000_000_u32).map(|i| (i % 251) as u8).collect();
    let answer = provider.post("/function/cat", body.clone()).await;
    assert_eq!(answer.status, StatusCode::OK);
    assert!(answer.body == body, "{} bytes came back", answer.body.len());
    std::fs::write(provider.path("body"), &body).unwrap();
    let sum = std::process::Command::new("sha512sum").arg(provider.path("body")).output().unwrap();
    let answer = provider.post("/function/sum", body).await;
    assert_eq!(answer.text()[..128], String::from_utf8(sum.stdout).unwrap()[..128]);
    provider.stop().await;
}

#[tokio::test]
async fn a_call_is_described_in_a_clean_environment() {
    let provider = Provider::start().await;
    provider.deploy("env", "env", json!({ "colour": "blue" })).await;
    let mut call = request(Method::PUT, "/function/env/a%20b/c?x=1&y", Body::from("1234"));
    call.headers_mut().insert("x-call-id", "id-1".parse().unwrap());
    call.headers_mut().append("accept", "a".parse().unwrap());
    call.headers_mut().append("accept", "b".parse().unwrap());
    call.headers_mut().insert("path", "FAKE".parse().unwrap());
    let answer = provider.request(call).await;
    let lines: Vec<_> = answer.text().lines().collect();
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
    let answer = provider.get("/function/env").await;
    assert!(answer.text().contains("Http_Path=/\n"), "{}", answer.text());
    let (sender, body) = Channel::<Bytes, Infallible>::new(1);
    drop(sender);
    let answer = provider.post("/function/env/", Body::new(body)).await;
    assert!(answer.text().contains("Http_ContentLength=-1\n"), "{}", answer.text());
    assert!(answer.text().contains("Http_Transfer_Encoding=chunked\n"), "{}", answer.text());

    provider.deploy("env", "env", json!({ "cgi_headers": "false" })).await;
    let answer = provider.get("/function/env").await;
    assert!(!answer.text().contains("Http_"), "{}", answer.text());
    provider.stop().await;
}

#[tokio::test]
async fn open_files_are_limited_as_usual_whatever_the_provider_has_for_itself() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let own = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: own.maximum, ..own }).unwrap();
    let provider = Provider::start().await;
    // A moment later, since the limit is set on the process that runs.
    provider.deploy("f", "sh -c 'sleep 0.2; ulimit -Sn; ulimit -Hn'", json!({})).await;
    let maximum = own.maximum.map_or_else(|| "unlimited".to_owned(), |n| n.to_string());
    let soft = own.maximum.map_or(1024, |n| n.min(1024));
    assert_eq!(provider.get("/function/f").await.text(), format!("{soft}\n{maximum}\n"));
    provider.stop().await;
}

#[tokio::test]
async fn the_content_type_is_the_functions_or_the_requests_or_a_guess() {
    let provider = Provider::start().await;
    provider.deploy("cat", "cat", json!({})).await;
    provider.deploy("html", "cat", json!({ "content_type": "text/html" })).await;
    let typed = |name: &str| {
        let mut call = request(Method::POST, &format!("/function/{name}"), Body::from("{}"));
        call.headers_mut().insert("content-type", "application/json".parse().unwrap());
        call
    };
    let answer = provider.request(typed("cat")).await;
    assert_eq!(answer.header("content-type"), Some("application/json"));
    let answer = provider.request(typed("html")).await;
    assert_eq!(answer.header("content-type"), Some("text/html"));
    let answer = provider.post("/function/cat", "text").await;
    assert_eq!(answer.header("content-type"), Some("text/plain; charset=utf-8"));
    let answer = provider.post("/function/cat", &b"\xff\xfe"[..]).await;
    assert_eq!(answer.header("content-type"), Some("application/octet-stream"));
    provider.stop().await;
}

#[tokio::test]
async fn a_failing_process_is_answered_500_with_its_output() {
    let provider = Provider::start().await;
    let script = "sh -c 'echo out; echo err >&2; exit 3'";
    provider.deploy("both", script, json!({})).await;
    provider.deploy("apart", script, json!({ "combine_output": "false" })).await;
    provider.deploy("mute", "false", json!({})).await;
    let answer = provider.get("/function/both").await;
    assert_eq!((answer.status.as_u16(), answer.text()), (500, "out\nerr\n"));
    assert_eq!(answer.header("x-openfaas-internal"), None);
    let answer = provider.get("/function/apart").await;
    assert_eq!((answer.status.as_u16(), answer.text()), (500, "out\n"));
    provider.until_logged("apart", "err").await;
    let answer = provider.get("/function/mute").await;
    assert_eq!((answer.status.as_u16(), answer.text()), (500, "exit status: 1\n"));
    provider.stop().await;
}

#[tokio::test]
async fn each_call_leaves_its_lines_in_the_logs() {
    let provider = Provider::start().await;
    provider.deploy("echo", "echo hello", json!({ "write_debug": "true" })).await;
    provider.get("/function/echo").await;
    provider.until_logged("echo", "Wrote 6 Bytes - Duration: ").await;
    let logs = provider.logs("echo").await;
    assert!(logs.contains(&"Forking fprocess.".to_owned()) && logs.contains(&"hello".to_owned()));
    provider.stop().await;
}

#[tokio::test]
async fn input_that_is_not_read_does_not_hold_up_the_answer() {
    let provider = Provider::start().await;
    provider.deploy("early", "echo ok", json!({})).await;
    provider.deploy("late", "sh -c 'sleep 0.2; echo ok'", json!({})).await;
    provider.deploy("closed", "sh -c 'exec <&-; sleep 0.2; echo ok'", json!({})).await;
    for name in ["early", "late", "closed"] {
        let answer = provider.post(&format!("/function/{name}"), vec![b'x'; 6_000_000]).await;
        assert_eq!((answer.status.as_u16(), answer.text()), (200, "ok\n"), "{name}");
    }
    provider.stop().await;
}

#[tokio::test]
async fn input_is_passed_on_as_it_comes() {
    let provider = Provider::start().await;
    let first = provider.path("first");
    let script = format!("sh -c 'read line; echo $line > {}; cat'", first.display());
    provider.deploy("lines", &script, json!({})).await;
    let (mut sender, body) = Channel::<Bytes, Infallible>::new(1);
    let send = async {
        sender.send_data("one\n".into()).await.unwrap();
        // The second chunk is sent only when the process has told of the first.
        eventually(async || first.exists()).await;
        sender.send_data("two\n".into()).await.unwrap();
        drop(sender);
    };
    let (answer, ()) = tokio::join!(provider.post("/function/lines", Body::new(body)), send);
    assert_eq!(answer.text(), "two\n");
    assert_eq!(std::fs::read_to_string(first).unwrap(), "one\n");
    provider.stop().await;
}
