//! Workers: separate processes that execute the calls which gateways enqueue.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use crate::support::eventually;
use crate::support::gateway::{Builder, Gateway};
use crate::support::nats::Nats;
use crate::support::provider::Provider;
use crate::support::queue::{fast_retry, replying_with};

fn on_jetstream(nats: &Nats, builder: Builder) -> Builder {
    builder
        .var("faas_nats_address", "127.0.0.1")
        .var("faas_nats_port", nats.port())
        .var("queue", "jetstream")
        .var("ack_wait", "2s")
}

/// A gateway that enqueues calls and executes none.
async fn start_enqueueing_gateway(nats: &Nats, provider: &Provider) -> Gateway {
    let builder =
        on_jetstream(nats, Gateway::builder()).provider(provider).var("with_worker", "false");
    let gateway = builder.start().await;
    eventually("calls are accepted", async || {
        gateway.send_async("echo", &[], "").await.status() == 202
    })
    .await;
    gateway
}

/// A provider that holds each call until `let_go`, and records the ids of received calls.
fn blocking_provider(
    seen: &Arc<Mutex<Vec<String>>>,
    let_go: &tokio::sync::watch::Sender<bool>,
) -> Provider {
    let (seen, let_go) = (Arc::clone(seen), let_go.subscribe());
    fast_retry()
        .handler(move |mut call| {
            let (seen, mut let_go) = (Arc::clone(&seen), let_go.clone());
            async move {
                let body = call.read_body().await.ok()?;
                let id = call.head.header("x-call-id").unwrap_or_default().to_owned();
                seen.lock().unwrap().push(id);
                let_go.wait_for(|go| *go).await.ok()?;
                call.send_response(200, &body).await;
                Some(call.connection)
            }
        })
        .start()
}

#[tokio::test]
async fn a_worker_executes_calls_that_a_gateway_enqueued() {
    let (nats, provider) = (Nats::start(), replying_with(&[200], "done"));
    let gateway = start_enqueueing_gateway(&nats, &provider).await;
    let id = gateway.enqueue("echo/p?x=1", &[], "hello").await;
    assert_eq!(gateway.state(&id).await["state"], "queued");
    let worker = on_jetstream(&nats, Gateway::worker()).provider(&provider).start().await;
    gateway.wait_for_state(&id, "succeeded").await;
    for path in ["/healthz", "/_/healthz", "/_/ready"] {
        eventually(path, async || worker.get(path).await.status() == 200).await;
    }
    assert_eq!(worker.get("/function/echo").await.status(), 404);
    worker
        .wait_for_metric("the worker has counted", |metrics| {
            metrics
                .text
                .contains("queue_worker_messages_processed_total{queue_name=\"faas-request\"} 2")
                && metrics.text.contains(
                    "gateway_function_invocation_total{code=\"200\",function_name=\"echo.fn\"} 2",
                )
        })
        .await;
    assert!(worker.terminate().await.success());
}

#[tokio::test]
async fn a_worker_without_a_provider_calls_through_the_gateway() {
    let (nats, provider) = (Nats::start(), replying_with(&[200], "done"));
    let gateway = start_enqueueing_gateway(&nats, &provider).await;
    let worker = on_jetstream(&nats, Gateway::worker())
        .var("faas_gateway_address", "127.0.0.1")
        .var("faas_gateway_port", gateway.address.port())
        .var("faas_print_body", "true")
        .var("write_debug", "true")
        .start()
        .await;
    let id = gateway.enqueue("echo", &[], "what is in it").await;
    gateway.wait_for_state(&id, "succeeded").await;
    let counted = "gateway_function_invocation_total{code=\"200\",function_name=\"echo.fn\"} 2";
    gateway
        .wait_for_metric("the gateway has counted", |metrics| metrics.text.contains(counted))
        .await;
    assert!(!worker.metrics().await.text.contains("gateway_function_invocation_total{"));
    worker.wait_for_log("what is in it").await;
    worker.wait_for_log("Queued call executed").await;
}

#[tokio::test]
async fn a_worker_exposes_the_same_queue_metrics_as_a_gateway() {
    let (seen, let_go) = (Arc::default(), tokio::sync::watch::Sender::new(false));
    let (nats, provider) = (Nats::start(), blocking_provider(&seen, &let_go));
    let gateway = start_enqueueing_gateway(&nats, &provider).await;
    let worker =
        on_jetstream(&nats, Gateway::worker()).provider(&provider).var("max_inflight", "1");
    let worker = worker.start().await;
    eventually("the response has one", async || seen.lock().unwrap().len() == 1).await;
    gateway.enqueue("echo", &["X-Delay-Seconds: 3600"], "").await;
    gateway.enqueue("echo", &[], "").await;
    let labels = "{function_name=\"echo.fn\",queue_name=\"faas-request\"}";
    let expect = [
        format!("queue_worker_pending_messages{labels} 1"),
        format!("queue_worker_function_invocation_inflight{labels} 1"),
        format!("gateway_queue_delayed_messages{labels} 1"),
        format!("gateway_queue_dead_letter_messages{labels} 0"),
    ];
    for process in [&gateway, &worker] {
        process
            .wait_for_metric("the queue depth", |metrics| {
                expect.iter().all(|line| metrics.text.lines().any(|shown| shown == line))
            })
            .await;
    }
    let oldest = format!("gateway_queue_oldest_age_seconds{labels}");
    assert!(worker.metrics().await.text.contains(&oldest));
    let_go.send_replace(true);
}

#[tokio::test]
async fn workers_share_the_calls_and_a_stopped_one_releases_its_own() {
    let (seen, let_go) = (Arc::default(), tokio::sync::watch::Sender::new(false));
    let (nats, provider) = (Nats::start(), blocking_provider(&seen, &let_go));
    let gateway = start_enqueueing_gateway(&nats, &provider).await;
    let worker = || {
        let worker =
            on_jetstream(&nats, Gateway::worker()).provider(&provider).var("max_inflight", "4");
        worker.var("shutdown_grace", "1s").start()
    };
    let (one, two) = (worker().await, worker().await);
    let mut ids = Vec::new();
    for _ in 0..12 {
        ids.push(gateway.enqueue("echo", &[], "").await);
    }
    // Neither worker alone could run as many: one function has three slots of four.
    eventually("both workers execute calls", async || seen.lock().unwrap().len() == 6).await;
    assert!(one.terminate().await.success());
    let_go.send_replace(true);
    for id in &ids {
        gateway.wait_for_state(id, "succeeded").await;
    }
    let executed: HashSet<String> = seen.lock().unwrap().iter().cloned().collect();
    assert!(ids.iter().all(|id| executed.contains(id)));
    // Only the aborted calls were executed twice.
    assert!(seen.lock().unwrap().len() <= ids.len() + 1 + 4);
    drop(two);
}

#[tokio::test]
async fn a_worker_names_missing_settings() {
    for (vars, said) in [
        (vec![], "faas_nats_address is not set"),
        (vec![("queue", "embedded")], "queue: \"embedded\" is not"),
        (vec![("queue", "none"), ("faas_nats_address", "n")], "queue: \"none\" is not"),
        (vec![("queue", "jetstream")], "faas_nats_address is not set"),
    ] {
        let builder =
            vars.iter().fold(Gateway::worker(), |builder, (name, value)| builder.var(name, value));
        let output = builder.run_to_exit(&["worker"]).await;
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(64), "{stderr}");
        assert!(stderr.contains(said), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
}

#[tokio::test]
async fn different_calls_with_the_same_id_are_all_executed() {
    let (nats, provider) = (Nats::start(), replying_with(&[200], "done"));
    let gateway = start_enqueueing_gateway(&nats, &provider).await;
    let _worker = on_jetstream(&nats, Gateway::worker()).provider(&provider).start().await;
    let mine = ["X-Call-Id: mine"];
    assert_eq!(gateway.enqueue("echo", &mine, "1").await, "mine");
    assert_eq!(gateway.enqueue("echo", &mine, "1").await, "mine");
    // Each function has its own subject there, so both can use the id.
    gateway.enqueue("other", &mine, "1").await;
    let another = gateway.enqueue("echo", &mine, "2").await;
    assert_ne!(another, "mine");
    gateway.wait_for_state(&another, "succeeded").await;
    // One more call shows that calls are received.
    eventually("each call is executed", async || provider.call_count() == 1 + 3).await;
    gateway.wait_for_state("mine", "succeeded").await;
}
