//! The states of a call, the lists of calls, and the limits of the queue.

use gateway_queue::call::{QueuedCall, UnixMillis};
use gateway_queue::embedded::Limits;
use gateway_queue::jetstream::Options;
use gateway_queue::status::CallState;
use gateway_queue::{ChangeOutcome, Error, Filter, JobQueue as _, JobStore as _, Order, Published};

use crate::support::eventually;
use crate::support::jetstream_queue::{
    LIMITS, TestQueue, call, call_to, options, retry, succeeded, unix_millis,
};
use crate::support::nats::Nats;

#[tokio::test]
async fn a_call_passes_through_its_states() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    let published = queue.publish(call("a")).await;
    assert_eq!(published, Published { id: "a".to_owned(), duplicate: false });
    assert_eq!(queue.state("a").await, Some(CallState::Queued));
    let delivery = queue.receive().await;
    let expected = QueuedCall { options: delivery.call.options.clone(), ..call("a") };
    assert_eq!((&delivery.call, delivery.attempts), (&expected, 0));
    assert_eq!(queue.state("a").await, Some(CallState::Running));
    assert_eq!(queue.inner.cancel("a").await, Ok(ChangeOutcome::WrongState(CallState::Running)));
    let counts = queue.inner.depths().await.unwrap();
    assert_eq!((counts[0].1.running, counts[0].1.pending), (1, 0));
    queue.settle(delivery, succeeded()).await;
    let status = queue.inner.status("a").await.unwrap().unwrap();
    assert_eq!(
        (status.state, status.attempts, status.status),
        (CallState::Succeeded, 1, Some(200))
    );
    let answer = queue.inner.result("a").await.unwrap().unwrap();
    assert_eq!((answer.status, &answer.body[..], answer.headers.len()), (200, &b"answer"[..], 1));
    assert_eq!(queue.inner.status("b").await, Ok(None));
    assert_eq!(queue.inner.cancel("a").await, Ok(ChangeOutcome::WrongState(CallState::Succeeded)));
    assert_eq!(queue.inner.cancel("b").await, Ok(ChangeOutcome::NotFound));
    queue.wait_until_empty().await;
}

#[tokio::test]
async fn a_full_queue_refuses_calls() {
    let nats = Nats::start();
    let limits = Limits { max_pending: 5, ..LIMITS };
    let queue = TestQueue::open(Options { limits, ..options(&nats) }).await;
    eventually("the server responds", async || queue.inner.status("x").await.is_ok()).await;
    for number in 0..limits.max_pending {
        queue.publish(call(&number.to_string())).await;
    }
    assert_eq!(queue.inner.publish(call("more"), None).await, Err(Error::Full));
    assert_eq!(queue.inner.cancel("0").await, Ok(ChangeOutcome::Applied));
    queue.publish(call("more")).await;
    assert_eq!(queue.state("0").await, Some(CallState::Cancelled));
    let first = queue.receive().await;
    assert_eq!(first.call.id, "1");
    // A retry does not need capacity for a new call.
    queue.settle(first, retry(unix_millis())).await;
    assert_eq!(queue.state("1").await, Some(CallState::Retrying));
}

#[tokio::test]
async fn a_dropped_delivery_is_delivered_again() {
    let nats = Nats::start();
    // With this lease, only a release can explain a redelivery in time.
    let queue = TestQueue::with_long_lease(&nats).await;
    queue.publish(call("a")).await;
    drop(queue.receive().await);
    eventually("the call is pending again", async || {
        queue.state("a").await == Some(CallState::Queued)
    })
    .await;
    let delivery = queue.receive().await;
    assert_eq!((delivery.call.id.as_str(), delivery.attempts), ("a", 0));
    drop(delivery);
    assert_eq!(queue.receive().await.call.id, "a");
}

#[tokio::test]
async fn results_and_keys_expire() {
    let nats = Nats::start();
    let limits = Limits { result_ttl: 0, idempotency_ttl: 0, ..LIMITS };
    let queue = TestQueue::open(Options { limits, ..options(&nats) }).await;
    eventually("the server responds", async || queue.inner.status("x").await.is_ok()).await;
    let keyed = |id: &str| {
        let mut call = call(id);
        call.options.idempotency_key = Some("k".to_owned());
        call
    };
    queue.publish(keyed("a")).await;
    queue.settle(queue.receive().await, succeeded()).await;
    eventually("the result expires", async || queue.inner.status("a").await == Ok(None)).await;
    assert_eq!(queue.inner.result("a").await, Ok(None));
    eventually("the key expires", async || !queue.publish(keyed("b")).await.duplicate).await;
}

#[tokio::test]
async fn a_list_is_ordered_and_can_be_continued() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    for (number, id) in ["a", "b", "c", "d", "e"].into_iter().enumerate() {
        let mut call = call(id);
        call.options.submitted_at = number as UnixMillis;
        queue.publish(call).await;
    }
    queue.publish(call_to("other", "f")).await;
    let ids = async |filter: &Filter, after, limit| {
        let found = queue.inner.list(filter, after, limit).await.unwrap();
        found.calls.into_iter().map(|status| status.id).collect::<Vec<_>>().concat()
    };
    let all = Filter::default();
    assert_eq!(ids(&all, None, 10).await, "abcdef");
    assert_eq!(
        (ids(&all, None, 2).await, ids(&all, Some("b"), 2).await),
        ("ab".into(), "cd".into())
    );
    assert_eq!(ids(&all, Some("none"), 2).await, "");
    let newest = Filter { order: Order::NewestFirst, ..all.clone() };
    assert_eq!(ids(&newest, None, 2).await, "fe");
    assert_eq!(ids(&newest, Some("e"), 3).await, "dcb");
    assert_eq!(ids(&newest, Some("a"), 3).await, "");
    let other = Filter { function: Some(call_to("other", "").function), ..all.clone() };
    assert_eq!(ids(&other, None, 10).await, "f");
    assert_eq!(queue.inner.cancel("b").await, Ok(ChangeOutcome::Applied));
    let cancelled = Filter { state: Some(CallState::Cancelled), ..all.clone() };
    assert_eq!(
        (ids(&cancelled, None, 9).await, ids(&all, None, 9).await),
        ("b".into(), "abcdef".into())
    );
    let running = queue.receive().await;
    assert_eq!(queue.inner.purge(&all).await, Ok(5));
    assert_eq!(ids(&all, None, 9).await, running.call.id);
}

#[tokio::test]
async fn a_delay_does_not_use_up_an_attempt() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    let mut later = call("later");
    let due = unix_millis() + 3000;
    later.options.not_before = Some(due);
    queue.publish(later).await;
    queue.publish(call("now")).await;
    let first = queue.receive().await;
    assert_eq!(first.call.id, "now");
    queue.settle(first, succeeded()).await;
    let counts = queue.inner.depths().await.unwrap();
    assert_eq!((counts[0].1.delayed, counts[0].1.pending), (1, 0));
    let second = queue.receive().await;
    assert!(unix_millis() >= due);
    assert_eq!((second.call.id.as_str(), second.attempts), ("later", 0));
    // The same holds for a retry.
    let due = unix_millis() + 1000;
    queue.settle(second, retry(due)).await;
    assert_eq!(queue.state("later").await, Some(CallState::Retrying));
    let third = queue.receive().await;
    assert!(unix_millis() >= due);
    assert_eq!((third.call.id.as_str(), third.attempts), ("later", 1));
    queue.settle(third, succeeded()).await;
    assert_eq!(queue.inner.status("later").await.unwrap().unwrap().attempts, 2);
}
