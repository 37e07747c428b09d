//! Call ids and idempotency keys: which calls are duplicates.

use gateway::queue::{Filter, Published};

use crate::support::eventually;
use crate::support::jetstream_queue::{Gateway, call, call_of, dead, succeeded};
use crate::support::nats::Nats;

#[tokio::test]
async fn the_same_id_and_the_same_key_are_queued_once() {
    let mut nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let keyed = |id| {
        let mut call = call(id);
        call.options.idempotency_key = Some("a key.*>\r\nä".to_owned());
        call
    };
    assert!(!it.publish(keyed("a")).await.duplicate);
    let again = Published { id: "a".to_owned(), repeated: true };
    assert_eq!(it.publish(keyed("b")).await, again);
    assert_eq!(it.publish(call("a")).await, again);
    assert_eq!(it.unfinished().await, 1);
    // It is known when the call is over, and when the server has forgotten what it had seen.
    it.settle(it.take().await, succeeded()).await;
    assert_eq!(it.publish(keyed("c")).await, again);
    nats.kill();
    nats.restart();
    eventually("the server answers", async || it.queue.status("x").await.is_ok()).await;
    assert_eq!(it.publish(keyed("d")).await, again);
    let mut chosen = call("a");
    chosen.options.chosen_id = true;
    assert_eq!(it.publish(chosen).await, again);
    it.is_empty().await;
}

#[tokio::test]
async fn two_who_publish_the_same_key_at_once_make_one_call() {
    let nats = Nats::start();
    let (one, two) = (Gateway::on(&nats).await, Gateway::on(&nats).await);
    for round in 0..5 {
        let keyed = |id: &str| {
            let mut call = call(&format!("{id}{round}"));
            call.options.idempotency_key = Some(format!("key {round}"));
            call
        };
        let (a, b) = tokio::join!(one.publish(keyed("a")), two.publish(keyed("b")));
        assert_eq!((a.id == b.id, a.repeated != b.repeated), (true, true), "{a:?} {b:?}");
    }
    assert_eq!(one.unfinished().await, 5);
}

#[tokio::test]
async fn a_call_that_was_purged_can_be_queued_again() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    for _ in 0..2 {
        assert!(!it.publish(call("a")).await.duplicate);
        assert_eq!(it.queue.purge(&Filter::default()).await, Ok(1));
    }
}

#[tokio::test]
async fn a_key_stands_for_no_call_that_was_purged() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let keyed = |id: &str| {
        let mut call = call(id);
        call.options.idempotency_key = Some("k".to_owned());
        call
    };
    // One that waits, one that is over, and one that is dead.
    for (round, settlement) in [None, Some(succeeded()), Some(dead())].into_iter().enumerate() {
        let (first, second) = (format!("a{round}"), format!("b{round}"));
        assert!(!it.publish(keyed(&first)).await.duplicate, "{first}");
        if let Some(settlement) = settlement {
            it.settle(it.take().await, settlement).await;
        }
        let known = Published { id: first, duplicate: true };
        assert_eq!(it.publish(keyed(&second)).await, known);
        assert_eq!(it.queue.purge(&Filter::default()).await, Ok(1));
    }
    // Two who queue it again at once make one call.
    let (a, b) = tokio::join!(it.publish(keyed("c")), it.publish(keyed("d")));
    assert_eq!((a.id == b.id, a.repeated != b.repeated), (true, true), "{a:?} {b:?}");
    assert_eq!(it.unfinished().await, 1);
}

#[tokio::test]
async fn one_id_can_name_a_call_of_each_function() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let chosen = |function: &str| {
        let mut call = call_of(function, "an id of theirs");
        call.options.chosen_id = true;
        call
    };
    for _ in 0..2 {
        let repeated = it.unfinished().await > 0;
        for function in ["echo", "other"] {
            assert_eq!(it.publish(chosen(function)).await.duplicate, repeated, "{function}");
        }
    }
    assert_eq!(it.unfinished().await, 2);
}
