//! Traces and the access log: the content of spans and log lines, and the trace context that functions receive.

use serde_json::Value;

use crate::support::connection::request;
use crate::support::eventually;
use crate::support::gateway::Gateway;
use crate::support::provider::Provider;
use crate::support::queue::{fast_retry, with_embedded_queue};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

/// A trace collector.
fn collector() -> Provider {
    let takes = |head: &crate::support::connection::Head, _: &[u8]| {
        (head.target() == "/v1/traces").then(|| (200, "{}".to_owned()))
    };
    Provider::builder().api(takes).start()
}

/// A provider whose functions respond with the `traceparent` that they receive.
fn traceparent_provider() -> Provider {
    let answering = |mut call: crate::support::provider::Invocation| async move {
        let seen = call.head.header("traceparent").unwrap_or_default().to_owned();
        call.respond(200, &seen).await;
        Some(call.connection)
    };
    fast_retry().handler(answering).start()
}

/// All spans that the collector has received.
fn spans(collector: &Provider) -> Vec<Value> {
    let exports = collector.api_requests();
    let bodies = exports.iter().map(|(_, body)| serde_json::from_slice::<Value>(body).unwrap());
    bodies
        .flat_map(|body| {
            body["resourceSpans"][0]["scopeSpans"][0]["spans"].as_array().unwrap().clone()
        })
        .collect()
}

/// The spans of `TRACE`, once there are `count`.
async fn spans_of_trace(collector: &Provider, count: usize) -> Vec<Value> {
    let found = || {
        let mut found = spans(collector);
        found.retain(|span| span["traceId"] == TRACE);
        found
    };
    eventually("the spans arrive", async || found().len() >= count).await;
    found()
}

fn single_span<'a>(spans: &'a [Value], kind: u64, name: &str) -> &'a Value {
    let mut fitting = spans.iter().filter(|span| span["kind"] == kind && span["name"] == name);
    let one = fitting.next().unwrap_or_else(|| panic!("no {name} in {spans:#?}"));
    assert!(fitting.next().is_none(), "{spans:#?}");
    one
}

#[tokio::test]
async fn a_call_belongs_to_the_trace_of_its_client() {
    let (collector, provider) = (collector(), traceparent_provider());
    let gateway = Gateway::builder()
        .provider(&provider)
        .var("otlp_endpoint", collector.url())
        .var("otlp_sampling_ratio", "0")
        .start()
        .await;
    let parent = format!("traceparent: 00-{TRACE}-{PARENT}-01");
    let response = gateway.request("GET", "/function/echo/a?secret=1", &[&parent]).await;
    let spans = spans_of_trace(&collector, 2).await;
    let server = single_span(&spans, 2, "GET /function/{name}");
    let client = single_span(&spans, 3, "call");
    assert_eq!(server["parentSpanId"], PARENT);
    assert_eq!(client["parentSpanId"], server["spanId"]);
    let inner = client["spanId"].as_str().unwrap();
    assert_eq!(response.text(), format!("00-{TRACE}-{inner}-01"));
    assert!(server["attributes"].to_string().contains(response.header("x-call-id").unwrap()));
    // A query may contain a secret.
    assert!(!server.to_string().contains("secret"), "{server}");
    assert!(client["attributes"].to_string().contains("echo"), "{client}");
    // A refused call is not executed.
    let refused = format!("traceparent: 00-{TRACE}-{PARENT}-01");
    assert_eq!(gateway.request("GET", "/function/a%2f..%2fb", &[&refused]).await.status(), 400);
    // A trace that begins here is not sampled, and the function is told so.
    let response = gateway.get("/function/echo").await;
    assert!(response.text().ends_with("-00"), "{response}");
    // If the client's trace is not sampled, this part of it is not either.
    let silent = format!("00-{TRACE}-{PARENT}-00");
    let response =
        gateway.request("GET", "/function/echo", &[&format!("traceparent: {silent}")]).await;
    assert_eq!(response.text(), silent);
    assert!(gateway.terminate().await.success());
    assert_eq!(self::spans(&collector).len(), 3);
}

#[tokio::test]
async fn a_queued_call_and_its_callback_share_a_trace() {
    let (collector, provider, receiver) =
        (collector(), traceparent_provider(), traceparent_provider());
    let state = tempfile::tempdir().unwrap();
    let builder =
        with_embedded_queue(&provider, state.path()).var("otlp_endpoint", collector.url());
    let gateway = builder.start().await;
    let parent = format!("traceparent: 00-{TRACE}-{PARENT}-01");
    let callback = format!("X-Callback-Url: {}/function/hook", receiver.url());
    let id = gateway.enqueue("echo", &[&parent, &callback], "").await;
    gateway.wait_for_state(&id, "succeeded").await;
    let seen = gateway.result(&id).await;
    assert!(gateway.terminate().await.success());
    let spans = spans_of_trace(&collector, 4).await;
    let producer = single_span(&spans, 4, "publish");
    let consumer = single_span(&spans, 5, "process");
    let client = single_span(&spans, 3, "callback");
    assert_eq!(consumer["parentSpanId"], producer["spanId"]);
    assert_eq!(client["parentSpanId"], consumer["spanId"]);
    let consumer = consumer["spanId"].as_str().unwrap();
    assert_eq!(seen.text(), format!("00-{TRACE}-{consumer}-01"));
}

#[tokio::test]
async fn calls_do_not_wait_for_a_collector() {
    let provider = traceparent_provider();
    let gateway = Gateway::builder()
        .provider(&provider)
        // Nothing listens there.
        .var("otlp_endpoint", "http://127.0.0.1:1")
        .start()
        .await;
    for _ in 0..10 {
        assert_eq!(gateway.get("/function/echo").await.status(), 200);
    }
    gateway.wait_for_log("The trace collector does not accept spans").await;
    let refused = [("reason", "refused")];
    eventually("the spans are counted as dropped", async || {
        let metrics = gateway.metrics().await;
        metrics.get("gateway_spans_dropped_total", &refused).is_some_and(|dropped| dropped >= 20.0)
    })
    .await;
    assert!(gateway.terminate().await.success());
}

#[tokio::test]
async fn the_access_log_has_a_line_for_each_request() {
    let provider = Provider::replying("hello");
    let builder = || Gateway::builder().provider(&provider);
    let gateway = builder().var("access_log", "on").start().await;
    let mut client = gateway.connect().await;
    let headers = ["X-Call-Id: mine", "User-Agent: probe"];
    client.exchange(request("POST", "/function/echo/a?secret=1", &headers, "body")).await;
    gateway.get("/nowhere").await;
    gateway.wait_for_log("/nowhere").await;
    let log = gateway.log();
    let line = log.iter().find(|line| line.contains("/function/echo/a")).unwrap();
    let line: Value = serde_json::from_str(line).unwrap();
    let fields = &line["fields"];
    assert_eq!(line["target"], "access");
    assert_eq!((&fields["method"], &fields["status"]), (&"POST".into(), &200.into()));
    assert_eq!((&fields["call_id"], &fields["bytes"]), (&"mine".into(), &5.into()));
    assert_eq!((&fields["user_agent"], &fields["end"]), (&"probe".into(), &"whole".into()));
    assert!(fields["seconds"].as_f64().unwrap() > 0.0);
    assert!(!log.iter().any(|line| line.contains("secret")), "{log:#?}");

    let gateway = builder().var("access_log", "errors").start().await;
    gateway.get("/nowhere").await;
    drop(provider);
    assert_eq!(gateway.get("/function/gone").await.status(), 502);
    gateway.wait_for_log("/function/gone").await;
    assert!(!gateway.log().iter().any(|line| line.contains("/nowhere")));
}
