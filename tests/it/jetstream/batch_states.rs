//! Calls that are published at the same time share a NATS message. Each of them has its own state.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use gateway_queue::status::CallState;
use gateway_queue::{ChangeOutcome, Filter, JobStore as _};

use crate::support::eventually;
use crate::support::jetstream_batch::{CALLS, id_set, message_count, new_call};
use crate::support::jetstream_queue::{TestQueue, dead_lettered, retry, succeeded, unix_millis};
use crate::support::nats::Nats;

#[tokio::test]
async fn batched_calls_pass_through_their_states() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    let ids = queue.publish_batch(CALLS, new_call).await;
    assert_eq!(id_set(&ids).len(), CALLS);
    assert!(message_count(&nats, "calls").await < 5, "the calls are batched");
    for id in &ids {
        assert_eq!(queue.state(id).await, Some(CallState::Queued));
        assert_eq!(queue.inner.result(id).await, Ok(None));
    }
    assert_eq!(queue.depths("echo.fn").await, (CALLS as u64, 0, 0, 0));
    let listed = queue.inner.list(&Filter::default(), None, 100).await.unwrap().calls;
    assert_eq!(listed.iter().map(|call| call.id.clone()).collect::<BTreeSet<_>>(), id_set(&ids));
    // A similar id belongs to no call of the batch.
    let other = ids[1].replace(&ids[1][16..18], if &ids[1][16..18] == "00" { "01" } else { "00" });
    assert_eq!(queue.state(&other).await, None);
    let first = queue.receive().await;
    assert_eq!(
        (first.attempts, &first.call.body[..], first.call.target.as_str()),
        (0, &b"body"[..], "/p?x=1")
    );
    assert_eq!(queue.state(&first.call.id).await, Some(CallState::Running));
    assert_eq!(
        queue.inner.cancel(&first.call.id).await,
        Ok(ChangeOutcome::WrongState(CallState::Running))
    );
    assert_eq!(queue.depths("echo.fn").await.1, 1);
    let id = first.call.id.clone();
    queue.settle(first, succeeded()).await;
    let status = queue.inner.status(&id).await.unwrap().unwrap();
    assert_eq!(
        (status.state, status.attempts, status.status),
        (CallState::Succeeded, 1, Some(200))
    );
    let answer = queue.inner.result(&id).await.unwrap().unwrap();
    assert_eq!((answer.status, &answer.body[..], answer.headers.len()), (200, &b"answer"[..], 1));
    assert_eq!(queue.inner.cancel(&id).await, Ok(ChangeOutcome::WrongState(CallState::Succeeded)));
    let mut executed = BTreeSet::from([id]);
    while executed.len() < CALLS {
        let delivery = queue.receive().await;
        assert!(executed.insert(delivery.call.id.clone()), "executed twice");
        queue.settle(delivery, succeeded()).await;
    }
    assert_eq!(executed, id_set(&ids));
    queue.wait_until_empty().await;
    for id in &ids {
        assert_eq!(queue.state(id).await, Some(CallState::Succeeded));
        assert!(queue.inner.result(id).await.unwrap().is_some());
    }
    let filter = Filter { state: Some(CallState::Succeeded), ..Filter::default() };
    assert_eq!(queue.inner.list(&filter, None, 100).await.unwrap().calls.len(), CALLS);
    eventually("no batch record is left", async || message_count(&nats, "open").await == 0).await;
    assert_eq!(message_count(&nats, "calls").await, 0);
}

#[tokio::test]
async fn batched_calls_can_be_retried_dead_lettered_and_redriven() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    let ids = queue.publish_batch(3, new_call).await;
    let mut received = [queue.receive().await, queue.receive().await, queue.receive().await];
    received.sort_by_key(|delivery| ids.iter().position(|id| *id == delivery.call.id));
    let [first, second, third] = received;
    queue.settle(first, retry(unix_millis() + 500)).await;
    assert_eq!(queue.state(&ids[0]).await, Some(CallState::Retrying));
    queue.settle(second, dead_lettered()).await;
    queue.settle(third, succeeded()).await;
    assert_eq!(queue.state(&ids[1]).await, Some(CallState::Failed));
    assert_eq!(queue.depths("echo.fn").await.3, 1);
    let again = queue.receive().await;
    assert_eq!((&again.call.id, again.attempts), (&ids[0], 1));
    queue.settle(again, succeeded()).await;
    let filter = Filter { dead_letter: Some(true), ..Filter::default() };
    assert_eq!(queue.inner.list(&filter, None, 9).await.unwrap().calls[0].id, ids[1]);
    assert_eq!(
        queue.inner.redrive(&ids[0]).await,
        Ok(ChangeOutcome::WrongState(CallState::Succeeded))
    );
    assert_eq!(queue.inner.redrive(&ids[1]).await, Ok(ChangeOutcome::Applied));
    let revived = queue.receive().await;
    assert_eq!((&revived.call.id, revived.attempts), (&ids[1], 0));
    queue.settle(revived, dead_lettered()).await;
    assert_eq!(queue.inner.cancel(&ids[1]).await, Ok(ChangeOutcome::Applied));
    assert_eq!(queue.state(&ids[1]).await, Some(CallState::Cancelled));
    queue.wait_until_empty().await;
    assert_eq!(queue.depths("echo.fn").await, (0, 0, 0, 0));
    let states: Vec<_> = [&ids[0], &ids[2]].into_iter().map(|id| queue.state(id)).collect();
    let states = futures_util::future::join_all(states).await;
    assert_eq!(states, [Some(CallState::Succeeded), Some(CallState::Succeeded)]);
}

#[tokio::test]
async fn a_dead_lettered_call_does_not_affect_its_batch() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    let ids = queue.publish_batch(CALLS, new_call).await;
    let delivery = queue.receive().await;
    let id = delivery.call.id.clone();
    queue.settle(delivery, dead_lettered()).await;
    assert_eq!(queue.inner.redrive(&id).await, Ok(ChangeOutcome::Applied));
    let mut executed = BTreeMap::new();
    for _ in 0..CALLS {
        let delivery = queue.receive().await;
        *executed.entry(delivery.call.id.clone()).or_insert(0) += 1;
        queue.settle(delivery, succeeded()).await;
    }
    assert!(executed.len() == CALLS && executed.contains_key(&id), "{executed:?}");
    queue.wait_until_empty().await;
    assert_eq!(id_set(&ids), executed.into_keys().collect());
}

#[tokio::test]
async fn cancelled_or_purged_batched_calls_are_not_executed() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    let ids = queue.publish_batch(CALLS, new_call).await;
    for id in &ids[..5] {
        assert_eq!(queue.inner.cancel(id).await, Ok(ChangeOutcome::Applied));
        assert_eq!(queue.state(id).await, Some(CallState::Cancelled));
        assert_eq!(
            queue.inner.cancel(id).await,
            Ok(ChangeOutcome::WrongState(CallState::Cancelled))
        );
    }
    assert_eq!(queue.depths("echo.fn").await.0, CALLS as u64 - 5);
    let cancelled = Filter { state: Some(CallState::Cancelled), ..Filter::default() };
    assert_eq!(queue.inner.purge(&cancelled).await, Ok(5));
    assert_eq!(queue.state(&ids[0]).await, None);
    let mut executed = BTreeSet::new();
    for _ in 5..CALLS {
        let delivery = queue.receive().await;
        executed.insert(delivery.call.id.clone());
        queue.settle(delivery, succeeded()).await;
    }
    assert_eq!(executed, id_set(&ids[5..]));
    queue.wait_until_empty().await;
    assert_eq!(queue.state(&ids[0]).await, None);
    assert_eq!(queue.inner.purge(&Filter::default()).await, Ok(CALLS as u64 - 5));
    for id in &ids {
        assert_eq!(queue.state(id).await, None);
    }
    // A queue that contains only batched calls.
    let ids = queue.publish_batch(CALLS, new_call).await;
    assert_eq!(queue.inner.purge(&Filter::default()).await, Ok(CALLS as u64));
    assert!(queue.receives_nothing(Duration::from_secs(1)).await);
    assert_eq!((queue.state(&ids[3]).await, queue.depths("echo.fn").await), (None, (0, 0, 0, 0)));
    eventually("their messages are deleted", async || message_count(&nats, "calls").await == 0)
        .await;
}

#[tokio::test]
async fn a_batched_call_is_either_executed_or_cancelled() {
    let nats = Nats::start();
    let (queue, other) = (TestQueue::connected(&nats).await, TestQueue::connected(&nats).await);
    for round in 0..4 {
        let ids = queue.publish_batch(CALLS, new_call).await;
        let executed = std::sync::Mutex::new(BTreeSet::new());
        let make = async {
            loop {
                let delivery = queue.receive().await;
                assert!(
                    executed.lock().unwrap().insert(delivery.call.id.clone()),
                    "executed twice"
                );
                queue.settle(delivery, succeeded()).await;
            }
        };
        let cancel = async {
            let mut cancelled = BTreeSet::new();
            for id in ids.iter().rev() {
                if other.inner.cancel(id).await.unwrap() == ChangeOutcome::Applied {
                    cancelled.insert(id.clone());
                }
            }
            // Counts would not do: they are read message by message, and can miss a call that is being claimed.
            for id in &ids {
                eventually("the call has finished", async || {
                    matches!(
                        queue.state(id).await,
                        Some(CallState::Succeeded | CallState::Cancelled)
                    )
                })
                .await;
            }
            cancelled
        };
        let cancelled = tokio::select! {
            () = make => BTreeSet::new(),
            cancelled = cancel => cancelled,
        };
        let executed = executed.into_inner().unwrap();
        assert!(executed.is_disjoint(&cancelled), "{round}");
        assert_eq!(&executed | &cancelled, id_set(&ids), "{round}");
        for id in &ids {
            let expect =
                if executed.contains(id) { CallState::Succeeded } else { CallState::Cancelled };
            assert_eq!(queue.state(id).await, Some(expect), "{round}");
        }
    }
}
