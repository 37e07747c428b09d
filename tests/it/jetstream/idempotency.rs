//! Call ids and idempotency keys: which calls are duplicates.

use gateway_queue::{Filter, JobStore as _, Published};

use crate::support::eventually;
use crate::support::jetstream_queue::{TestQueue, call, call_to, dead_lettered, succeeded};
use crate::support::nats::Nats;

#[tokio::test]
async fn the_same_id_or_key_is_enqueued_once() {
    let mut nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    let keyed = |id| {
        let mut call = call(id);
        call.options.idempotency_key = Some("a key.*>\r\nä".to_owned());
        call
    };
    assert!(!queue.publish(keyed("a")).await.duplicate);
    let again = Published { id: "a".to_owned(), duplicate: true };
    assert_eq!(queue.publish(keyed("b")).await, again);
    assert_eq!(queue.publish(call("a")).await, again);
    assert_eq!(queue.unfinished().await, 1);
    // The key is kept when the call has finished, and when the server has lost its own deduplication state.
    queue.settle(queue.receive().await, succeeded()).await;
    assert_eq!(queue.publish(keyed("c")).await, again);
    nats.kill();
    nats.restart();
    eventually("the server responds", async || queue.inner.status("x").await.is_ok()).await;
    assert_eq!(queue.publish(keyed("d")).await, again);
    let mut chosen = call("a");
    chosen.options.chosen_id = true;
    assert_eq!(queue.publish(chosen).await, again);
    queue.wait_until_empty().await;
}

#[tokio::test]
async fn concurrent_publishes_with_the_same_key_enqueue_one_call() {
    let nats = Nats::start();
    let (one, two) = (TestQueue::connected(&nats).await, TestQueue::connected(&nats).await);
    for round in 0..5 {
        let keyed = |id: &str| {
            let mut call = call(&format!("{id}{round}"));
            call.options.idempotency_key = Some(format!("key {round}"));
            call
        };
        let (a, b) = tokio::join!(one.publish(keyed("a")), two.publish(keyed("b")));
        assert_eq!((a.id == b.id, a.duplicate != b.duplicate), (true, true), "{a:?} {b:?}");
    }
    assert_eq!(one.unfinished().await, 5);
}

#[tokio::test]
async fn a_purged_call_can_be_enqueued_again() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    for _ in 0..2 {
        assert!(!queue.publish(call("a")).await.duplicate);
        assert_eq!(queue.inner.purge(&Filter::default()).await, Ok(1));
    }
}

#[tokio::test]
async fn the_key_of_a_purged_call_can_be_reused() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    let keyed = |id: &str| {
        let mut call = call(id);
        call.options.idempotency_key = Some("k".to_owned());
        call
    };
    // A pending call, a finished one, and a dead letter.
    for (round, settlement) in
        [None, Some(succeeded()), Some(dead_lettered())].into_iter().enumerate()
    {
        let (first, second) = (format!("a{round}"), format!("b{round}"));
        assert!(!queue.publish(keyed(&first)).await.duplicate, "{first}");
        if let Some(settlement) = settlement {
            queue.settle(queue.receive().await, settlement).await;
        }
        let known = Published { id: first, duplicate: true };
        assert_eq!(queue.publish(keyed(&second)).await, known);
        assert_eq!(queue.inner.purge(&Filter::default()).await, Ok(1));
    }
    // Two concurrent publishes enqueue one call.
    let (a, b) = tokio::join!(queue.publish(keyed("c")), queue.publish(keyed("d")));
    assert_eq!((a.id == b.id, a.duplicate != b.duplicate), (true, true), "{a:?} {b:?}");
    assert_eq!(queue.unfinished().await, 1);
}

#[tokio::test]
async fn a_chosen_id_is_unique_per_function() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    let chosen = |function: &str| {
        let mut call = call_to(function, "an id of theirs");
        call.options.chosen_id = true;
        call
    };
    for _ in 0..2 {
        let repeated = queue.unfinished().await > 0;
        for function in ["echo", "other"] {
            assert_eq!(queue.publish(chosen(function)).await.duplicate, repeated, "{function}");
        }
    }
    assert_eq!(queue.unfinished().await, 2);
}
