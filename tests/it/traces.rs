//! Traces and the access log: what is told of a request, to whom, and what the function learns of it.

use serde_json::Value;

use crate::support::eventually;
use crate::support::gateway::Gateway;
use crate::support::provider::Provider;
use crate::support::queue::{patient, queueing};
use crate::support::wire::request;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";

/// A collector of traces.
fn collector() -> Provider {
    let takes = |head: &crate::support::wire::Head, _: &[u8]| {
        (head.target() == "/v1/traces").then(|| (200, "{}".to_owned()))
    };
    Provider::builder().api(takes).start()
}

/// A provider whose functions answer with the `traceparent` that they see.
fn telling() -> Provider {
    let answering = |mut call: crate::support::provider::Call| async move {
        let seen = call.head.header("traceparent").unwrap_or_default().to_owned();
        call.answer(200, &seen).await;
        Some(call.wire)
    };
    patient().answering(answering).start()
}

/// All spans that the collector has taken.
fn spans(collector: &Provider) -> Vec<Value> {
    let asked = collector.asked();
    let bodies = asked.iter().map(|(_, body)| serde_json::from_slice::<Value>(body).unwrap());
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
    eventually("the spans come", async || found().len() >= count).await;
    found()
}

fn one_with<'a>(spans: &'a [Value], kind: u64, name: &str) -> &'a Value {
    let mut fitting = spans.iter().filter(|it| it["kind"] == kind && it["name"] == name);
    let one = fitting.next().unwrap_or_else(|| panic!("no {name} in {spans:#?}"));
    assert!(fitting.next().is_none(), "{spans:#?}");
    one
}

#[tokio::test]
async fn a_call_belongs_to_its_callers_trace() {
    let (collector, provider) = (collector(), telling());
    let gateway = Gateway::builder()
        .provider(&provider)
        .var("otlp_endpoint", collector.url())
        .var("otlp_sampling_ratio", "0")
        .start()
        .await;
    let parent = format!("traceparent: 00-{TRACE}-{PARENT}-01");
    let answer = gateway.ask("GET", "/function/echo/a?secret=1", &[&parent]).await;
    let spans = spans_of_trace(&collector, 2).await;
    let server = one_with(&spans, 2, "GET /function/{name}");
    let client = one_with(&spans, 3, "call");
    assert_eq!(server["parentSpanId"], PARENT);
    assert_eq!(client["parentSpanId"], server["spanId"]);
    let inner = client["spanId"].as_str().unwrap();
    assert_eq!(answer.text(), format!("00-{TRACE}-{inner}-01"));
    assert!(server["attributes"].to_string().contains(answer.header("x-call-id").unwrap()));
    // What stands in a query may be a secret.
    assert!(!server.to_string().contains("secret"), "{server}");
    assert!(client["attributes"].to_string().contains("echo"), "{client}");
    // What is refused is not called.
    let refused = format!("traceparent: 00-{TRACE}-{PARENT}-01");
    assert_eq!(gateway.ask("GET", "/function/a%2f..%2fb", &[&refused]).await.status(), 400);
    // No trace that begins here is told, and each is told so.
    let answer = gateway.get("/function/echo").await;
    assert!(answer.text().ends_with("-00"), "{answer}");
    // What its caller does not tell is not ours to tell.
    let silent = format!("00-{TRACE}-{PARENT}-00");
    let answer = gateway.ask("GET", "/function/echo", &[&format!("traceparent: {silent}")]).await;
    assert_eq!(answer.text(), silent);
    assert!(gateway.terminate().await.success());
    assert_eq!(self::spans(&collector).len(), 3);
}

#[tokio::test]
async fn a_queued_call_and_its_callback_belong_to_one_trace() {
    let (collector, provider, receiver) = (collector(), telling(), telling());
    let state = tempfile::tempdir().unwrap();
    let builder = queueing(&provider, state.path()).var("otlp_endpoint", collector.url());
    let gateway = builder.start().await;
    let parent = format!("traceparent: 00-{TRACE}-{PARENT}-01");
    let callback = format!("X-Callback-Url: {}/function/hook", receiver.url());
    let id = gateway.queued("echo", &[&parent, &callback], "").await;
    gateway.becomes(&id, "succeeded").await;
    let seen = gateway.result(&id).await;
    assert!(gateway.terminate().await.success());
    let spans = spans_of_trace(&collector, 4).await;
    let producer = one_with(&spans, 4, "publish");
    let consumer = one_with(&spans, 5, "process");
    let client = one_with(&spans, 3, "callback");
    assert_eq!(consumer["parentSpanId"], producer["spanId"]);
    assert_eq!(client["parentSpanId"], consumer["spanId"]);
    let consumer = consumer["spanId"].as_str().unwrap();
    assert_eq!(seen.text(), format!("00-{TRACE}-{consumer}-01"));
}

#[tokio::test]
async fn calls_do_not_wait_for_a_collector() {
    let provider = telling();
    let gateway = Gateway::builder()
        .provider(&provider)
        // Nothing listens there.
        .var("otlp_endpoint", "http://127.0.0.1:1")
        .start()
        .await;
    for _ in 0..10 {
        assert_eq!(gateway.get("/function/echo").await.status(), 200);
    }
    gateway.logs("The trace collector does not accept spans").await;
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
    let provider = Provider::saying("hello");
    let builder = || Gateway::builder().provider(&provider);
    let gateway = builder().var("access_log", "on").start().await;
    let mut caller = gateway.connect().await;
    let headers = ["X-Call-Id: mine", "User-Agent: probe"];
    caller.ask(request("POST", "/function/echo/a?secret=1", &headers, "body")).await;
    gateway.get("/nowhere").await;
    gateway.logs("/nowhere").await;
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
    gateway.logs("/function/gone").await;
    assert!(!gateway.log().iter().any(|line| line.contains("/nowhere")));
}
