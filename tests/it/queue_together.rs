//! Calls that come at the same time, which a NATS server keeps in one message: each of them is a call like any other.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use bytes::Bytes;
use gateway::queue::call::Call;
use gateway::queue::embedded::Limits;
use gateway::queue::jetstream::Options;
use gateway::queue::status::{Answer, Settlement, State};
use gateway::queue::{Changed, Error, Filter};

use crate::queue_jetstream::{
    Gateway, LEASE, LIMITS, PLACES, call, call_of, dead, now, options, retry, stranger, stream,
    succeeded,
};
use crate::support::nats::Nats;
use crate::support::{eventually, within};

const CALLS: usize = 20;

impl Gateway {
    /// The ids of so many calls that were published at once.
    async fn publish_at_once(&self, count: usize, call: impl Fn() -> Call) -> Vec<String> {
        let queue = self.queue.for_thread();
        let published = (0..count).map(|_| queue.publish(call()));
        let published = within("publish", futures_util::future::try_join_all(published)).await;
        published.unwrap().into_iter().map(|published| published.id).collect()
    }

    async fn count(&self, id: &str) -> (u64, u64, u64, u64) {
        let counts = self.queue.counts().await.unwrap();
        let counts = counts.iter().find(|(function, _)| function.to_string() == id);
        let counts = counts.map(|(_, counts)| counts.clone()).unwrap_or_default();
        (counts.pending, counts.running, counts.delayed, counts.dead)
    }
}

async fn messages(nats: &Nats, what: &str) -> u64 {
    stream(nats, &format!("gateway-faas-request-{what}")).await.cached_info().state.messages
}

/// One under an id that it will not be known by.
fn fresh() -> Call {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    call(&NUMBER.fetch_add(1, Relaxed).to_string())
}

fn set(ids: &[String]) -> BTreeSet<String> {
    ids.iter().cloned().collect()
}

#[tokio::test]
async fn each_of_them_goes_through_its_states() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let ids = it.publish_at_once(CALLS, fresh).await;
    assert_eq!(set(&ids).len(), CALLS);
    assert!(messages(&nats, "calls").await < 5, "they are together");
    for id in &ids {
        assert_eq!(it.state(id).await, Some(State::Queued));
        assert_eq!(it.queue.answer(id).await, Ok(None));
    }
    assert_eq!(it.count("echo.fn").await, (CALLS as u64, 0, 0, 0));
    let listed = it.queue.list(&Filter::default(), None, 100).await.unwrap().calls;
    assert_eq!(listed.iter().map(|it| it.id.clone()).collect::<BTreeSet<_>>(), set(&ids));
    // No other id is one of them, however like it is.
    let other = ids[1].replace(&ids[1][16..18], if &ids[1][16..18] == "00" { "01" } else { "00" });
    assert_eq!(it.state(&other).await, None);
    let first = it.take().await;
    assert_eq!(
        (first.attempts, &first.call.body[..], first.call.target.as_str()),
        (0, &b"body"[..], "/p?x=1")
    );
    assert_eq!(it.state(&first.call.id).await, Some(State::Running));
    assert_eq!(it.queue.cancel(&first.call.id).await, Ok(Changed::No(State::Running)));
    assert_eq!(it.count("echo.fn").await.1, 1);
    let id = first.call.id.clone();
    it.settle(first, succeeded()).await;
    let status = it.queue.status(&id).await.unwrap().unwrap();
    assert_eq!((status.state, status.attempts, status.status), (State::Succeeded, 1, Some(200)));
    let answer = it.queue.answer(&id).await.unwrap().unwrap();
    assert_eq!((answer.status, &answer.body[..], answer.headers.len()), (200, &b"answer"[..], 1));
    assert_eq!(it.queue.cancel(&id).await, Ok(Changed::No(State::Succeeded)));
    let mut made = BTreeSet::from([id]);
    while made.len() < CALLS {
        let delivery = it.take().await;
        assert!(made.insert(delivery.call.id.clone()), "made twice");
        it.settle(delivery, succeeded()).await;
    }
    assert_eq!(made, set(&ids));
    it.is_empty().await;
    for id in &ids {
        assert_eq!(it.state(id).await, Some(State::Succeeded));
        assert!(it.queue.answer(id).await.unwrap().is_some());
    }
    let filter = Filter { state: Some(State::Succeeded), ..Filter::default() };
    assert_eq!(it.queue.list(&filter, None, 100).await.unwrap().calls.len(), CALLS);
    eventually("no record is left open", async || messages(&nats, "open").await == 0).await;
    assert_eq!(messages(&nats, "calls").await, 0);
}

#[tokio::test]
async fn each_of_them_can_be_retried_die_and_be_revived() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let ids = it.publish_at_once(3, fresh).await;
    let mut taken = [it.take().await, it.take().await, it.take().await];
    taken.sort_by_key(|delivery| ids.iter().position(|id| *id == delivery.call.id));
    let [first, second, third] = taken;
    it.settle(first, retry(now() + 500)).await;
    assert_eq!(it.state(&ids[0]).await, Some(State::Retrying));
    it.settle(second, dead()).await;
    it.settle(third, succeeded()).await;
    assert_eq!(it.state(&ids[1]).await, Some(State::Failed));
    assert_eq!(it.count("echo.fn").await.3, 1);
    let again = it.take().await;
    assert_eq!((&again.call.id, again.attempts), (&ids[0], 1));
    it.settle(again, succeeded()).await;
    let filter = Filter { dead: Some(true), ..Filter::default() };
    assert_eq!(it.queue.list(&filter, None, 9).await.unwrap().calls[0].id, ids[1]);
    assert_eq!(it.queue.revive(&ids[0]).await, Ok(Changed::No(State::Succeeded)));
    assert_eq!(it.queue.revive(&ids[1]).await, Ok(Changed::Yes));
    let revived = it.take().await;
    assert_eq!((&revived.call.id, revived.attempts), (&ids[1], 0));
    it.settle(revived, dead()).await;
    assert_eq!(it.queue.cancel(&ids[1]).await, Ok(Changed::Yes));
    assert_eq!(it.state(&ids[1]).await, Some(State::Cancelled));
    it.is_empty().await;
    assert_eq!(it.count("echo.fn").await, (0, 0, 0, 0));
    let states: Vec<_> = [&ids[0], &ids[2]].into_iter().map(|id| it.state(id)).collect();
    let states = futures_util::future::join_all(states).await;
    assert_eq!(states, [Some(State::Succeeded), Some(State::Succeeded)]);
}

#[tokio::test]
async fn one_that_is_dead_while_the_others_are_not_made_leaves_them_alone() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let ids = it.publish_at_once(CALLS, fresh).await;
    let delivery = it.take().await;
    let id = delivery.call.id.clone();
    it.settle(delivery, dead()).await;
    assert_eq!(it.queue.revive(&id).await, Ok(Changed::Yes));
    let mut made = BTreeMap::new();
    for _ in 0..CALLS {
        let delivery = it.take().await;
        *made.entry(delivery.call.id.clone()).or_insert(0) += 1;
        it.settle(delivery, succeeded()).await;
    }
    assert!(made.len() == CALLS && made.contains_key(&id), "{made:?}");
    it.is_empty().await;
    assert_eq!(set(&ids), made.into_keys().collect());
}

#[tokio::test]
async fn those_that_are_cancelled_or_purged_are_not_made() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let ids = it.publish_at_once(CALLS, fresh).await;
    for id in &ids[..5] {
        assert_eq!(it.queue.cancel(id).await, Ok(Changed::Yes));
        assert_eq!(it.state(id).await, Some(State::Cancelled));
        assert_eq!(it.queue.cancel(id).await, Ok(Changed::No(State::Cancelled)));
    }
    assert_eq!(it.count("echo.fn").await.0, CALLS as u64 - 5);
    let cancelled = Filter { state: Some(State::Cancelled), ..Filter::default() };
    assert_eq!(it.queue.purge(&cancelled).await, Ok(5));
    assert_eq!(it.state(&ids[0]).await, None);
    let mut made = BTreeSet::new();
    for _ in 5..CALLS {
        let delivery = it.take().await;
        made.insert(delivery.call.id.clone());
        it.settle(delivery, succeeded()).await;
    }
    assert_eq!(made, set(&ids[5..]));
    it.is_empty().await;
    assert_eq!(it.state(&ids[0]).await, None);
    assert_eq!(it.queue.purge(&Filter::default()).await, Ok(CALLS as u64 - 5));
    for id in &ids {
        assert_eq!(it.state(id).await, None);
    }
    // A queue of such calls alone.
    let ids = it.publish_at_once(CALLS, fresh).await;
    assert_eq!(it.queue.purge(&Filter::default()).await, Ok(CALLS as u64));
    assert!(it.takes_nothing(Duration::from_secs(1)).await);
    assert_eq!((it.state(&ids[3]).await, it.count("echo.fn").await), (None, (0, 0, 0, 0)));
    eventually("their messages are gone", async || messages(&nats, "calls").await == 0).await;
}

#[tokio::test]
async fn a_call_is_made_or_cancelled_but_not_both() {
    let nats = Nats::start();
    let (it, other) = (Gateway::on(&nats).await, Gateway::on(&nats).await);
    for round in 0..4 {
        let ids = it.publish_at_once(CALLS, fresh).await;
        let made = std::sync::Mutex::new(BTreeSet::new());
        let make = async {
            loop {
                let delivery = it.take().await;
                assert!(made.lock().unwrap().insert(delivery.call.id.clone()), "made twice");
                it.settle(delivery, succeeded()).await;
            }
        };
        let cancel = async {
            let mut cancelled = BTreeSet::new();
            for id in ids.iter().rev() {
                if other.queue.cancel(id).await.unwrap() == Changed::Yes {
                    cancelled.insert(id.clone());
                }
            }
            // Not by the counts: they are read message by message, and can miss a call that is being claimed.
            for id in &ids {
                eventually("it is over", async || {
                    matches!(it.state(id).await, Some(State::Succeeded | State::Cancelled))
                })
                .await;
            }
            cancelled
        };
        let cancelled = tokio::select! {
            () = make => BTreeSet::new(),
            cancelled = cancel => cancelled,
        };
        let made = made.into_inner().unwrap();
        assert!(made.is_disjoint(&cancelled), "{round}");
        assert_eq!(&made | &cancelled, set(&ids), "{round}");
        for id in &ids {
            let expect = if made.contains(id) { State::Succeeded } else { State::Cancelled };
            assert_eq!(it.state(id).await, Some(expect), "{round}");
        }
    }
}

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
    let filter = Filter { dead: Some(true), ..Filter::default() };
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
    let succeeded_ones = Filter { state: Some(State::Succeeded), ..Filter::default() };
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
async fn long_paths_of_some_do_not_make_the_others_too_large() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let long = || Call { target: format!("/{}", "x".repeat(60_000)), ..fresh() };
    let ids = it.publish_at_once(CALLS, long).await;
    assert_eq!(set(&ids).len(), CALLS);
    for _ in 0..CALLS {
        let delivery = it.take().await;
        assert_eq!(delivery.call.target.len(), 60_001);
        it.settle(delivery, succeeded()).await;
    }
    it.is_empty().await;
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
    assert_eq!(it.state(&slow.call.id).await, Some(State::Running));
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
    let limits = Limits { pending: 1000, ..LIMITS };
    let it = Gateway::open(Options { limits, ..options(&nats) }).await;
    eventually("the server answers", async || it.queue.status("x").await.is_ok()).await;
    let ids = it.publish_at_once(ALL, fresh).await;
    let made = std::sync::Mutex::new(BTreeMap::new());
    let work = async {
        loop {
            let delivery = it.queue.take(PLACES).await.unwrap();
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
                status.is_ok_and(|it| it.is_some_and(|it| it.state == State::Succeeded))
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
async fn only_what_is_small_and_due_goes_together() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let large = || Call { body: Bytes::from(vec![7; 20_000]), ..call("same") };
    let queue = it.queue.for_thread();
    for (number, call) in
        [large(), call("keyed"), call("later"), call("chosen")].into_iter().enumerate()
    {
        let mut calls = vec![
            Call { id: format!("{number}a"), ..call.clone() },
            Call { id: format!("{number}b"), ..call },
        ];
        for call in &mut calls {
            match number {
                1 => call.options.idempotency_key = Some(call.id.clone()),
                2 => call.options.not_before = Some(now() + 60_000),
                3 => call.options.chosen_id = true,
                _ => {}
            }
        }
        let published = calls.iter().map(|call| queue.publish(call.clone()));
        let published = futures_util::future::try_join_all(published).await.unwrap();
        let ids: Vec<_> = published.into_iter().map(|published| published.id).collect();
        assert_eq!(ids, [format!("{number}a"), format!("{number}b")]);
    }
    assert_eq!(messages(&nats, "calls").await, 8);
}

#[tokio::test]
async fn each_function_has_its_own() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let queue = it.queue.for_thread();
    let names = ["a", "b"];
    let calls = (0..CALLS).map(|number| call_of(names[number % 2], &number.to_string()));
    let published = calls.map(|call| queue.publish(call));
    let published = futures_util::future::try_join_all(published).await.unwrap();
    for name in names {
        assert_eq!(it.count(&format!("{name}.fn")).await.0, CALLS as u64 / 2);
    }
    let mut made = BTreeMap::new();
    for _ in 0..CALLS {
        let delivery = it.take().await;
        made.insert(delivery.call.id.clone(), delivery.call.function.name.clone());
        it.settle(delivery, succeeded()).await;
    }
    for (number, published) in published.iter().enumerate() {
        assert_eq!(made[&published.id], names[number % 2]);
    }
}

#[tokio::test]
async fn a_full_queue_takes_no_more_of_them() {
    let nats = Nats::start();
    let limits = Limits { pending: 30, ..LIMITS };
    let it = Gateway::open(Options { limits, ..options(&nats) }).await;
    eventually("the server answers", async || it.queue.status("x").await.is_ok()).await;
    it.publish_at_once(CALLS, fresh).await;
    let queue = it.queue.for_thread();
    let published = (0..CALLS).map(|_| queue.publish(fresh()));
    let published = within("publish", futures_util::future::join_all(published)).await;
    let refused = published.iter().filter(|it| **it == Err(Error::Full)).count();
    assert!((CALLS - 10..CALLS).contains(&refused), "{refused} refused");
    let there = it.count("echo.fn").await.0;
    assert_eq!(there, (2 * CALLS - refused) as u64);
    for _ in 0..there {
        it.settle(it.take().await, succeeded()).await;
    }
    it.is_empty().await;
    it.publish_at_once(CALLS, fresh).await;
}

#[tokio::test]
async fn a_large_answer_is_kept_beside_them() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let ids = it.publish_at_once(CALLS, fresh).await;
    let body = Bytes::from(vec![9; 1_500_000]);
    for _ in 0..CALLS {
        let delivery = it.take().await;
        let is_first = delivery.call.id == ids[3];
        let answer =
            Answer { status: 200, headers: Vec::new(), body: body.clone(), truncated: false };
        let (state, status) = (State::Succeeded, Some(200));
        let finished =
            Settlement::Finished { state, status, reason: None, answer: Some(answer), made: true };
        it.settle(delivery, if is_first { finished } else { succeeded() }).await;
    }
    assert!(it.queue.answer(&ids[3]).await.unwrap().unwrap().body == body);
    assert_eq!(&it.queue.answer(&ids[4]).await.unwrap().unwrap().body[..], b"answer");
    let all = Filter::default();
    assert_eq!(it.queue.purge(&all).await, Ok(CALLS as u64));
    assert_eq!(it.queue.answer(&ids[3]).await, Ok(None));
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
    assert!(it.queue.counts().await.is_ok());
    assert!(it.queue.list(&Filter::default(), None, 99).await.is_ok());
    assert!(it.takes_nothing(Duration::from_secs(1)).await);
}
