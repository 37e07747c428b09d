//! The API where it does more than pass on: the list with its counts, logs, direct calls, readiness.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::support::eventually;
use crate::support::gateway::{Builder, Gateway};
use crate::support::provider::{Provider, always};
use crate::support::wire::{Wire, get};

const LISTED: &str = r#"[{"name":"echo","namespace":"fn","image":"i","replicas":1,
    "odd":{"big":18446744073709551615,"small":-0.1,"text":"\u00e9\"\\/","none":null,"z":1,"a":[true,[]]},
    "invocationCount":0,"createdAt":"2026-01-01T00:00:00Z"}]"#;

/// A gateway whose Prometheus is at `url`.
fn with_prometheus(provider: &Provider, url: &str) -> Builder {
    let (host, port) = url.trim_start_matches("http://").split_once(':').unwrap();
    Gateway::builder()
        .provider(provider)
        .var("faas_prometheus_host", host)
        .var("faas_prometheus_port", port)
}

async fn list(gateway: &Gateway) -> Value {
    let answer = gateway.get("/system/functions").await;
    assert_eq!(answer.status(), 200, "{answer}");
    answer.json()
}

#[tokio::test]
async fn the_list_has_counts_from_prometheus() {
    let provider = Provider::builder().lists(LISTED).start();
    let prometheus = Provider::builder()
        .api(|head, _| {
            assert!(head.target().starts_with("/api/v1/query?query="), "{}", head.target());
            let sample =
                r#"{"metric":{"function_name":"echo.fn"},"value":[1700000000.123,"1234"]}"#;
            let answer = r#"{"status":"success","data":{"resultType":"vector","result":[SAMPLE]}}"#;
            Some((200, answer.replace("SAMPLE", sample)))
        })
        .start();
    let gateway = with_prometheus(&provider, &prometheus.url()).start().await;
    assert_eq!(list(&gateway).await[0]["invocationCount"], json!(1234));
}

#[tokio::test]
async fn the_list_keeps_what_the_gateway_does_not_know() {
    let provider = Provider::builder().lists(LISTED).start();
    let gateway = Gateway::before(&provider).await;
    let said: Value = serde_json::from_str(LISTED).unwrap();
    let listed = list(&gateway).await;
    assert_eq!(listed, said);
    let keys = |value: &Value| value[0].as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&listed), keys(&said));
}

#[tokio::test]
async fn the_list_comes_without_counts_while_prometheus_is_silent() {
    let provider = Provider::builder().lists(LISTED).start();
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", silent.local_addr().unwrap());
    let gateway = with_prometheus(&provider, &url).start().await;
    let start = Instant::now();
    assert_eq!(list(&gateway).await[0]["invocationCount"], json!(0));
    assert_eq!(list(&gateway).await[0]["name"], json!("echo"));
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn logs_are_followed_line_by_line_for_as_long_as_they_come() {
    let provider = Provider::by_hand();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gateway = Gateway::builder()
        .provider(&provider)
        .var("logs_provider_url", format!("http://{}", listener.local_addr().unwrap()))
        .var("upstream_timeout", "500ms")
        .start()
        .await;
    let mut caller = gateway.connect().await;
    caller.send(get("/system/logs?name=echo&follow=true")).await;
    let (tcp, _) = listener.accept().await.unwrap();
    let mut logs = Wire::new(tcp);
    assert_eq!(logs.head().await.target(), "/system/logs?name=echo&follow=true");
    logs.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    let start = Instant::now();
    for number in 0..5 {
        logs.send_chunk(&format!("{{\"text\":\"line {number}\"}}\n")).await;
        caller.until(&format!("line {number}\"}}\n")).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    // Longer than any call of a function may take.
    assert!(start.elapsed() > Duration::from_millis(500));
    drop(caller);
    logs.closed().await;
}

#[tokio::test]
async fn functions_called_directly_must_be_known_to_the_provider() {
    let provider = Provider::builder().start();
    let gateway = Gateway::builder()
        .provider(&provider)
        .var("direct_functions", "true")
        .var("direct_functions_suffix", "invalid")
        .start()
        .await;
    for name in ["made-up", "127.0.0.1", "localhost"] {
        let answer = gateway.get(&format!("/function/{name}")).await;
        assert_eq!(answer.status(), 404, "{answer}");
        assert!(answer.text().contains("not found"), "{answer}");
    }
    let asked: Vec<_> = provider.asked().iter().map(|(head, _)| head.target().to_owned()).collect();
    assert_eq!(asked[0], "/system/function/made-up?namespace=fn&usage=false");
    assert_eq!((asked.len(), provider.calls()), (3, 0));
    gateway.metrics_show("strangers", |m| m.calls("unknown", "404") == 3).await;
    drop(provider);
    let answer = gateway.get("/function/made-up").await;
    assert_eq!(answer.status(), 502, "{answer}");
}

#[tokio::test]
async fn a_provider_may_come_and_go() {
    let provider = Provider::saying("hello");
    let address = provider.address;
    let gateway = Gateway::before(&provider).await;
    eventually("ready", async || gateway.is_ready().await).await;
    assert_eq!(gateway.get("/function/echo").await.status(), 200);

    drop(provider);
    eventually("not ready", async || !gateway.is_ready().await).await;
    let ready = gateway.get("/_/ready").await;
    assert!(ready.json()["reasons"].to_string().contains("connection refused"), "{ready}");
    assert!(!ready.to_string().contains(&address.to_string()), "{ready}");
    assert_eq!(gateway.get("/function/echo").await.status(), 502);
    assert_eq!(gateway.get("/healthz").await.status(), 502);
    assert_eq!(gateway.get("/_/healthz").await.status(), 200);

    let _again = Provider::builder().at(address).answering(|call| always(call, "again")).start();
    assert_eq!(gateway.get("/function/echo").await.text(), "again");
    eventually("ready again", async || gateway.is_ready().await).await;
}

#[tokio::test]
async fn a_provider_that_was_never_there_is_waited_for() {
    let provider = Provider::by_hand();
    let address = provider.address;
    drop(provider);
    let url = format!("http://{address}");
    let gateway = Gateway::builder().var("functions_provider_url", url).start().await;
    assert!(!gateway.is_ready().await);
    assert_eq!(gateway.get("/_/healthz").await.status(), 200);
    let _provider = Provider::builder().at(address).start();
    eventually("ready", async || gateway.is_ready().await).await;
}

#[tokio::test]
async fn a_provider_that_lists_null_has_no_functions() {
    // What a Go program makes of a slice that it never put anything into.
    let provider = Provider::builder()
        .lists("null")
        .api(|head, _| (head.target() == "/system/namespaces").then(|| (200, "null".to_owned())))
        .start();
    let gateway = Gateway::before(&provider).await;
    assert_eq!(list(&gateway).await, json!([]));
    eventually("ready", async || gateway.is_ready().await).await;
}

#[tokio::test]
async fn the_list_is_asked_for_in_plain_json() {
    let provider = Provider::builder().lists(LISTED).start();
    let gateway = Gateway::before(&provider).await;
    for target in ["/system/functions", "/system/info"] {
        let request = format!(
            "GET {target} HTTP/1.1\r\nHost: g\r\nAccept-Encoding: gzip\r\nIf-None-Match: \"x\"\r\n\
             Range: bytes=0-1\r\n\r\n"
        );
        gateway.connect().await.ask(request).await;
        let (head, _) = provider.asked().pop().unwrap();
        assert_eq!(head.target(), target);
        for name in ["accept-encoding", "if-none-match", "range"] {
            assert_eq!(head.header(name), None, "{target}");
        }
    }
}

#[tokio::test]
async fn the_head_of_the_list_can_be_had_alone() {
    let provider = Provider::builder().lists(LISTED).start();
    let gateway = Gateway::before(&provider).await;
    let mut caller = gateway.connect().await;
    caller.send("HEAD /system/functions HTTP/1.1\r\nHost: g\r\n\r\n").await;
    let status = caller.head().await.status();
    assert!(matches!(status, 200 | 405), "{status}");
}

#[tokio::test]
async fn a_refusal_of_the_providers_own_is_passed_on_to_the_letter() {
    let provider = Provider::builder()
        .api(|head, _| (head.method() == "PUT").then(|| (405, "no updates here".to_owned())))
        .start();
    let gateway = Gateway::before(&provider).await;
    let mut caller = gateway.connect().await;
    let put = "PUT /system/functions HTTP/1.1\r\nHost: g\r\nContent-Length: 2\r\n\r\n{}";
    for _ in 0..2 {
        let answer = caller.ask(put).await;
        assert_eq!((answer.status(), answer.text()), (405, "no updates here"));
    }
    // The gateway's own says what is allowed.
    let answer = caller.ask("PATCH /system/functions HTTP/1.1\r\nHost: g\r\n\r\n").await;
    assert_eq!((answer.status(), answer.header("allow")), (405, Some("GET,HEAD,POST,PUT,DELETE")));
    assert_eq!(caller.get("/_/healthz").await.text(), "OK");
}
