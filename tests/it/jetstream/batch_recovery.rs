//! Batches whose worker or server dies.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use bytes::Bytes;
use gateway_queue::embedded::Limits;
use gateway_queue::jetstream::Options;
use gateway_queue::status::CallState;
use gateway_queue::{Filter, JobQueue as _, JobStore as _};

use crate::support::eventually;
use crate::support::jetstream_batch::{CALLS, id_set, new_call};
use crate::support::jetstream_queue::{
    CONCURRENCY, LEASE, LIMITS, TestQueue, dead_lettered, foreign_client, options, retry,
    succeeded, unix_millis,
};
use crate::support::nats::Nats;

#[tokio::test]
async fn another_worker_executes_the_rest_of_a_dead_workers_batch() {
    let nats = Nats::start();
    let (queue, other) = (TestQueue::connected(&nats).await, TestQueue::connected(&nats).await);
    let ids = queue.publish_batch(CALLS, new_call).await;
    let mut done = BTreeSet::new();
    for number in 0..6 {
        let delivery = queue.receive().await;
        let id = delivery.call.id.clone();
        match number {
            4 => queue.settle(delivery, retry(unix_millis())).await,
            5 => queue.settle(delivery, dead_lettered()).await,
            _ => {
                queue.settle(delivery, succeeded()).await;
                done.insert(id);
            }
        }
    }
    let filter = Filter { dead_letter: Some(true), ..Filter::default() };
    let dead = queue.inner.list(&filter, None, 9).await.unwrap().calls[0].id.clone();
    let running = queue.receive().await;
    let died = running.call.id.clone();
    queue.inner.close().await;
    std::mem::forget(running);
    let mut executed = BTreeMap::new();
    while executed.len() < CALLS - done.len() - 1 {
        let delivery = other.receive().await;
        *executed.entry(delivery.call.id.clone()).or_insert(0) += 1;
        other.settle(delivery, succeeded()).await;
    }
    assert!(executed.values().all(|times| *times == 1), "{executed:?}");
    assert!(executed.contains_key(&died) && !executed.contains_key(&dead));
    let executed = executed.into_keys().collect();
    assert_eq!(&(&executed | &done) | &BTreeSet::from([dead]), id_set(&ids));
    other.assert_nothing_redelivered().await;
}

#[tokio::test]
async fn a_purged_call_is_not_executed_with_the_rest_of_its_batch() {
    let nats = Nats::start();
    let (queue, other) = (TestQueue::connected(&nats).await, TestQueue::connected(&nats).await);
    let ids = queue.publish_batch(3, new_call).await;
    let (first, second, third) =
        (queue.receive().await, queue.receive().await, queue.receive().await);
    let id = first.call.id.clone();
    queue.settle(first, retry(unix_millis())).await;
    let again = queue.receive().await;
    assert_eq!((&again.call.id, again.attempts), (&id, 1));
    queue.settle(again, succeeded()).await;
    let succeeded_ones = Filter { state: Some(CallState::Succeeded), ..Filter::default() };
    assert_eq!(queue.inner.purge(&succeeded_ones).await, Ok(1));
    assert_eq!(queue.state(&id).await, None);
    let left = BTreeSet::from([second.call.id.clone(), third.call.id.clone()]);
    queue.crash(vec![second, third]).await;
    let mut executed = BTreeSet::new();
    for _ in 0..2 {
        let delivery = other.receive().await;
        executed.insert(delivery.call.id.clone());
        other.settle(delivery, succeeded()).await;
    }
    assert_eq!((executed, ids.len()), (left, 3));
    other.assert_nothing_redelivered().await;
}

#[tokio::test]
async fn unstarted_calls_of_a_busy_worker_go_to_another() {
    let nats = Nats::start();
    let (queue, other) = (TestQueue::connected(&nats).await, TestQueue::connected(&nats).await);
    let ids = queue.publish_batch(CALLS, new_call).await;
    let start = Instant::now();
    let slow = queue.receive().await;
    let mut executed = BTreeSet::new();
    while executed.len() < CALLS - 1 {
        let delivery = other.receive().await;
        assert!(executed.insert(delivery.call.id.clone()));
        other.settle(delivery, succeeded()).await;
    }
    assert!(start.elapsed() < LEASE * 2, "released, not expired");
    assert_eq!(queue.state(&slow.call.id).await, Some(CallState::Running));
    // The call in execution stays with its worker.
    assert!(other.receives_nothing(LEASE * 3 / 2).await);
    executed.insert(slow.call.id.clone());
    queue.settle(slow, succeeded()).await;
    assert_eq!(executed, id_set(&ids));
    queue.wait_until_empty().await;
    assert!(other.receives_nothing(LEASE * 3 / 2).await);
}

#[tokio::test]
async fn a_stopping_worker_releases_unstarted_calls_immediately() {
    let nats = Nats::start();
    // With this lease, only a release can explain a redelivery in time.
    let (queue, other) =
        (TestQueue::with_long_lease(&nats).await, TestQueue::with_long_lease(&nats).await);
    let ids = queue.publish_batch(CALLS, new_call).await;
    let delivery = queue.receive().await;
    let mut executed = BTreeSet::from([delivery.call.id.clone()]);
    queue.settle(delivery, succeeded()).await;
    queue.inner.close().await;
    while executed.len() < CALLS {
        let delivery = other.receive().await;
        assert!(executed.insert(delivery.call.id.clone()));
        other.settle(delivery, succeeded()).await;
    }
    assert_eq!(executed, id_set(&ids));
    other.wait_until_empty().await;
}

#[tokio::test]
async fn no_batched_call_is_lost_when_the_server_is_killed() {
    const ALL: usize = 200;
    let mut nats = Nats::start();
    let limits = Limits { max_pending: 1000, ..LIMITS };
    let queue = TestQueue::open(Options { limits, ..options(&nats) }).await;
    eventually("the server responds", async || queue.inner.status("x").await.is_ok()).await;
    let ids = queue.publish_batch(ALL, new_call).await;
    let executed = std::sync::Mutex::new(BTreeMap::new());
    let work = async {
        loop {
            let delivery = queue.inner.receive(CONCURRENCY).await.unwrap();
            *executed.lock().unwrap().entry(delivery.call.id.clone()).or_insert(0) += 1;
            // A call that cannot be settled is redelivered.
            let _ = delivery.settle(&succeeded()).await;
        }
    };
    let trouble = async {
        for at in [30, 90, 150] {
            eventually("some calls are executed", async || executed.lock().unwrap().len() >= at)
                .await;
            nats.kill();
            nats.restart();
        }
        for id in &ids {
            eventually("the call has succeeded", async || {
                let status = queue.inner.status(id).await;
                status.is_ok_and(|status| {
                    status.is_some_and(|status| status.state == CallState::Succeeded)
                })
            })
            .await;
        }
    };
    tokio::select! {
        () = work => {}
        () = trouble => {}
    }
    let executed = executed.into_inner().unwrap();
    let twice = executed.values().filter(|times| **times > 1).count();
    assert!(executed.len() == ALL && twice <= 3 * CONCURRENCY, "{twice} executed twice");
    queue.assert_nothing_redelivered().await;
}

#[tokio::test]
async fn an_invalid_batch_does_not_block_other_batches() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    let ids = queue.publish_batch(CALLS, new_call).await;
    let foreign = foreign_client(&nats).await;
    for (key, payload) in
        [("+000000000001", ""), ("+000000000002", "\0\0\0\u{7f}x"), ("+00000000003f", "{}")]
    {
        let subject = format!("faas.faas-request.fn.echo.{key}");
        let payload = Bytes::from_static(payload.as_bytes());
        foreign.publish(subject, payload.clone()).await.unwrap().await.unwrap();
        let subject = format!("faas-open.faas-request.fn.echo.{key}");
        foreign.publish(subject, payload).await.unwrap().await.unwrap();
    }
    let mut executed = BTreeSet::new();
    for _ in 0..CALLS {
        let delivery = queue.receive().await;
        executed.insert(delivery.call.id.clone());
        queue.settle(delivery, succeeded()).await;
    }
    assert_eq!(executed, id_set(&ids));
    assert!(queue.inner.depths().await.is_ok());
    assert!(queue.inner.list(&Filter::default(), None, 99).await.is_ok());
    assert!(queue.receives_nothing(Duration::from_secs(1)).await);
}
