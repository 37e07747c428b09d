//! Leases: which worker executes a call, and what happens to the calls of a worker that dies.

use std::time::{Duration, Instant};

use gateway_queue::embedded::Limits;
use gateway_queue::jetstream::Options;
use gateway_queue::status::CallState;
use gateway_queue::{JobQueue as _, JobStore as _};

use crate::support::jetstream_queue::{
    CONCURRENCY, LEASE, LIMITS, TestQueue, call, call_to, options, stream, succeeded,
};
use crate::support::nats::Nats;
use crate::support::{eventually, within};

#[tokio::test]
async fn a_long_running_call_is_delivered_once() {
    let nats = Nats::start();
    let lease = Duration::from_secs(1);
    let (queue, other) = (
        TestQueue::open(Options { lease, ..options(&nats) }).await,
        TestQueue::open(Options { lease, ..options(&nats) }).await,
    );
    eventually("the server responds", async || queue.inner.status("x").await.is_ok()).await;
    queue.publish(call("slow")).await;
    let delivery = queue.receive().await;
    assert!(other.receives_nothing(lease * 7 / 2).await);
    assert_eq!(queue.state("slow").await, Some(CallState::Running));
    queue.settle(delivery, succeeded()).await;
    assert!(other.receives_nothing(lease * 3 / 2).await);
    assert_eq!(queue.inner.status("slow").await.unwrap().unwrap().attempts, 1);
}

#[tokio::test]
async fn a_call_redelivered_to_its_own_worker_is_executed_once() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    queue.publish(call("a")).await;
    let delivery = queue.receive().await;
    // As if the lease had expired.
    let foreign = async_nats::connect(nats.url()).await.unwrap();
    let nak_subject = "$JS.ACK.gateway-faas-request-calls.fn,echo.1.1.1.0.0";
    foreign.publish(nak_subject, "-NAK".into()).await.unwrap();
    foreign.flush().await.unwrap();
    assert!(queue.receives_nothing(LEASE * 3 / 2).await);
    queue.settle(delivery, succeeded()).await;
    queue.wait_until_empty().await;
    let status = queue.inner.status("a").await.unwrap().unwrap();
    assert_eq!((status.state, status.attempts), (CallState::Succeeded, 1));
}

#[tokio::test]
async fn a_final_state_is_kept_while_its_message_may_be_redelivered() {
    let nats = Nats::start();
    let limits = Limits { result_ttl: 0, idempotency_ttl: 0, ..LIMITS };
    let queue = TestQueue::open(Options { limits, ..options(&nats) }).await;
    eventually("the server responds", async || queue.inner.status("x").await.is_ok()).await;
    queue.publish(call("a")).await;
    queue.settle(queue.receive().await, succeeded()).await;
    assert_eq!(queue.state("a").await, None);
    let notes = stream(&nats, "gateway-faas-request-notes").await;
    let cached = notes.cached_info();
    assert!(cached.config.max_age > LEASE * 2 && cached.state.messages == 1, "{cached:?}");
}

#[tokio::test]
async fn a_call_of_a_dead_worker_is_delivered_to_another() {
    let nats = Nats::start();
    let (queue, other) = (TestQueue::connected(&nats).await, TestQueue::connected(&nats).await);
    queue.publish(call("a")).await;
    let received = queue.receive().await;
    queue.crash(vec![received]).await;
    let delivery = other.receive().await;
    assert_eq!((delivery.call.id.as_str(), delivery.attempts), ("a", 0));
    other.settle(delivery, succeeded()).await;
    assert_eq!(other.state("a").await, Some(CallState::Succeeded));
}

#[tokio::test]
async fn two_receivers_share_the_calls() {
    const CALLS: usize = 30;
    let nats = Nats::start();
    let (one, two) = (TestQueue::connected(&nats).await, TestQueue::connected(&nats).await);
    for number in 0..CALLS {
        one.publish(call(&number.to_string())).await;
    }
    let executed = std::sync::Mutex::new(Vec::new());
    let work = async |queue: &TestQueue| {
        let mut own_count = 0;
        while executed.lock().unwrap().len() < CALLS {
            let received =
                tokio::time::timeout(Duration::from_millis(500), queue.inner.receive(CONCURRENCY));
            let Ok(delivery) = received.await else { continue };
            let delivery = delivery.unwrap();
            // Gives the other receiver time.
            tokio::time::sleep(Duration::from_millis(20)).await;
            executed.lock().unwrap().push(delivery.call.id.clone());
            queue.settle(delivery, succeeded()).await;
            own_count += 1;
        }
        own_count
    };
    let both = async { tokio::join!(work(&one), work(&two)) };
    let (first, second) = within("all calls are executed", both).await;
    assert!(first > 0 && second > 0, "{first} and {second}");
    let mut executed = executed.into_inner().unwrap();
    executed.sort_unstable();
    executed.dedup();
    assert_eq!((executed.len(), first + second), (CALLS, CALLS));
}

#[tokio::test]
async fn a_slow_function_does_not_block_another() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    for number in 0..30 {
        queue.publish(call_to("slow", &format!("s{number}"))).await;
    }
    // One function occupies all of its slots, and none of its calls ends.
    let mut hanging = Vec::new();
    while let Ok(received) = tokio::time::timeout(LEASE, queue.inner.receive(CONCURRENCY)).await {
        hanging.push(received.unwrap());
    }
    assert!((CONCURRENCY / 2..CONCURRENCY).contains(&hanging.len()), "{}", hanging.len());
    for number in 0..20 {
        queue.publish(call_to("quick", &format!("q{number}"))).await;
    }
    let start = Instant::now();
    for _ in 0..20 {
        let delivery = queue.receive().await;
        assert_eq!(delivery.call.function.name, "quick");
        queue.settle(delivery, succeeded()).await;
    }
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}
