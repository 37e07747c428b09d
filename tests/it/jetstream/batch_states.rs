//! Calls that are published at the same time share a NATS message. Each of them has its own state.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use gateway::queue::status::CallState;
use gateway::queue::{ChangeOutcome, Filter};

use crate::support::eventually;
use crate::support::jetstream_batch::{CALLS, fresh, messages, set};
use crate::support::jetstream_queue::{Gateway, dead, now, retry, succeeded};
use crate::support::nats::Nats;

#[tokio::test]
async fn each_of_them_goes_through_its_states() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let ids = it.publish_at_once(CALLS, fresh).await;
    assert_eq!(set(&ids).len(), CALLS);
    assert!(messages(&nats, "calls").await < 5, "they are together");
    for id in &ids {
        assert_eq!(it.state(id).await, Some(CallState::Queued));
        assert_eq!(it.queue.result(id).await, Ok(None));
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
    assert_eq!(it.state(&first.call.id).await, Some(CallState::Running));
    assert_eq!(
        it.queue.cancel(&first.call.id).await,
        Ok(ChangeOutcome::WrongState(CallState::Running))
    );
    assert_eq!(it.count("echo.fn").await.1, 1);
    let id = first.call.id.clone();
    it.settle(first, succeeded()).await;
    let status = it.queue.status(&id).await.unwrap().unwrap();
    assert_eq!(
        (status.state, status.attempts, status.status),
        (CallState::Succeeded, 1, Some(200))
    );
    let answer = it.queue.result(&id).await.unwrap().unwrap();
    assert_eq!((answer.status, &answer.body[..], answer.headers.len()), (200, &b"answer"[..], 1));
    assert_eq!(it.queue.cancel(&id).await, Ok(ChangeOutcome::WrongState(CallState::Succeeded)));
    let mut made = BTreeSet::from([id]);
    while made.len() < CALLS {
        let delivery = it.take().await;
        assert!(made.insert(delivery.call.id.clone()), "made twice");
        it.settle(delivery, succeeded()).await;
    }
    assert_eq!(made, set(&ids));
    it.is_empty().await;
    for id in &ids {
        assert_eq!(it.state(id).await, Some(CallState::Succeeded));
        assert!(it.queue.result(id).await.unwrap().is_some());
    }
    let filter = Filter { state: Some(CallState::Succeeded), ..Filter::default() };
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
    assert_eq!(it.state(&ids[0]).await, Some(CallState::Retrying));
    it.settle(second, dead()).await;
    it.settle(third, succeeded()).await;
    assert_eq!(it.state(&ids[1]).await, Some(CallState::Failed));
    assert_eq!(it.count("echo.fn").await.3, 1);
    let again = it.take().await;
    assert_eq!((&again.call.id, again.attempts), (&ids[0], 1));
    it.settle(again, succeeded()).await;
    let filter = Filter { dead_letter: Some(true), ..Filter::default() };
    assert_eq!(it.queue.list(&filter, None, 9).await.unwrap().calls[0].id, ids[1]);
    assert_eq!(
        it.queue.redrive(&ids[0]).await,
        Ok(ChangeOutcome::WrongState(CallState::Succeeded))
    );
    assert_eq!(it.queue.redrive(&ids[1]).await, Ok(ChangeOutcome::Applied));
    let revived = it.take().await;
    assert_eq!((&revived.call.id, revived.attempts), (&ids[1], 0));
    it.settle(revived, dead()).await;
    assert_eq!(it.queue.cancel(&ids[1]).await, Ok(ChangeOutcome::Applied));
    assert_eq!(it.state(&ids[1]).await, Some(CallState::Cancelled));
    it.is_empty().await;
    assert_eq!(it.count("echo.fn").await, (0, 0, 0, 0));
    let states: Vec<_> = [&ids[0], &ids[2]].into_iter().map(|id| it.state(id)).collect();
    let states = futures_util::future::join_all(states).await;
    assert_eq!(states, [Some(CallState::Succeeded), Some(CallState::Succeeded)]);
}

#[tokio::test]
async fn one_that_is_dead_while_the_others_are_not_made_leaves_them_alone() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let ids = it.publish_at_once(CALLS, fresh).await;
    let delivery = it.take().await;
    let id = delivery.call.id.clone();
    it.settle(delivery, dead()).await;
    assert_eq!(it.queue.redrive(&id).await, Ok(ChangeOutcome::Applied));
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
        assert_eq!(it.queue.cancel(id).await, Ok(ChangeOutcome::Applied));
        assert_eq!(it.state(id).await, Some(CallState::Cancelled));
        assert_eq!(it.queue.cancel(id).await, Ok(ChangeOutcome::WrongState(CallState::Cancelled)));
    }
    assert_eq!(it.count("echo.fn").await.0, CALLS as u64 - 5);
    let cancelled = Filter { state: Some(CallState::Cancelled), ..Filter::default() };
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
                if other.queue.cancel(id).await.unwrap() == ChangeOutcome::Applied {
                    cancelled.insert(id.clone());
                }
            }
            // Not by the counts: they are read message by message, and can miss a call that is being claimed.
            for id in &ids {
                eventually("it is over", async || {
                    matches!(it.state(id).await, Some(CallState::Succeeded | CallState::Cancelled))
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
            let expect =
                if made.contains(id) { CallState::Succeeded } else { CallState::Cancelled };
            assert_eq!(it.state(id).await, Some(expect), "{round}");
        }
    }
}
