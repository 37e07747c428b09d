//! Which calls are batched, and how large a batch may be.

use std::collections::BTreeMap;

use bytes::Bytes;
use gateway::queue::call::QueuedCall;
use gateway::queue::embedded::Limits;
use gateway::queue::jetstream::Options;
use gateway::queue::status::{CallState, Settlement, StoredResponse};
use gateway::queue::{Error, Filter};

use crate::support::jetstream_batch::{CALLS, fresh, messages, set};
use crate::support::jetstream_queue::{Gateway, LIMITS, call, call_of, now, options, succeeded};
use crate::support::nats::Nats;
use crate::support::{eventually, within};

#[tokio::test]
async fn long_paths_of_some_do_not_make_the_others_too_large() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let long = || QueuedCall { target: format!("/{}", "x".repeat(60_000)), ..fresh() };
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
async fn only_what_is_small_and_due_goes_together() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let large = || QueuedCall { body: Bytes::from(vec![7; 20_000]), ..call("same") };
    let queue = it.queue.for_thread();
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
    let limits = Limits { max_pending: 30, ..LIMITS };
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
        it.settle(delivery, if is_first { finished } else { succeeded() }).await;
    }
    assert!(it.queue.result(&ids[3]).await.unwrap().unwrap().body == body);
    assert_eq!(&it.queue.result(&ids[4]).await.unwrap().unwrap().body[..], b"answer");
    let all = Filter::default();
    assert_eq!(it.queue.purge(&all).await, Ok(CALLS as u64));
    assert_eq!(it.queue.result(&ids[3]).await, Ok(None));
}
