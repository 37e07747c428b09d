//! The states of a call, the lists of calls, and the limits of the queue.

use gateway::queue::call::{QueuedCall, UnixMillis};
use gateway::queue::embedded::Limits;
use gateway::queue::jetstream::Options;
use gateway::queue::status::CallState;
use gateway::queue::{ChangeOutcome, Error, Filter, Order, Published};

use crate::support::eventually;
use crate::support::jetstream_queue::{
    Gateway, LIMITS, call, call_of, now, options, retry, succeeded,
};
use crate::support::nats::Nats;

#[tokio::test]
async fn a_call_goes_through_its_states() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let published = it.publish(call("a")).await;
    assert_eq!(published, Published { id: "a".to_owned(), repeated: false });
    assert_eq!(it.state("a").await, Some(CallState::Queued));
    let delivery = it.take().await;
    let taken = QueuedCall { options: delivery.call.options.clone(), ..call("a") };
    assert_eq!((&delivery.call, delivery.attempts), (&taken, 0));
    assert_eq!(it.state("a").await, Some(CallState::Running));
    assert_eq!(it.queue.cancel("a").await, Ok(ChangeOutcome::WrongState(CallState::Running)));
    let counts = it.queue.depths().await.unwrap();
    assert_eq!((counts[0].1.running, counts[0].1.pending), (1, 0));
    it.settle(delivery, succeeded()).await;
    let status = it.queue.status("a").await.unwrap().unwrap();
    assert_eq!(
        (status.state, status.attempts, status.status),
        (CallState::Succeeded, 1, Some(200))
    );
    let answer = it.queue.result("a").await.unwrap().unwrap();
    assert_eq!((answer.status, &answer.body[..], answer.headers.len()), (200, &b"answer"[..], 1));
    assert_eq!(it.queue.status("b").await, Ok(None));
    assert_eq!(it.queue.cancel("a").await, Ok(ChangeOutcome::WrongState(CallState::Succeeded)));
    assert_eq!(it.queue.cancel("b").await, Ok(ChangeOutcome::NotFound));
    it.is_empty().await;
}

#[tokio::test]
async fn a_full_queue_says_so() {
    let nats = Nats::start();
    let limits = Limits { max_pending: 5, ..LIMITS };
    let it = Gateway::open(Options { limits, ..options(&nats) }).await;
    eventually("the server answers", async || it.queue.status("x").await.is_ok()).await;
    for number in 0..limits.max_pending {
        it.publish(call(&number.to_string())).await;
    }
    assert_eq!(it.queue.publish(call("more")).await, Err(Error::Full));
    assert_eq!(it.queue.cancel("0").await, Ok(ChangeOutcome::Applied));
    it.publish(call("more")).await;
    assert_eq!(it.state("0").await, Some(CallState::Cancelled));
    let first = it.take().await;
    assert_eq!(first.call.id, "1");
    // To try again is no new call.
    it.settle(first, retry(now())).await;
    assert_eq!(it.state("1").await, Some(CallState::Retrying));
}

#[tokio::test]
async fn a_delivery_that_is_dropped_is_taken_again() {
    let nats = Nats::start();
    // It is given back: the server would not find it out in time.
    let it = Gateway::leasing_long(&nats).await;
    it.publish(call("a")).await;
    drop(it.take().await);
    eventually("it waits again", async || it.state("a").await == Some(CallState::Queued)).await;
    let delivery = it.take().await;
    assert_eq!((delivery.call.id.as_str(), delivery.attempts), ("a", 0));
    drop(delivery);
    assert_eq!(it.take().await.call.id, "a");
}

#[tokio::test]
async fn what_has_been_kept_for_long_enough_is_forgotten() {
    let nats = Nats::start();
    let limits = Limits { result_ttl: 0, idempotency_ttl: 0, ..LIMITS };
    let it = Gateway::open(Options { limits, ..options(&nats) }).await;
    eventually("the server answers", async || it.queue.status("x").await.is_ok()).await;
    let keyed = |id: &str| {
        let mut call = call(id);
        call.options.idempotency_key = Some("k".to_owned());
        call
    };
    it.publish(keyed("a")).await;
    it.settle(it.take().await, succeeded()).await;
    eventually("it is forgotten", async || it.queue.status("a").await == Ok(None)).await;
    assert_eq!(it.queue.result("a").await, Ok(None));
    eventually("the key is forgotten", async || !it.publish(keyed("b")).await.duplicate).await;
}

#[tokio::test]
async fn a_list_is_in_order_and_goes_on_where_it_ended() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    for (number, id) in ["a", "b", "c", "d", "e"].into_iter().enumerate() {
        let mut call = call(id);
        call.options.submitted_at = number as UnixMillis;
        it.publish(call).await;
    }
    it.publish(call_of("other", "f")).await;
    let ids = async |filter: &Filter, after, limit| {
        let found = it.queue.list(filter, after, limit).await.unwrap();
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
    let other = Filter { function: Some(call_of("other", "").function), ..all.clone() };
    assert_eq!(ids(&other, None, 10).await, "f");
    assert_eq!(it.queue.cancel("b").await, Ok(ChangeOutcome::Applied));
    let cancelled = Filter { state: Some(CallState::Cancelled), ..all.clone() };
    assert_eq!(
        (ids(&cancelled, None, 9).await, ids(&all, None, 9).await),
        ("b".into(), "abcdef".into())
    );
    let running = it.take().await;
    assert_eq!(it.queue.purge(&all).await, Ok(5));
    assert_eq!(ids(&all, None, 9).await, running.call.id);
}

#[tokio::test]
async fn a_delayed_call_waits_for_its_time_and_loses_no_attempt() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let mut later = call("later");
    let due = now() + 3000;
    later.options.not_before = Some(due);
    it.publish(later).await;
    it.publish(call("now")).await;
    let first = it.take().await;
    assert_eq!(first.call.id, "now");
    it.settle(first, succeeded()).await;
    let counts = it.queue.depths().await.unwrap();
    assert_eq!((counts[0].1.delayed, counts[0].1.pending), (1, 0));
    let second = it.take().await;
    assert!(now() >= due);
    assert_eq!((second.call.id.as_str(), second.attempts), ("later", 0));
    // The same for one that is tried again.
    let due = now() + 1000;
    it.settle(second, retry(due)).await;
    assert_eq!(it.state("later").await, Some(CallState::Retrying));
    let third = it.take().await;
    assert!(now() >= due);
    assert_eq!((third.call.id.as_str(), third.attempts), ("later", 1));
    it.settle(third, succeeded()).await;
    assert_eq!(it.queue.status("later").await.unwrap().unwrap().attempts, 2);
}
