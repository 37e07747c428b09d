//! Workers: processes of their own that make the calls which gateways take in.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use crate::support::eventually;
use crate::support::gateway::{Builder, Gateway};
use crate::support::nats::Nats;
use crate::support::provider::Provider;
use crate::support::queue::{answering, patient};

fn on(nats: &Nats, builder: Builder) -> Builder {
    builder
        .var("faas_nats_address", "127.0.0.1")
        .var("faas_nats_port", nats.port())
        .var("queue", "jetstream")
        .var("ack_wait", "2s")
}

/// A gateway that takes calls in and makes none.
async fn taking_in(nats: &Nats, provider: &Provider) -> Gateway {
    let builder = on(nats, Gateway::builder()).provider(provider).var("with_worker", "false");
    let gateway = builder.start().await;
    eventually("calls are taken in", async || gateway.queue("echo", &[], "").await.status() == 202)
        .await;
    gateway
}

/// A provider that holds each call until `let_go`, and notes the ids of those that have come.
fn holding(seen: &Arc<Mutex<Vec<String>>>, let_go: &tokio::sync::watch::Sender<bool>) -> Provider {
    let (seen, let_go) = (Arc::clone(seen), let_go.subscribe());
    patient()
        .answering(move |mut call| {
            let (seen, mut let_go) = (Arc::clone(&seen), let_go.clone());
            async move {
                let body = call.body().await.ok()?;
                let id = call.head.header("x-call-id").unwrap_or_default().to_owned();
                seen.lock().unwrap().push(id);
                let_go.wait_for(|go| *go).await.ok()?;
                call.answer_with(200, &body).await;
                Some(call.wire)
            }
        })
        .start()
}

#[tokio::test]
async fn a_worker_makes_what_a_gateway_takes_in() {
    let (nats, provider) = (Nats::start(), answering(&[200], "done"));
    let gateway = taking_in(&nats, &provider).await;
    let id = gateway.queued("echo/p?x=1", &[], "hello").await;
    assert_eq!(gateway.state(&id).await["state"], "queued");
    let worker = on(&nats, Gateway::worker()).provider(&provider).start().await;
    gateway.becomes(&id, "succeeded").await;
    for path in ["/healthz", "/_/healthz", "/_/ready"] {
        eventually(path, async || worker.get(path).await.status() == 200).await;
    }
    assert_eq!(worker.get("/function/echo").await.status(), 404);
    worker
        .metrics_show("it has counted", |metrics| {
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
    let (nats, provider) = (Nats::start(), answering(&[200], "done"));
    let gateway = taking_in(&nats, &provider).await;
    let worker = on(&nats, Gateway::worker())
        .var("faas_gateway_address", "127.0.0.1")
        .var("faas_gateway_port", gateway.address.port())
        .var("faas_print_body", "true")
        .var("write_debug", "true")
        .start()
        .await;
    let id = gateway.queued("echo", &[], "what is in it").await;
    gateway.becomes(&id, "succeeded").await;
    let counted = "gateway_function_invocation_total{code=\"200\",function_name=\"echo.fn\"} 2";
    gateway.metrics_show("the gateway has counted", |it| it.text.contains(counted)).await;
    assert!(!worker.metrics().await.text.contains("gateway_function_invocation_total{"));
    worker.logs("what is in it").await;
    worker.logs("Queued call executed").await;
}

#[tokio::test]
async fn a_worker_shows_what_the_queue_holds_as_a_gateway_does() {
    let (seen, let_go) = (Arc::default(), tokio::sync::watch::Sender::new(false));
    let (nats, provider) = (Nats::start(), holding(&seen, &let_go));
    let gateway = taking_in(&nats, &provider).await;
    let worker = on(&nats, Gateway::worker()).provider(&provider).var("max_inflight", "1");
    let worker = worker.start().await;
    eventually("it has one", async || seen.lock().unwrap().len() == 1).await;
    gateway.queued("echo", &["X-Delay-Seconds: 3600"], "").await;
    gateway.queued("echo", &[], "").await;
    let labels = "{function_name=\"echo.fn\",queue_name=\"faas-request\"}";
    let expect = [
        format!("queue_worker_pending_messages{labels} 1"),
        format!("queue_worker_function_invocation_inflight{labels} 1"),
        format!("gateway_queue_delayed_messages{labels} 1"),
        format!("gateway_queue_dead_letter_messages{labels} 0"),
    ];
    for process in [&gateway, &worker] {
        process
            .metrics_show("what it holds", |metrics| {
                expect.iter().all(|line| metrics.text.lines().any(|it| it == line))
            })
            .await;
    }
    let oldest = format!("gateway_queue_oldest_age_seconds{labels}");
    assert!(worker.metrics().await.text.contains(&oldest));
    let_go.send_replace(true);
}

#[tokio::test]
async fn workers_share_the_work_and_one_that_stops_gives_back_what_it_has() {
    let (seen, let_go) = (Arc::default(), tokio::sync::watch::Sender::new(false));
    let (nats, provider) = (Nats::start(), holding(&seen, &let_go));
    let gateway = taking_in(&nats, &provider).await;
    let worker = || {
        let worker = on(&nats, Gateway::worker()).provider(&provider).var("max_inflight", "4");
        worker.var("shutdown_grace", "1s").start()
    };
    let (one, two) = (worker().await, worker().await);
    let mut ids = Vec::new();
    for _ in 0..12 {
        ids.push(gateway.queued("echo", &[], "").await);
    }
    // Neither could have as many: one function has three places of four.
    eventually("both work", async || seen.lock().unwrap().len() == 6).await;
    assert!(one.terminate().await.success());
    let_go.send_replace(true);
    for id in &ids {
        gateway.becomes(id, "succeeded").await;
    }
    let made: HashSet<String> = seen.lock().unwrap().iter().cloned().collect();
    assert!(ids.iter().all(|id| made.contains(id)));
    // Those that were cut, and no others, came twice.
    assert!(seen.lock().unwrap().len() <= ids.len() + 1 + 4);
    drop(two);
}

#[tokio::test]
async fn a_worker_says_what_it_lacks() {
    for (vars, said) in [
        (vec![], "faas_nats_address is not set"),
        (vec![("queue", "embedded")], "queue: \"embedded\" is not"),
        (vec![("queue", "none"), ("faas_nats_address", "n")], "queue: \"none\" is not"),
        (vec![("queue", "jetstream")], "faas_nats_address is not set"),
    ] {
        let builder = vars.iter().fold(Gateway::worker(), |it, (name, value)| it.var(name, value));
        let output = builder.output(&["worker"]).await;
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(64), "{stderr}");
        assert!(stderr.contains(said), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
}

#[tokio::test]
async fn calls_that_differ_under_one_id_are_all_made() {
    let (nats, provider) = (Nats::start(), answering(&[200], "done"));
    let gateway = taking_in(&nats, &provider).await;
    let _worker = on(&nats, Gateway::worker()).provider(&provider).start().await;
    let mine = ["X-Call-Id: mine"];
    assert_eq!(gateway.queued("echo", &mine, "1").await, "mine");
    assert_eq!(gateway.queued("echo", &mine, "1").await, "mine");
    // Each function has a subject of its own there, so the id may be that of both.
    gateway.queued("other", &mine, "1").await;
    let another = gateway.queued("echo", &mine, "2").await;
    assert_ne!(another, "mine");
    gateway.becomes(&another, "succeeded").await;
    // One call more showed that calls are taken in.
    eventually("each is made", async || provider.calls() == 1 + 3).await;
    gateway.becomes("mine", "succeeded").await;
}
