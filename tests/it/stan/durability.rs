//! No accepted call is lost when gateways, workers and servers are killed.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use gateway_queue::JobQueue as _;
use gateway_queue::stan::Stan;
use gateway_queue::status::Settlement;

use crate::support::fake_stan::{CHANNEL, FakeStan};
use crate::support::gateway::Gateway;
use crate::support::nats::Nats;
use crate::support::queue::fast_retry;
use crate::support::stan_queue::{
    DEAD_LETTERS, DELAYED, call_id, on_stan, open_worker, succeeded, wait_until_acknowledged,
};
use crate::support::{eventually, within};

/// Receives calls as a worker of another machine does: it executes those of `echo`, retries others, and dead-letters
/// them.
async fn second_worker(queue: Stan, executed: Arc<Mutex<HashMap<String, usize>>>) {
    loop {
        let Ok(delivery) = queue.receive(4).await else { continue };
        if !matches!(delivery.claim().await, Ok(true)) {
            continue;
        }
        let settlement = match (delivery.call.function.name.as_str(), delivery.attempts) {
            ("echo", _) => {
                *executed.lock().unwrap().entry(delivery.call.id.clone()).or_default() += 1;
                succeeded()
            }
            ("fails", 1..) => {
                Settlement::DeadLetter { status: Some(500), reason: None, response: None }
            }
            _ => Settlement::Retry { at: gateway_queue::now() + 100, status: None, reason: None },
        };
        while delivery.settle(&settlement).await.is_err() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

#[tokio::test]
async fn no_call_is_lost_when_workers_and_servers_die() {
    const CALLS: usize = 300;
    let mut nats = Nats::start();
    let mut stan = FakeStan::start(&nats).await;
    let executed: Arc<Mutex<HashMap<String, usize>>> = Arc::default();
    let (noting, failed) = (Arc::clone(&executed), Arc::new(Mutex::new(HashSet::new())));
    let provider = fast_retry().handler(move |mut call| {
        let (noting, failed) = (Arc::clone(&noting), Arc::clone(&failed));
        async move {
            call.read_body().await.ok()?;
            let id = call.head.header("x-call-id").unwrap().to_owned();
            let target = call.head.target().to_owned();
            let fails = target.contains("fails")
                || target.contains("flaky") && failed.lock().unwrap().insert(id.clone());
            if !fails {
                *noting.lock().unwrap().entry(id).or_default() += 1;
            }
            call.send_response(if fails { 500 } else { 200 }, b"").await;
            Some(call.connection)
        }
    });
    let provider = provider.start();
    let gateway =
        on_stan(&nats, Gateway::builder()).provider(&provider).var("with_worker", "false");
    let gateway = gateway.start().await;
    let worker =
        || on_stan(&nats, Gateway::worker()).provider(&provider).var("ack_wait", "1s").start();
    let mut running = worker().await;
    let second = open_worker(&nats, "second").await;
    let second = tokio::spawn(second_worker(second, Arc::clone(&executed)));
    let enqueue = async |count: usize| {
        let mut ids = Vec::new();
        while ids.len() < count {
            let function = match ids.len() % 10 {
                0 => "fails",
                1..4 => "flaky",
                _ => "echo",
            };
            let response = gateway.send_async(function, &["X-Max-Attempts: 3"], "").await;
            if response.status() == 202 {
                ids.push(response.header("x-call-id").unwrap().to_owned());
            }
        }
        ids
    };
    let mut ids = within("calls are accepted", enqueue(CALLS / 3)).await;
    running.kill().await;
    running = worker().await;
    stan.kill().await;
    stan.restart().await;
    ids.extend(within("calls are accepted", enqueue(CALLS / 3)).await);
    nats.kill();
    nats.restart();
    ids.extend(within("calls are accepted", enqueue(CALLS / 3)).await);
    running.kill().await;
    let _running = on_stan(&nats, Gateway::worker()).provider(&provider).start().await;
    eventually("every call is executed or dead-lettered", async || {
        let dead: HashSet<String> = stan.messages(DEAD_LETTERS).iter().map(call_id).collect();
        let executed = executed.lock().unwrap();
        ids.iter().all(|id| executed.contains_key(id) || dead.contains(id))
    })
    .await;
    wait_until_acknowledged(&stan, CHANNEL).await;
    wait_until_acknowledged(&stan, DELAYED).await;
    second.abort();
    let dead: HashSet<String> = stan.messages(DEAD_LETTERS).iter().map(call_id).collect();
    assert!(dead.len() >= CALLS / 10, "{}", dead.len());
    // Calls in flight at one of two kills, and those whose state the killed server had lost, were executed twice.
    let calls: usize = executed.lock().unwrap().values().sum();
    assert!(calls <= CALLS + 4 * 50, "{calls}");
}
