//! No accepted call is lost when gateways, workers and servers are killed.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use gateway::queue::Queue;
use gateway::queue::status::Settlement;

use crate::support::fake_stan::{CHANNEL, Stan};
use crate::support::gateway::Gateway;
use crate::support::nats::Nats;
use crate::support::queue::patient;
use crate::support::stan_queue::{DEAD, LATER, all_done, id_of, member, on, over};
use crate::support::{eventually, within};

/// Takes calls as a worker of another machine does: it has those of `echo` made, puts others off, and buries them.
async fn second_worker(queue: Queue, made: Arc<Mutex<HashMap<String, usize>>>) {
    loop {
        let Ok(delivery) = queue.receive(4).await else { continue };
        if !matches!(queue.claim(&delivery).await, Ok(true)) {
            continue;
        }
        let settlement = match (delivery.call.function.name.as_str(), delivery.attempts) {
            ("echo", _) => {
                *made.lock().unwrap().entry(delivery.call.id.clone()).or_default() += 1;
                over()
            }
            ("fails", 1..) => {
                Settlement::DeadLetter { status: Some(500), reason: None, response: None }
            }
            _ => Settlement::Retry { at: gateway::queue::now() + 100, status: None, reason: None },
        };
        while queue.settle(&delivery, &settlement).await.is_err() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

#[tokio::test]
async fn no_call_is_lost_whoever_dies() {
    const CALLS: usize = 300;
    let mut nats = Nats::start();
    let mut stan = Stan::start(&nats).await;
    let made: Arc<Mutex<HashMap<String, usize>>> = Arc::default();
    let (noting, failed) = (Arc::clone(&made), Arc::new(Mutex::new(HashSet::new())));
    let provider = patient().answering(move |mut call| {
        let (noting, failed) = (Arc::clone(&noting), Arc::clone(&failed));
        async move {
            call.body().await.ok()?;
            let id = call.head.header("x-call-id").unwrap().to_owned();
            let target = call.head.target().to_owned();
            let fails = target.contains("fails")
                || target.contains("flaky") && failed.lock().unwrap().insert(id.clone());
            if !fails {
                *noting.lock().unwrap().entry(id).or_default() += 1;
            }
            call.answer_with(if fails { 500 } else { 200 }, b"").await;
            Some(call.wire)
        }
    });
    let provider = provider.start();
    let gateway = on(&nats, Gateway::builder()).provider(&provider).var("with_worker", "false");
    let gateway = gateway.start().await;
    let worker = || on(&nats, Gateway::worker()).provider(&provider).var("ack_wait", "1s").start();
    let mut running = worker().await;
    let second = member(&nats, "second").await;
    let second = tokio::spawn(second_worker(second, Arc::clone(&made)));
    let taken = async |count: usize| {
        let mut ids = Vec::new();
        while ids.len() < count {
            let function = match ids.len() % 10 {
                0 => "fails",
                1..4 => "flaky",
                _ => "echo",
            };
            let answer = gateway.queue(function, &["X-Max-Attempts: 3"], "").await;
            if answer.status() == 202 {
                ids.push(answer.header("x-call-id").unwrap().to_owned());
            }
        }
        ids
    };
    let mut ids = within("calls are taken in", taken(CALLS / 3)).await;
    running.kill().await;
    running = worker().await;
    stan.kill().await;
    stan.restart().await;
    ids.extend(within("calls are taken in", taken(CALLS / 3)).await);
    nats.kill();
    nats.restart();
    ids.extend(within("calls are taken in", taken(CALLS / 3)).await);
    running.kill().await;
    let _running = on(&nats, Gateway::worker()).provider(&provider).start().await;
    eventually("every call is made or given up", async || {
        let dead: HashSet<String> = stan.messages(DEAD).iter().map(id_of).collect();
        let made = made.lock().unwrap();
        ids.iter().all(|id| made.contains_key(id) || dead.contains(id))
    })
    .await;
    all_done(&stan, CHANNEL).await;
    all_done(&stan, LATER).await;
    second.abort();
    let dead: HashSet<String> = stan.messages(DEAD).iter().map(id_of).collect();
    assert!(dead.len() >= CALLS / 10, "{}", dead.len());
    // What was in flight at one of two kills came twice, and what the dead server had no word of.
    let calls: usize = made.lock().unwrap().values().sum();
    assert!(calls <= CALLS + 4 * 50, "{calls}");
}
