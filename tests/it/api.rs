//! API requests that are more than forwarded: the function list with counts, logs, direct calls, readiness.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::support::connection::{Connection, get};
use crate::support::eventually;
use crate::support::gateway::{Builder, Gateway};
use crate::support::provider::{Provider, respond_ok};

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
    let response = gateway.get("/system/functions").await;
    assert_eq!(response.status(), 200, "{response}");
    response.json()
}

#[tokio::test]
async fn the_function_list_has_invocation_counts_from_prometheus() {
    let provider = Provider::builder().listing(LISTED).start();
    let prometheus = Provider::builder()
        .api(|head, _| {
            assert!(head.target().starts_with("/api/v1/query?query="), "{}", head.target());
            let sample =
                r#"{"metric":{"function_name":"echo.fn"},"value":[1700000000.123,"1234"]}"#;
            let response =
                r#"{"status":"success","data":{"resultType":"vector","result":[SAMPLE]}}"#;
            Some((200, response.replace("SAMPLE", sample)))
        })
        .start();
    let gateway = with_prometheus(&provider, &prometheus.url()).start().await;
    assert_eq!(list(&gateway).await[0]["invocationCount"], json!(1234));
}

#[tokio::test]
async fn unknown_fields_of_the_function_list_are_kept() {
    let provider = Provider::builder().listing(LISTED).start();
    let gateway = Gateway::in_front_of(&provider).await;
    let expected: Value = serde_json::from_str(LISTED).unwrap();
    let listed = list(&gateway).await;
    assert_eq!(listed, expected);
    let keys = |value: &Value| value[0].as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&listed), keys(&expected));
}

#[tokio::test]
async fn the_function_list_has_no_counts_while_prometheus_does_not_respond() {
    let provider = Provider::builder().listing(LISTED).start();
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", silent.local_addr().unwrap());
    let gateway = with_prometheus(&provider, &url).start().await;
    let start = Instant::now();
    assert_eq!(list(&gateway).await[0]["invocationCount"], json!(0));
    assert_eq!(list(&gateway).await[0]["name"], json!("echo"));
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[tokio::test]
async fn followed_logs_are_streamed_line_by_line() {
    let provider = Provider::manual();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gateway = Gateway::builder()
        .provider(&provider)
        .var("logs_provider_url", format!("http://{}", listener.local_addr().unwrap()))
        .var("upstream_timeout", "500ms")
        .start()
        .await;
    let mut client = gateway.connect().await;
    client.send(get("/system/logs?name=echo&follow=true")).await;
    let (tcp, _) = listener.accept().await.unwrap();
    let mut logs = Connection::new(tcp);
    assert_eq!(logs.read_head().await.target(), "/system/logs?name=echo&follow=true");
    logs.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    let start = Instant::now();
    for number in 0..5 {
        logs.send_chunk(&format!("{{\"text\":\"line {number}\"}}\n")).await;
        client.read_until(&format!("line {number}\"}}\n")).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    // Longer than the timeout of a function call.
    assert!(start.elapsed() > Duration::from_millis(500));
    drop(client);
    logs.read_to_close().await;
}

#[tokio::test]
async fn direct_calls_need_a_function_that_the_provider_knows() {
    let provider = Provider::builder().start();
    let gateway = Gateway::builder()
        .provider(&provider)
        .var("direct_functions", "true")
        .var("direct_functions_suffix", "invalid")
        .start()
        .await;
    for name in ["made-up", "127.0.0.1", "localhost"] {
        let response = gateway.get(&format!("/function/{name}")).await;
        assert_eq!(response.status(), 404, "{response}");
        assert!(response.text().contains("not found"), "{response}");
    }
    let queries: Vec<_> =
        provider.api_requests().iter().map(|(head, _)| head.target().to_owned()).collect();
    assert_eq!(queries[0], "/system/function/made-up?namespace=fn&usage=false");
    assert_eq!((queries.len(), provider.call_count()), (3, 0));
    gateway
        .wait_for_metric("the unknown functions are counted", |m| m.calls("unknown", "404") == 3)
        .await;
    drop(provider);
    let response = gateway.get("/function/made-up").await;
    assert_eq!(response.status(), 502, "{response}");
}

#[tokio::test]
async fn a_provider_that_restarts_is_used_again() {
    let provider = Provider::replying("hello");
    let address = provider.address;
    let gateway = Gateway::in_front_of(&provider).await;
    eventually("the gateway is ready", async || gateway.is_ready().await).await;
    assert_eq!(gateway.get("/function/echo").await.status(), 200);

    drop(provider);
    eventually("not ready", async || !gateway.is_ready().await).await;
    let ready = gateway.get("/_/ready").await;
    assert!(ready.json()["reasons"].to_string().contains("connection refused"), "{ready}");
    assert!(!ready.to_string().contains(&address.to_string()), "{ready}");
    assert_eq!(gateway.get("/function/echo").await.status(), 502);
    assert_eq!(gateway.get("/healthz").await.status(), 502);
    assert_eq!(gateway.get("/_/healthz").await.status(), 200);

    let _again =
        Provider::builder().listen_on(address).handler(|call| respond_ok(call, "again")).start();
    assert_eq!(gateway.get("/function/echo").await.text(), "again");
    eventually("the gateway is ready again", async || gateway.is_ready().await).await;
}

#[tokio::test]
async fn the_gateway_starts_without_a_provider_and_uses_it_later() {
    let provider = Provider::manual();
    let address = provider.address;
    drop(provider);
    let url = format!("http://{address}");
    let gateway = Gateway::builder().var("functions_provider_url", url).start().await;
    assert!(!gateway.is_ready().await);
    assert_eq!(gateway.get("/_/healthz").await.status(), 200);
    let _provider = Provider::builder().listen_on(address).start();
    eventually("the gateway is ready", async || gateway.is_ready().await).await;
}

#[tokio::test]
async fn a_provider_that_lists_null_has_no_functions() {
    // A nil slice in Go is `null` in JSON.
    let provider = Provider::builder()
        .listing("null")
        .api(|head, _| (head.target() == "/system/namespaces").then(|| (200, "null".to_owned())))
        .start();
    let gateway = Gateway::in_front_of(&provider).await;
    assert_eq!(list(&gateway).await, json!([]));
    eventually("the gateway is ready", async || gateway.is_ready().await).await;
}

#[tokio::test]
async fn the_function_list_is_requested_without_compression() {
    let provider = Provider::builder().listing(LISTED).start();
    let gateway = Gateway::in_front_of(&provider).await;
    for target in ["/system/functions", "/system/info"] {
        let request = format!(
            "GET {target} HTTP/1.1\r\nHost: g\r\nAccept-Encoding: gzip\r\nIf-None-Match: \"x\"\r\n\
             Range: bytes=0-1\r\n\r\n"
        );
        gateway.connect().await.exchange(request).await;
        let (head, _) = provider.api_requests().pop().unwrap();
        assert_eq!(head.target(), target);
        for name in ["accept-encoding", "if-none-match", "range"] {
            assert_eq!(head.header(name), None, "{target}");
        }
    }
}

#[tokio::test]
async fn head_requests_for_the_function_list_are_answered() {
    let provider = Provider::builder().listing(LISTED).start();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    client.send("HEAD /system/functions HTTP/1.1\r\nHost: g\r\n\r\n").await;
    let status = client.read_head().await.status();
    assert!(matches!(status, 200 | 405), "{status}");
}

#[tokio::test]
async fn errors_of_the_provider_are_passed_on_unchanged() {
    let provider = Provider::builder()
        .api(|head, _| (head.method() == "PUT").then(|| (405, "no updates here".to_owned())))
        .start();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    let put = "PUT /system/functions HTTP/1.1\r\nHost: g\r\nContent-Length: 2\r\n\r\n{}";
    for _ in 0..2 {
        let response = client.exchange(put).await;
        assert_eq!((response.status(), response.text()), (405, "no updates here"));
    }
    // The gateway's own 405 lists the allowed methods.
    let response = client.exchange("PATCH /system/functions HTTP/1.1\r\nHost: g\r\n\r\n").await;
    assert_eq!(
        (response.status(), response.header("allow")),
        (405, Some("GET,HEAD,POST,PUT,DELETE"))
    );
    assert_eq!(client.get("/_/healthz").await.text(), "OK");
}
