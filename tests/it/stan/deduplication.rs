//! NATS Streaming that stands still for a while, and calls that it has stored several times.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use gateway::queue::Queue;
use serde_json::json;

use crate::support::eventually;
use crate::support::fake_stan::{CHANNEL, Stan};
use crate::support::gateway::{Builder, Gateway};
use crate::support::nats::Nats;
use crate::support::nats_streaming::NatsStreaming;
use crate::support::provider::Provider;
use crate::support::queue::answering;
use crate::support::stan_queue::{all_done, member_at, on, over, take, working};

const LOG: &str = "faas-request.executed";
const LATER: &str = "faas-request.later";

fn on_real(server: &NatsStreaming, builder: Builder) -> Builder {
    builder
        .var("queue", "stan")
        .var("faas_nats_address", "127.0.0.1")
        .var("faas_nats_port", server.port())
        // What was frozen for a while is given to others soon.
        .var("ack_wait", "2s")
}

/// A gateway that takes calls in, and does not make them.
async fn publisher(server: &NatsStreaming, provider: &Provider) -> Gateway {
    let gateway =
        on_real(server, Gateway::builder()).provider(provider).var("with_worker", "false");
    let gateway = gateway.start().await;
    gateway.logs("Registered with NATS Streaming").await;
    gateway
}

async fn is_degraded(gateway: &Gateway) -> bool {
    let ready = gateway.get("/_/ready").await;
    assert_eq!(ready.status(), 200, "{ready}");
    ready.text().contains(r#""degraded":["queue"]"#)
}

#[tokio::test]
async fn a_server_that_stands_still_is_noticed_at_once() {
    let (server, provider) = (NatsStreaming::start().await, answering(&[200], "x"));
    let gateway = publisher(&server, &provider).await;
    eventually("the queue is there", async || !is_degraded(&gateway).await).await;
    server.freeze();
    let frozen = Instant::now();
    eventually("the queue is away", async || is_degraded(&gateway).await).await;
    // Three seconds on a machine that has time for it; it was twenty.
    assert!(frozen.elapsed() < Duration::from_secs(12), "{:?}", frozen.elapsed());
    // What is refused from now on is not stored later.
    let answers = (0..4).map(|_| gateway.queue("echo", &[], ""));
    for answer in futures_util::future::join_all(answers).await {
        assert_eq!((answer.status(), answer.header("retry-after")), (503, Some("1")), "{answer}");
        assert!(answer.text().contains("cannot be reached"), "{answer}");
    }
    server.thaw();
    eventually("the queue is there", async || !is_degraded(&gateway).await).await;
    gateway.queued("echo", &[], "").await;
    assert_eq!(server.stored().await, 1);
}

#[tokio::test]
async fn a_call_that_is_sent_again_with_its_id_is_executed_once() {
    const AGAIN: u64 = 5;
    let (server, provider) = (NatsStreaming::start().await, answering(&[200], "x"));
    let gateway = publisher(&server, &provider).await;
    let worker = || on_real(&server, Gateway::worker()).provider(&provider).start();
    let running = worker().await;
    running.logs("Registered with NATS Streaming").await;
    let send = || gateway.queue("echo", &["X-Call-Id: a"], "body");
    eventually("calls are sent before the gateway notices", async || {
        server.freeze();
        let mut sent = 0;
        for answer in futures_util::future::join_all((0..AGAIN).map(|_| send())).await {
            // On a busy machine, the gateway may have noticed: then the call is not sent.
            if answer.status() == 503 && answer.text().contains("cannot be reached") {
                continue;
            }
            assert_eq!((answer.status(), answer.header("x-call-id")), (503, Some("a")), "{answer}");
            assert!(answer.text().contains("executed once"), "{answer}");
            sent += 1;
        }
        server.thaw();
        eventually("it takes in", async || send().await.status() == 202).await;
        sent > 0
    })
    .await;
    // What was sent is stored once the server goes on.
    eventually("it is stored several times", async || server.stored().await > 1).await;
    server.drained(server.stored().await).await;
    assert_eq!(provider.calls(), 1);
    // It is remembered by those who come later.
    assert!(running.terminate().await.success());
    let stored = server.stored().await;
    assert_eq!(send().await.status(), 202);
    let running = worker().await;
    server.drained(stored + 1).await;
    running.kill().await;
    assert_eq!(send().await.status(), 202);
    let running = worker().await;
    server.drained(stored + 2).await;
    assert_eq!(provider.calls(), 1);
    running.logs("this duplicate is not executed").await;
    // Another call under the same id is another call.
    assert_eq!(gateway.queue("echo", &["X-Call-Id: a"], "other").await.status(), 202);
    server.drained(stored + 3).await;
    assert_eq!(provider.calls(), 2);
}

/// Executes calls, and counts them, as a worker of another machine does.
async fn count(queue: Queue, executed: Arc<Mutex<HashMap<String, usize>>>) {
    loop {
        let Ok(delivery) = queue.receive(4).await else { continue };
        if queue.claim(&delivery).await == Ok(true) {
            *executed.lock().unwrap().entry(delivery.call.id.clone()).or_default() += 1;
            while queue.settle(&delivery, &over()).await.is_err() {}
        }
    }
}

#[tokio::test]
async fn duplicates_that_come_to_several_workers_at_once_are_executed_once() {
    const CALLS: usize = 40;
    const COPIES: usize = 4;
    let server = NatsStreaming::start().await;
    let provider = answering(&[200], "x");
    let gateway = publisher(&server, &provider).await;
    let executed: Arc<Mutex<HashMap<String, usize>>> = Arc::default();
    let ids: Vec<String> = (0..CALLS).map(|number| format!("X-Call-Id: {number}")).collect();
    for id in &ids {
        let id = [id.as_str()];
        let copies = (0..COPIES).map(|_| async {
            // On a busy machine the server may be slow to confirm one.
            let queued = async || gateway.queue("echo", &id, "").await.status() == 202;
            eventually("it is queued", queued).await;
        });
        futures_util::future::join_all(copies).await;
    }
    let mut workers = Vec::new();
    for host in ["one", "two", "three"] {
        let queue = member_at(server.url(), host).await;
        workers.push(tokio::spawn(count(queue, Arc::clone(&executed))));
    }
    server.drained(server.stored().await).await;
    workers.iter().for_each(tokio::task::JoinHandle::abort);
    let executed = executed.lock().unwrap();
    assert_eq!(executed.len(), CALLS);
    assert!(executed.values().all(|count| *count == 1), "{executed:?}");
}

#[tokio::test]
async fn a_call_whose_worker_has_died_is_executed_by_another_and_then_no_more() {
    let nats = Nats::start();
    let stan = Stan::start(&nats).await;
    let message = json!({ "Function": "echo", "Header": { "X-Call-Id": ["a"] } }).to_string();
    let one = working(&nats, &stan, "one").await;
    stan.store_message(CHANNEL, message.clone());
    let delivery = take(&one).await;
    assert_eq!(one.claim(&delivery).await, Ok(true));
    // It has executed the call, for all that anybody knows, and says so to nobody.
    drop(delivery);
    one.stop().await;
    let two = working(&nats, &stan, "two").await;
    let delivery = take(&two).await;
    assert_eq!(two.claim(&delivery).await, Ok(true));
    two.settle(&delivery, &over()).await.unwrap();
    all_done(&stan, CHANNEL).await;
    two.stop().await;
    let three = working(&nats, &stan, "three").await;
    stan.store_message(CHANNEL, message);
    let delivery = take(&three).await;
    assert_eq!(three.claim(&delivery).await, Ok(false));
    all_done(&stan, CHANNEL).await;
    // One that was dead and is published again is executed again.
    let dead = json!({
        "Function": "echo",
        "Header": { "X-Call-Id": ["a"], "X-Gateway-Reason": ["status 500"], "X-Gateway-Attempts": ["3"] },
    });
    stan.store_message(CHANNEL, dead.to_string());
    let delivery = take(&three).await;
    assert_eq!((three.claim(&delivery).await, delivery.attempts), (Ok(true), 0));
    three.settle(&delivery, &over()).await.unwrap();
    all_done(&stan, CHANNEL).await;
}

#[tokio::test]
async fn an_acknowledgement_that_is_lost_with_its_worker_repeats_nothing() {
    let nats = Nats::start();
    let stan = Stan::start(&nats).await;
    let one = working(&nats, &stan, "one").await;
    stan.store_message(CHANNEL, r#"{"Function":"echo","Header":{"X-Call-Id":["a"]}}"#);
    let delivery = take(&one).await;
    assert_eq!(one.claim(&delivery).await, Ok(true));
    stan.lose_acknowledgements(CHANNEL, true);
    one.settle(&delivery, &over()).await.unwrap();
    one.stop().await;
    stan.lose_acknowledgements(CHANNEL, false);
    let two = working(&nats, &stan, "two").await;
    let delivery = take(&two).await;
    assert_eq!(two.claim(&delivery).await, Ok(false));
    all_done(&stan, CHANNEL).await;
}

#[tokio::test]
async fn a_call_that_was_moved_is_executed_once_though_its_acknowledgement_is_lost() {
    const DELAY: Duration = Duration::from_secs(5);
    let nats = Nats::start();
    let stan = Stan::start(&nats).await;
    let one = working(&nats, &stan, "one").await;
    stan.lose_acknowledgements(CHANNEL, true);
    let message = r#"{"Function":"echo","Header":{"X-Call-Id":["a"],"X-Delay-Seconds":["5"]}}"#;
    stan.store_message(CHANNEL, message);
    let stored = Instant::now();
    eventually("it is moved", async || stan.stored(LATER) == 1).await;
    // The log has that the message was claimed, and that it is over.
    eventually("the log has it", async || stan.stored(LOG) >= 2).await;
    one.stop().await;
    stan.lose_acknowledgements(CHANNEL, false);
    // Until then the message would be moved again, and that would be known for a duplicate.
    tokio::time::sleep((DELAY + Duration::from_millis(50)).saturating_sub(stored.elapsed())).await;
    let two = working(&nats, &stan, "two").await;
    let mut executions = 0;
    for _ in 0..2 {
        let delivery = take(&two).await;
        if two.claim(&delivery).await == Ok(true) {
            executions += 1;
            two.settle(&delivery, &over()).await.unwrap();
        }
    }
    assert_eq!(executions, 1);
    all_done(&stan, CHANNEL).await;
    all_done(&stan, LATER).await;
}

#[tokio::test]
async fn calls_are_executed_where_the_server_has_no_place_for_the_log() {
    let (nats, provider) = (Nats::start(), answering(&[500, 200], "x"));
    let stan = Stan::start(&nats).await;
    stan.deliver_none_of(LOG);
    stan.refuse(LOG, usize::MAX);
    let worker = on(&nats, Gateway::worker()).provider(&provider).start().await;
    stan.store_message(CHANNEL, r#"{"Function":"echo"}"#);
    all_done(&stan, CHANNEL).await;
    eventually("it is made again", async || provider.calls() == 2).await;
    let told = |line: &&String| line.contains("no place for the channel");
    assert_eq!(worker.log().iter().filter(told).count(), 1);
}
