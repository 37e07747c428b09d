//! Leases: which worker executes a call, and what happens to the calls of a worker that dies.

use std::time::{Duration, Instant};

use gateway::queue::embedded::Limits;
use gateway::queue::jetstream::Options;
use gateway::queue::status::CallState;

use crate::support::jetstream_queue::{
    Gateway, LEASE, LIMITS, PLACES, call, call_of, options, stream, succeeded,
};
use crate::support::nats::Nats;
use crate::support::{eventually, within};

#[tokio::test]
async fn a_call_that_runs_for_long_is_delivered_once() {
    let nats = Nats::start();
    let lease = Duration::from_secs(1);
    let (it, other) = (
        Gateway::open(Options { lease, ..options(&nats) }).await,
        Gateway::open(Options { lease, ..options(&nats) }).await,
    );
    eventually("the server answers", async || it.queue.status("x").await.is_ok()).await;
    it.publish(call("slow")).await;
    let delivery = it.take().await;
    assert!(other.takes_nothing(lease * 7 / 2).await);
    assert_eq!(it.state("slow").await, Some(CallState::Running));
    it.settle(delivery, succeeded()).await;
    assert!(other.takes_nothing(lease * 3 / 2).await);
    assert_eq!(it.queue.status("slow").await.unwrap().unwrap().attempts, 1);
}

#[tokio::test]
async fn a_call_that_comes_again_to_one_who_makes_it_is_made_once() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    it.publish(call("a")).await;
    let delivery = it.take().await;
    // As if nothing had been heard of it for too long.
    let strange = async_nats::connect(nats.url()).await.unwrap();
    let given_back = "$JS.ACK.gateway-faas-request-calls.fn,echo.1.1.1.0.0";
    strange.publish(given_back, "-NAK".into()).await.unwrap();
    strange.flush().await.unwrap();
    assert!(it.takes_nothing(LEASE * 3 / 2).await);
    it.settle(delivery, succeeded()).await;
    it.is_empty().await;
    let status = it.queue.status("a").await.unwrap().unwrap();
    assert_eq!((status.state, status.attempts), (CallState::Succeeded, 1));
}

#[tokio::test]
async fn a_final_state_is_there_for_as_long_as_its_message_may_come_again() {
    let nats = Nats::start();
    let limits = Limits { result_ttl: 0, idempotency_ttl: 0, ..LIMITS };
    let it = Gateway::open(Options { limits, ..options(&nats) }).await;
    eventually("the server answers", async || it.queue.status("x").await.is_ok()).await;
    it.publish(call("a")).await;
    it.settle(it.take().await, succeeded()).await;
    assert_eq!(it.state("a").await, None);
    let notes = stream(&nats, "gateway-faas-request-notes").await;
    let cached = notes.cached_info();
    assert!(cached.config.max_age > LEASE * 2 && cached.state.messages == 1, "{cached:?}");
}

#[tokio::test]
async fn a_call_of_one_who_died_is_taken_by_another() {
    let nats = Nats::start();
    let (it, other) = (Gateway::on(&nats).await, Gateway::on(&nats).await);
    it.publish(call("a")).await;
    let taken = it.take().await;
    it.dies(vec![taken]).await;
    let delivery = other.take().await;
    assert_eq!((delivery.call.id.as_str(), delivery.attempts), ("a", 0));
    other.settle(delivery, succeeded()).await;
    assert_eq!(other.state("a").await, Some(CallState::Succeeded));
}

#[tokio::test]
async fn two_takers_share_the_work() {
    const CALLS: usize = 30;
    let nats = Nats::start();
    let (one, two) = (Gateway::on(&nats).await, Gateway::on(&nats).await);
    for number in 0..CALLS {
        one.publish(call(&number.to_string())).await;
    }
    let made = std::sync::Mutex::new(Vec::new());
    let work = async |it: &Gateway| {
        let mut mine = 0;
        while made.lock().unwrap().len() < CALLS {
            let taken = tokio::time::timeout(Duration::from_millis(500), it.queue.receive(PLACES));
            let Ok(delivery) = taken.await else { continue };
            let delivery = delivery.unwrap();
            // So that the other has a chance.
            tokio::time::sleep(Duration::from_millis(20)).await;
            made.lock().unwrap().push(delivery.call.id.clone());
            it.settle(delivery, succeeded()).await;
            mine += 1;
        }
        mine
    };
    let both = async { tokio::join!(work(&one), work(&two)) };
    let (first, second) = within("all are made", both).await;
    assert!(first > 0 && second > 0, "{first} and {second}");
    let mut made = made.into_inner().unwrap();
    made.sort_unstable();
    made.dedup();
    assert_eq!((made.len(), first + second), (CALLS, CALLS));
}

#[tokio::test]
async fn a_slow_function_does_not_hold_up_another() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    for number in 0..30 {
        it.publish(call_of("slow", &format!("s{number}"))).await;
    }
    // It takes what one function may have, and none of it ends.
    let mut hanging = Vec::new();
    while let Ok(taken) = tokio::time::timeout(LEASE, it.queue.receive(PLACES)).await {
        hanging.push(taken.unwrap());
    }
    assert!((PLACES / 2..PLACES).contains(&hanging.len()), "{}", hanging.len());
    for number in 0..20 {
        it.publish(call_of("quick", &format!("q{number}"))).await;
    }
    let start = Instant::now();
    for _ in 0..20 {
        let delivery = it.take().await;
        assert_eq!(delivery.call.function.name, "quick");
        it.settle(delivery, succeeded()).await;
    }
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}
