//! Callbacks of a worker that is a process of its own: it knows the gateway by a setting.

use crate::support::eventually;
use crate::support::fake_stan::{CHANNEL, Stan};
use crate::support::gateway::{Builder, Gateway};
use crate::support::nats::Nats;
use crate::support::provider::Provider;
use crate::support::queue::patient;

fn on(nats: &Nats, builder: Builder) -> Builder {
    builder
        .var("faas_nats_address", "127.0.0.1")
        .var("faas_nats_port", nats.port())
        .var("queue", "jetstream")
}

async fn taking_in(nats: &Nats, provider: &Provider) -> Gateway {
    let builder = on(nats, Gateway::builder()).provider(provider).var("with_worker", "false");
    let gateway = builder.start().await;
    let once = ["X-Call-Id: first"];
    eventually("calls are taken in", async || {
        gateway.queue("echo", &once, "").await.status() == 202
    })
    .await;
    gateway
}

fn worker(nats: &Nats, gateway: &Gateway) -> Builder {
    on(nats, Gateway::worker())
        .var("callback_allowlist", "*")
        .var("faas_gateway_address", "localhost")
        .var("faas_gateway_port", gateway.address.port())
}

#[tokio::test]
async fn a_worker_calls_back_to_functions_of_its_gateway_and_to_nothing_else_of_it() {
    let (nats, mut provider) = (Nats::start(), patient().start());
    let gateway = taking_in(&nats, &provider).await;
    let worker = worker(&nats, &gateway).provider(&provider).start().await;
    provider.call().await.answer(200, "").await;
    let metrics = worker.metrics_address;
    let gateways = format!("http://127.0.0.1:{}", gateway.address.port());
    let refused = [
        format!("{gateways}/system/functions"),
        format!("http://{metrics}/metrics"),
        format!("http://localhost:{}/function/next", provider.address.port()),
    ];
    for target in refused {
        let callback = format!("X-Callback-Url: {target}");
        let id = gateway.queued("echo", &[&callback], "{}").await;
        provider.call().await.answer(200, "first").await;
        let told = gateway.becomes(&id, "succeeded").await;
        let reason = told["reason"].as_str().unwrap_or_default();
        assert!(reason.contains("not allowed"), "{target}: {told}");
    }
    for path in ["/function/next/x?y", "/async-function/next/x?y"] {
        let callback = format!("X-Callback-Url: {gateways}{path}");
        let id = gateway.queued("echo", &[&callback], "").await;
        provider.call().await.answer(200, "first").await;
        let mut next = provider.call().await;
        assert_eq!(next.head.target(), "/function/next.fn/x?y");
        assert_eq!(next.head.header("x-gateway-callback"), Some("1"));
        assert_eq!(next.body().await.unwrap(), b"first");
        next.answer_with(200, b"").await;
        let told = gateway.becomes(&id, "succeeded").await;
        assert!(told["reason"].is_null(), "{told}");
    }
}

#[tokio::test]
async fn a_worker_that_calls_through_the_gateway_does_so_for_callbacks() {
    let (nats, mut provider) = (Nats::start(), patient().start());
    let gateway = taking_in(&nats, &provider).await;
    let _worker = worker(&nats, &gateway).start().await;
    provider.call().await.answer(200, "").await;
    let gateways = format!("http://localhost:{}", gateway.address.port());
    let callback = format!("X-Callback-Url: {gateways}/function/next");
    let id = gateway.queued("echo", &[&callback], "").await;
    provider.call().await.answer(200, "first").await;
    let mut next = provider.call().await;
    assert_eq!(next.head.target(), "/function/next.fn");
    next.answer(200, "").await;
    drop(next);
    gateway.becomes(&id, "succeeded").await;
    let callback = format!("X-Callback-Url: {gateways}/system/functions");
    let id = gateway.queued("echo", &[&callback], "{}").await;
    provider.call().await.answer(200, "first").await;
    let told = gateway.becomes(&id, "succeeded").await;
    assert!(told["reason"].as_str().unwrap_or_default().contains("not allowed"), "{told}");
}

#[tokio::test]
async fn a_worker_on_nats_streaming_queues_what_a_callback_asks_for() {
    let (nats, mut provider) = (Nats::start(), patient().start());
    let stan = Stan::start(&nats).await;
    // Nothing is connected to, so nothing has to listen there.
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
    let mut first = provider.call().await;
    assert_eq!(first.head.target(), "/function/echo.fn");
    first.answer(200, "first").await;
    let mut next = provider.call().await;
    assert_eq!(next.head.target(), "/function/next.fn");
    assert_eq!(next.body().await.unwrap(), b"first");
    assert_ne!(next.head.header("x-call-id"), Some("first"));
    next.answer_with(200, b"").await;
}
