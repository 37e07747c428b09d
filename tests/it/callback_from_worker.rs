//! Callbacks of a worker process, which knows the gateway by a setting.

use crate::support::eventually;
use crate::support::fake_stan::{CHANNEL, FakeStan};
use crate::support::gateway::{Builder, Gateway};
use crate::support::nats::Nats;
use crate::support::provider::Provider;
use crate::support::queue::fast_retry;

fn on_jetstream(nats: &Nats, builder: Builder) -> Builder {
    builder
        .var("faas_nats_address", "127.0.0.1")
        .var("faas_nats_port", nats.port())
        .var("queue", "jetstream")
}

async fn start_enqueueing_gateway(nats: &Nats, provider: &Provider) -> Gateway {
    let builder =
        on_jetstream(nats, Gateway::builder()).provider(provider).var("with_worker", "false");
    let gateway = builder.start().await;
    let once = ["X-Call-Id: first"];
    eventually("calls are accepted", async || {
        gateway.send_async("echo", &once, "").await.status() == 202
    })
    .await;
    gateway
}

fn worker(nats: &Nats, gateway: &Gateway) -> Builder {
    on_jetstream(nats, Gateway::worker())
        .var("callback_allowlist", "*")
        .var("faas_gateway_address", "localhost")
        .var("faas_gateway_port", gateway.address.port())
}

#[tokio::test]
async fn a_worker_sends_callbacks_to_functions_of_its_gateway_only() {
    let (nats, mut provider) = (Nats::start(), fast_retry().start());
    let gateway = start_enqueueing_gateway(&nats, &provider).await;
    let worker = worker(&nats, &gateway).provider(&provider).start().await;
    provider.next_call().await.respond(200, "").await;
    let metrics = worker.metrics_address;
    let gateways = format!("http://127.0.0.1:{}", gateway.address.port());
    let refused = [
        format!("{gateways}/system/functions"),
        format!("http://{metrics}/metrics"),
        format!("http://localhost:{}/function/next", provider.address.port()),
    ];
    for target in refused {
        let callback = format!("X-Callback-Url: {target}");
        let id = gateway.enqueue("echo", &[&callback], "{}").await;
        provider.next_call().await.respond(200, "first").await;
        let call_status = gateway.wait_for_state(&id, "succeeded").await;
        let reason = call_status["reason"].as_str().unwrap_or_default();
        assert!(reason.contains("not allowed"), "{target}: {call_status}");
    }
    for path in ["/function/next/x?y", "/async-function/next/x?y"] {
        let callback = format!("X-Callback-Url: {gateways}{path}");
        let id = gateway.enqueue("echo", &[&callback], "").await;
        provider.next_call().await.respond(200, "first").await;
        let mut next = provider.next_call().await;
        assert_eq!(next.head.target(), "/function/next.fn/x?y");
        assert_eq!(next.head.header("x-gateway-callback"), Some("1"));
        assert_eq!(next.read_body().await.unwrap(), b"first");
        next.send_response(200, b"").await;
        let call_status = gateway.wait_for_state(&id, "succeeded").await;
        assert!(call_status["reason"].is_null(), "{call_status}");
    }
}

#[tokio::test]
async fn a_worker_that_calls_through_the_gateway_sends_callbacks_through_it() {
    let (nats, mut provider) = (Nats::start(), fast_retry().start());
    let gateway = start_enqueueing_gateway(&nats, &provider).await;
    let _worker = worker(&nats, &gateway).start().await;
    provider.next_call().await.respond(200, "").await;
    let gateways = format!("http://localhost:{}", gateway.address.port());
    let callback = format!("X-Callback-Url: {gateways}/function/next");
    let id = gateway.enqueue("echo", &[&callback], "").await;
    provider.next_call().await.respond(200, "first").await;
    let mut next = provider.next_call().await;
    assert_eq!(next.head.target(), "/function/next.fn");
    next.respond(200, "").await;
    drop(next);
    gateway.wait_for_state(&id, "succeeded").await;
    let callback = format!("X-Callback-Url: {gateways}/system/functions");
    let id = gateway.enqueue("echo", &[&callback], "{}").await;
    provider.next_call().await.respond(200, "first").await;
    let call_status = gateway.wait_for_state(&id, "succeeded").await;
    assert!(
        call_status["reason"].as_str().unwrap_or_default().contains("not allowed"),
        "{call_status}"
    );
}

#[tokio::test]
async fn a_worker_on_nats_streaming_enqueues_async_callbacks() {
    let (nats, mut provider) = (Nats::start(), fast_retry().start());
    let stan = FakeStan::start(&nats).await;
    // The worker opens no connection for this URL, so nothing has to listen there.
    let url = r#"{"Scheme":"http","Host":"localhost:9","Path":"/async-function/next"}"#;
    let header = r#"{"X-Call-Id":["first"]}"#;
    let message = format!(r#"{{"Header":{header},"Function":"echo.fn","CallbackUrl":{url}}}"#);
    stan.store_message(CHANNEL, message);
    let _worker = Gateway::worker()
        .provider(&provider)
        .var("queue", "stan")
        .var("faas_nats_address", "127.0.0.1")
        .var("faas_nats_port", nats.port())
        .var("faas_gateway_address", "localhost")
        .var("faas_gateway_port", 9)
        .start()
        .await;
    let mut first = provider.next_call().await;
    assert_eq!(first.head.target(), "/function/echo.fn");
    first.respond(200, "first").await;
    let mut next = provider.next_call().await;
    assert_eq!(next.head.target(), "/function/next.fn");
    assert_eq!(next.read_body().await.unwrap(), b"first");
    assert_ne!(next.head.header("x-call-id"), Some("first"));
    next.send_response(200, b"").await;
}
