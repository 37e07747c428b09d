//! Batches whose worker or server dies.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use bytes::Bytes;
use gateway::queue::Filter;
use gateway::queue::embedded::Limits;
use gateway::queue::jetstream::Options;
use gateway::queue::status::CallState;

use crate::support::eventually;
use crate::support::jetstream_batch::{CALLS, fresh, set};
use crate::support::jetstream_queue::{
    Gateway, LEASE, LIMITS, PLACES, dead, now, options, retry, stranger, succeeded,
};
use crate::support::nats::Nats;

#[tokio::test]
async fn what_one_who_died_has_not_made_is_made_by_another_and_nothing_else() {
    let nats = Nats::start();
    let (it, other) = (Gateway::on(&nats).await, Gateway::on(&nats).await);
    let ids = it.publish_at_once(CALLS, fresh).await;
    let mut done = BTreeSet::new();
    for number in 0..6 {
        let delivery = it.take().await;
        let id = delivery.call.id.clone();
        match number {
            4 => it.settle(delivery, retry(now())).await,
            5 => it.settle(delivery, dead()).await,
            _ => {
                it.settle(delivery, succeeded()).await;
                done.insert(id);
            }
        }
    }
    let filter = Filter { dead_letter: Some(true), ..Filter::default() };
    let dead = it.queue.list(&filter, None, 9).await.unwrap().calls[0].id.clone();
    let running = it.take().await;
    let died = running.call.id.clone();
    it.queue.stop().await;
    std::mem::forget(running);
    let mut made = BTreeMap::new();
    while made.len() < CALLS - done.len() - 1 {
        let delivery = other.take().await;
        *made.entry(delivery.call.id.clone()).or_insert(0) += 1;
        other.settle(delivery, succeeded()).await;
    }
    assert!(made.values().all(|times| *times == 1), "{made:?}");
    assert!(made.contains_key(&died) && !made.contains_key(&dead));
    let made = made.into_keys().collect();
    assert_eq!(&(&made | &done) | &BTreeSet::from([dead]), set(&ids));
    other.lets_go().await;
}

#[tokio::test]
async fn one_that_was_made_and_purged_is_not_made_with_those_that_are_left() {
    let nats = Nats::start();
    let (it, other) = (Gateway::on(&nats).await, Gateway::on(&nats).await);
    let ids = it.publish_at_once(3, fresh).await;
    let (first, second, third) = (it.take().await, it.take().await, it.take().await);
    let id = first.call.id.clone();
    it.settle(first, retry(now())).await;
    let again = it.take().await;
    assert_eq!((&again.call.id, again.attempts), (&id, 1));
    it.settle(again, succeeded()).await;
    let succeeded_ones = Filter { state: Some(CallState::Succeeded), ..Filter::default() };
    assert_eq!(it.queue.purge(&succeeded_ones).await, Ok(1));
    assert_eq!(it.state(&id).await, None);
    let left = BTreeSet::from([second.call.id.clone(), third.call.id.clone()]);
    it.dies(vec![second, third]).await;
    let mut made = BTreeSet::new();
    for _ in 0..2 {
        let delivery = other.take().await;
        made.insert(delivery.call.id.clone());
        other.settle(delivery, succeeded()).await;
    }
    assert_eq!((made, ids.len()), (left, 3));
    other.lets_go().await;
}

#[tokio::test]
async fn what_one_does_not_come_to_is_soon_there_for_another() {
    let nats = Nats::start();
    let (it, other) = (Gateway::on(&nats).await, Gateway::on(&nats).await);
    let ids = it.publish_at_once(CALLS, fresh).await;
    let start = Instant::now();
    let slow = it.take().await;
    let mut made = BTreeSet::new();
    while made.len() < CALLS - 1 {
        let delivery = other.take().await;
        assert!(made.insert(delivery.call.id.clone()));
        other.settle(delivery, succeeded()).await;
    }
    assert!(start.elapsed() < LEASE * 2, "given back, not found out by the server");
    assert_eq!(it.state(&slow.call.id).await, Some(CallState::Running));
    // It stays with the one who makes it.
    assert!(other.takes_nothing(LEASE * 3 / 2).await);
    made.insert(slow.call.id.clone());
    it.settle(slow, succeeded()).await;
    assert_eq!(made, set(&ids));
    it.is_empty().await;
    assert!(other.takes_nothing(LEASE * 3 / 2).await);
}

#[tokio::test]
async fn one_who_stops_gives_back_at_once_what_was_not_begun() {
    let nats = Nats::start();
    // It is given back: the server would not find it out in time.
    let (it, other) = (Gateway::leasing_long(&nats).await, Gateway::leasing_long(&nats).await);
    let ids = it.publish_at_once(CALLS, fresh).await;
    let delivery = it.take().await;
    let mut made = BTreeSet::from([delivery.call.id.clone()]);
    it.settle(delivery, succeeded()).await;
    it.queue.stop().await;
    while made.len() < CALLS {
        let delivery = other.take().await;
        assert!(made.insert(delivery.call.id.clone()));
        other.settle(delivery, succeeded()).await;
    }
    assert_eq!(made, set(&ids));
    other.is_empty().await;
}

#[tokio::test]
async fn a_server_that_is_killed_while_they_are_made_loses_none() {
    const ALL: usize = 200;
    let mut nats = Nats::start();
    let limits = Limits { max_pending: 1000, ..LIMITS };
    let it = Gateway::open(Options { limits, ..options(&nats) }).await;
    eventually("the server answers", async || it.queue.status("x").await.is_ok()).await;
    let ids = it.publish_at_once(ALL, fresh).await;
    let made = std::sync::Mutex::new(BTreeMap::new());
    let work = async {
        loop {
            let delivery = it.queue.receive(PLACES).await.unwrap();
            *made.lock().unwrap().entry(delivery.call.id.clone()).or_insert(0) += 1;
            // One that cannot be settled comes again.
            let _ = it.queue.settle(&delivery, &succeeded()).await;
        }
    };
    let trouble = async {
        for at in [30, 90, 150] {
            eventually("some are made", async || made.lock().unwrap().len() >= at).await;
            nats.kill();
            nats.restart();
        }
        for id in &ids {
            eventually("it has succeeded", async || {
                let status = it.queue.status(id).await;
                status.is_ok_and(|it| it.is_some_and(|it| it.state == CallState::Succeeded))
            })
            .await;
        }
    };
    tokio::select! {
        () = work => {}
        () = trouble => {}
    }
    let made = made.into_inner().unwrap();
    let twice = made.values().filter(|times| **times > 1).count();
    assert!(made.len() == ALL && twice <= 3 * PLACES, "{twice} made twice");
    it.lets_go().await;
}

#[tokio::test]
async fn a_message_that_no_gateway_wrote_holds_up_none_of_them() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let ids = it.publish_at_once(CALLS, fresh).await;
    let strange = stranger(&nats).await;
    for (key, payload) in
        [("+000000000001", ""), ("+000000000002", "\0\0\0\u{7f}x"), ("+00000000003f", "{}")]
    {
        let subject = format!("faas.faas-request.fn.echo.{key}");
        let payload = Bytes::from_static(payload.as_bytes());
        strange.publish(subject, payload.clone()).await.unwrap().await.unwrap();
        let subject = format!("faas-open.faas-request.fn.echo.{key}");
        strange.publish(subject, payload).await.unwrap().await.unwrap();
    }
    let mut made = BTreeSet::new();
    for _ in 0..CALLS {
        let delivery = it.take().await;
        made.insert(delivery.call.id.clone());
        it.settle(delivery, succeeded()).await;
    }
    assert_eq!(made, set(&ids));
    assert!(it.queue.depths().await.is_ok());
    assert!(it.queue.list(&Filter::default(), None, 99).await.is_ok());
    assert!(it.takes_nothing(Duration::from_secs(1)).await);
}
