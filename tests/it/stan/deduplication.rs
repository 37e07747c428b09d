//! NATS Streaming that freezes for a while, and calls that it has stored several times.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use gateway_queue::JobQueue as _;
use gateway_queue::stan::Stan;
use serde_json::json;

use crate::support::eventually;
use crate::support::fake_stan::{CHANNEL, FakeStan};
use crate::support::gateway::{Builder, Gateway};
use crate::support::nats::Nats;
use crate::support::nats_streaming::NatsStreaming;
use crate::support::provider::Provider;
use crate::support::queue::replying_with;
use crate::support::stan_queue::{
    on_stan, open_registered_worker, open_worker_at, receive, succeeded, wait_until_acknowledged,
};

const LOG: &str = "faas-request.executed";
const DELAYED: &str = "faas-request.later";

fn on_nats_streaming(server: &NatsStreaming, builder: Builder) -> Builder {
    builder
        .var("queue", "stan")
        .var("faas_nats_address", "127.0.0.1")
        .var("faas_nats_port", server.port())
        // The calls of a frozen worker are redelivered soon.
        .var("ack_wait", "2s")
}

/// A gateway that enqueues calls and does not execute them.
async fn publisher(server: &NatsStreaming, provider: &Provider) -> Gateway {
    let gateway = on_nats_streaming(server, Gateway::builder())
        .provider(provider)
        .var("with_worker", "false");
    let gateway = gateway.start().await;
    gateway.wait_for_log("Registered with NATS Streaming").await;
    gateway
}

async fn is_degraded(gateway: &Gateway) -> bool {
    let ready = gateway.get("/_/ready").await;
    assert_eq!(ready.status(), 200, "{ready}");
    ready.text().contains(r#""degraded":["queue"]"#)
}

#[tokio::test]
async fn a_frozen_server_is_noticed_immediately() {
    let (server, provider) = (NatsStreaming::start().await, replying_with(&[200], "x"));
    let gateway = publisher(&server, &provider).await;
    eventually("the queue is available", async || !is_degraded(&gateway).await).await;
    server.freeze();
    let frozen = Instant::now();
    eventually("the queue is unavailable", async || is_degraded(&gateway).await).await;
    // Three seconds on an idle machine.
    assert!(frozen.elapsed() < Duration::from_secs(12), "{:?}", frozen.elapsed());
    // Calls refused from now on are not stored later.
    let responses = (0..4).map(|_| gateway.send_async("echo", &[], ""));
    for response in futures_util::future::join_all(responses).await {
        assert_eq!(
            (response.status(), response.header("retry-after")),
            (503, Some("1")),
            "{response}"
        );
        assert!(response.text().contains("cannot be reached"), "{response}");
    }
    server.thaw();
    eventually("the queue is available", async || !is_degraded(&gateway).await).await;
    gateway.enqueue("echo", &[], "").await;
    assert_eq!(server.message_count().await, 1);
}

#[tokio::test]
async fn a_call_published_again_with_its_id_is_executed_once() {
    const AGAIN: u64 = 5;
    let (server, provider) = (NatsStreaming::start().await, replying_with(&[200], "x"));
    let gateway = publisher(&server, &provider).await;
    let worker = || on_nats_streaming(&server, Gateway::worker()).provider(&provider).start();
    let running = worker().await;
    running.wait_for_log("Registered with NATS Streaming").await;
    let send = || gateway.send_async("echo", &["X-Call-Id: a"], "body");
    eventually("calls are sent before the gateway notices", async || {
        server.freeze();
        let mut sent = 0;
        for response in futures_util::future::join_all((0..AGAIN).map(|_| send())).await {
            // On a busy machine, the gateway may have noticed: then the call is not sent.
            if response.status() == 503 && response.text().contains("cannot be reached") {
                continue;
            }
            assert_eq!(
                (response.status(), response.header("x-call-id")),
                (503, Some("a")),
                "{response}"
            );
            assert!(response.text().contains("executed once"), "{response}");
            sent += 1;
        }
        server.thaw();
        eventually("calls are accepted", async || send().await.status() == 202).await;
        sent > 0
    })
    .await;
    // Sent messages are stored once the server continues.
    eventually("the call is stored several times", async || server.message_count().await > 1).await;
    server.wait_until_drained(server.message_count().await).await;
    assert_eq!(provider.call_count(), 1);
    // The id is known to workers that start later.
    assert!(running.terminate().await.success());
    let stored = server.message_count().await;
    assert_eq!(send().await.status(), 202);
    let running = worker().await;
    server.wait_until_drained(stored + 1).await;
    running.kill().await;
    assert_eq!(send().await.status(), 202);
    let running = worker().await;
    server.wait_until_drained(stored + 2).await;
    assert_eq!(provider.call_count(), 1);
    running.wait_for_log("this duplicate is not executed").await;
    // A different call with the same id is another call.
    assert_eq!(gateway.send_async("echo", &["X-Call-Id: a"], "other").await.status(), 202);
    server.wait_until_drained(stored + 3).await;
    assert_eq!(provider.call_count(), 2);
}

/// Executes and counts calls as a worker of another machine does.
async fn count(queue: Stan, executed: Arc<Mutex<HashMap<String, usize>>>) {
    loop {
        let Ok(delivery) = queue.receive(4).await else { continue };
        if delivery.claim().await == Ok(true) {
            *executed.lock().unwrap().entry(delivery.call.id.clone()).or_default() += 1;
            while delivery.settle(&succeeded()).await.is_err() {}
        }
    }
}

#[tokio::test]
async fn simultaneous_duplicates_on_several_workers_are_executed_once() {
    const CALLS: usize = 40;
    const COPIES: usize = 4;
    let server = NatsStreaming::start().await;
    let provider = replying_with(&[200], "x");
    let gateway = publisher(&server, &provider).await;
    let executed: Arc<Mutex<HashMap<String, usize>>> = Arc::default();
    let ids: Vec<String> = (0..CALLS).map(|number| format!("X-Call-Id: {number}")).collect();
    for id in &ids {
        let id = [id.as_str()];
        let copies = (0..COPIES).map(|_| async {
            // On a busy machine the server may be slow to confirm one.
            let queued = async || gateway.send_async("echo", &id, "").await.status() == 202;
            eventually("the call is enqueued", queued).await;
        });
        futures_util::future::join_all(copies).await;
    }
    let mut workers = Vec::new();
    for host in ["one", "two", "three"] {
        let queue = open_worker_at(server.url(), host).await;
        workers.push(tokio::spawn(count(queue, Arc::clone(&executed))));
    }
    server.wait_until_drained(server.message_count().await).await;
    workers.iter().for_each(tokio::task::JoinHandle::abort);
    let executed = executed.lock().unwrap();
    assert_eq!(executed.len(), CALLS);
    assert!(executed.values().all(|count| *count == 1), "{executed:?}");
}

#[tokio::test]
async fn a_call_of_a_dead_worker_is_executed_once_by_another() {
    let nats = Nats::start();
    let stan = FakeStan::start(&nats).await;
    let message = json!({ "Function": "echo", "Header": { "X-Call-Id": ["a"] } }).to_string();
    let one = open_registered_worker(&nats, &stan, "one").await;
    stan.store_message(CHANNEL, message.clone());
    let delivery = receive(&one).await;
    assert_eq!(delivery.claim().await, Ok(true));
    // The worker may have executed the call, and has told no other worker.
    drop(delivery);
    one.close().await;
    let two = open_registered_worker(&nats, &stan, "two").await;
    let delivery = receive(&two).await;
    assert_eq!(delivery.claim().await, Ok(true));
    delivery.settle(&succeeded()).await.unwrap();
    wait_until_acknowledged(&stan, CHANNEL).await;
    two.close().await;
    let three = open_registered_worker(&nats, &stan, "three").await;
    stan.store_message(CHANNEL, message);
    let delivery = receive(&three).await;
    assert_eq!(delivery.claim().await, Ok(false));
    wait_until_acknowledged(&stan, CHANNEL).await;
    // A dead letter that is published again is executed again.
    let dead = json!({
        "Function": "echo",
        "Header": { "X-Call-Id": ["a"], "X-Gateway-Reason": ["status 500"], "X-Gateway-Attempts": ["3"] },
    });
    stan.store_message(CHANNEL, dead.to_string());
    let delivery = receive(&three).await;
    assert_eq!((delivery.claim().await, delivery.attempts), (Ok(true), 0));
    delivery.settle(&succeeded()).await.unwrap();
    wait_until_acknowledged(&stan, CHANNEL).await;
}

#[tokio::test]
async fn a_lost_ack_of_a_dead_worker_repeats_no_call() {
    let nats = Nats::start();
    let stan = FakeStan::start(&nats).await;
    let one = open_registered_worker(&nats, &stan, "one").await;
    stan.store_message(CHANNEL, r#"{"Function":"echo","Header":{"X-Call-Id":["a"]}}"#);
    let delivery = receive(&one).await;
    assert_eq!(delivery.claim().await, Ok(true));
    stan.lose_acks(CHANNEL, true);
    delivery.settle(&succeeded()).await.unwrap();
    one.close().await;
    stan.lose_acks(CHANNEL, false);
    let two = open_registered_worker(&nats, &stan, "two").await;
    let delivery = receive(&two).await;
    assert_eq!(delivery.claim().await, Ok(false));
    wait_until_acknowledged(&stan, CHANNEL).await;
}

#[tokio::test]
async fn a_delayed_call_is_executed_once_if_its_ack_is_lost() {
    const DELAY: Duration = Duration::from_secs(5);
    let nats = Nats::start();
    let stan = FakeStan::start(&nats).await;
    let one = open_registered_worker(&nats, &stan, "one").await;
    stan.lose_acks(CHANNEL, true);
    let message = r#"{"Function":"echo","Header":{"X-Call-Id":["a"],"X-Delay-Seconds":["5"]}}"#;
    stan.store_message(CHANNEL, message);
    let stored = Instant::now();
    eventually("the call is moved", async || stan.message_count(DELAYED) == 1).await;
    // The log contains the claim and the end of the message.
    eventually("the log contains the entries", async || stan.message_count(LOG) >= 2).await;
    one.close().await;
    stan.lose_acks(CHANNEL, false);
    // Until then the message would be moved again and recognized as a duplicate.
    tokio::time::sleep((DELAY + Duration::from_millis(50)).saturating_sub(stored.elapsed())).await;
    let two = open_registered_worker(&nats, &stan, "two").await;
    let mut executions = 0;
    for _ in 0..2 {
        let delivery = receive(&two).await;
        if delivery.claim().await == Ok(true) {
            executions += 1;
            delivery.settle(&succeeded()).await.unwrap();
        }
    }
    assert_eq!(executions, 1);
    wait_until_acknowledged(&stan, CHANNEL).await;
    wait_until_acknowledged(&stan, DELAYED).await;
}

#[tokio::test]
async fn calls_are_executed_if_the_server_refuses_the_execution_log() {
    let (nats, provider) = (Nats::start(), replying_with(&[500, 200], "x"));
    let stan = FakeStan::start(&nats).await;
    stan.withhold_channels(LOG);
    stan.refuse(LOG, usize::MAX);
    let worker = on_stan(&nats, Gateway::worker()).provider(&provider).start().await;
    stan.store_message(CHANNEL, r#"{"Function":"echo"}"#);
    wait_until_acknowledged(&stan, CHANNEL).await;
    eventually("the call is retried", async || provider.call_count() == 2).await;
    let is_refusal = |line: &&String| line.contains("rejects the channel");
    assert_eq!(worker.log().iter().filter(is_refusal).count(), 1);
}
