//! Which calls are batched, and how large a batch may be.

use std::collections::BTreeMap;

use bytes::Bytes;
use gateway_queue::call::QueuedCall;
use gateway_queue::embedded::Limits;
use gateway_queue::jetstream::Options;
use gateway_queue::status::{CallState, Settlement, StoredResponse};
use gateway_queue::{Error, Filter, JobQueue as _, JobStore as _};

use crate::support::jetstream_batch::{CALLS, id_set, message_count, new_call};
use crate::support::jetstream_queue::{
    LIMITS, TestQueue, call, call_to, options, succeeded, unix_millis,
};
use crate::support::nats::Nats;
use crate::support::{eventually, within};

#[tokio::test]
async fn long_paths_do_not_make_a_batch_too_large() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    let long = || QueuedCall { target: format!("/{}", "x".repeat(60_000)), ..new_call() };
    let ids = queue.publish_batch(CALLS, long).await;
    assert_eq!(id_set(&ids).len(), CALLS);
    for _ in 0..CALLS {
        let delivery = queue.receive().await;
        assert_eq!(delivery.call.target.len(), 60_001);
        queue.settle(delivery, succeeded()).await;
    }
    queue.wait_until_empty().await;
}

#[tokio::test]
async fn only_small_due_calls_without_chosen_ids_are_batched() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    let large = || QueuedCall { body: Bytes::from(vec![7; 20_000]), ..call("same") };
    let publisher = queue.inner.for_thread();
    for (number, call) in
        [large(), call("keyed"), call("later"), call("chosen")].into_iter().enumerate()
    {
        let mut calls = vec![
            QueuedCall { id: format!("{number}a"), ..call.clone() },
            QueuedCall { id: format!("{number}b"), ..call },
        ];
        for call in &mut calls {
            match number {
                1 => call.options.idempotency_key = Some(call.id.clone()),
                2 => call.options.not_before = Some(unix_millis() + 60_000),
                3 => call.options.chosen_id = true,
                _ => {}
            }
        }
        let published = calls.iter().map(|call| publisher.publish(call.clone(), None));
        let published = futures_util::future::try_join_all(published).await.unwrap();
        let ids: Vec<_> = published.into_iter().map(|published| published.id).collect();
        assert_eq!(ids, [format!("{number}a"), format!("{number}b")]);
    }
    assert_eq!(message_count(&nats, "calls").await, 8);
}

#[tokio::test]
async fn each_function_has_its_own_batch() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    let publisher = queue.inner.for_thread();
    let names = ["a", "b"];
    let calls = (0..CALLS).map(|number| call_to(names[number % 2], &number.to_string()));
    let published = calls.map(|call| publisher.publish(call, None));
    let published = futures_util::future::try_join_all(published).await.unwrap();
    for name in names {
        assert_eq!(queue.depths(&format!("{name}.fn")).await.0, CALLS as u64 / 2);
    }
    let mut executed = BTreeMap::new();
    for _ in 0..CALLS {
        let delivery = queue.receive().await;
        executed.insert(delivery.call.id.clone(), delivery.call.function.name.clone());
        queue.settle(delivery, succeeded()).await;
    }
    for (number, published) in published.iter().enumerate() {
        assert_eq!(executed[&published.id], names[number % 2]);
    }
}

#[tokio::test]
async fn a_full_queue_refuses_batched_calls() {
    let nats = Nats::start();
    let limits = Limits { max_pending: 30, ..LIMITS };
    let queue = TestQueue::open(Options { limits, ..options(&nats) }).await;
    eventually("the server responds", async || queue.inner.status("x").await.is_ok()).await;
    queue.publish_batch(CALLS, new_call).await;
    let publisher = queue.inner.for_thread();
    let published = (0..CALLS).map(|_| publisher.publish(new_call(), None));
    let published = within("publish", futures_util::future::join_all(published)).await;
    let refused = published.iter().filter(|result| **result == Err(Error::Full)).count();
    assert!((CALLS - 10..CALLS).contains(&refused), "{refused} refused");
    let there = queue.depths("echo.fn").await.0;
    assert_eq!(there, (2 * CALLS - refused) as u64);
    for _ in 0..there {
        queue.settle(queue.receive().await, succeeded()).await;
    }
    queue.wait_until_empty().await;
    queue.publish_batch(CALLS, new_call).await;
}

#[tokio::test]
async fn a_large_response_is_stored_outside_the_batch() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    let ids = queue.publish_batch(CALLS, new_call).await;
    let body = Bytes::from(vec![9; 1_500_000]);
    for _ in 0..CALLS {
        let delivery = queue.receive().await;
        let is_first = delivery.call.id == ids[3];
        let answer = StoredResponse {
            status: 200,
            headers: Vec::new(),
            body: body.clone(),
            truncated: false,
        };
        let (state, status) = (CallState::Succeeded, Some(200));
        let finished = Settlement::Finished {
            state,
            status,
            reason: None,
            response: Some(answer),
            executed: true,
        };
        queue.settle(delivery, if is_first { finished } else { succeeded() }).await;
    }
    assert!(queue.inner.result(&ids[3]).await.unwrap().unwrap().body == body);
    assert_eq!(&queue.inner.result(&ids[4]).await.unwrap().unwrap().body[..], b"answer");
    let all = Filter::default();
    assert_eq!(queue.inner.purge(&all).await, Ok(CALLS as u64));
    assert_eq!(queue.inner.result(&ids[3]).await, Ok(None));
}
