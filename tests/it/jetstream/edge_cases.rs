//! The queue on a NATS server: calls that cannot be stored, have lost their body, or break those who make them.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::TryStreamExt;
use gateway::queue::call::QueuedCall;
use gateway::queue::status::{CallState, Settlement};
use gateway::queue::{ChangeOutcome, Error};
use http::{HeaderName, HeaderValue};

use crate::support::jetstream_queue::{
    Gateway, LEASE, call, call_of, dead, now, retry, stream, succeeded,
};
use crate::support::nats::Nats;
use crate::support::{eventually, within};

const CALLS: usize = 20;

/// A call with so many bytes of headers.
fn with_head(id: &str, size: usize) -> QueuedCall {
    let mut call = call(id);
    let value = HeaderValue::try_from("x".repeat(size)).unwrap();
    call.headers.insert(HeaderName::from_static("x-long"), value);
    call
}

#[tokio::test]
async fn headers_that_the_server_does_not_take_are_refused_and_long_ones_pass() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let refused = within("publish", it.queue.publish(with_head("large", 64_000))).await;
    assert!(matches!(refused, Err(Error::HeadTooLarge(63_488))), "{refused:?}");
    assert_eq!(it.state("large").await, None);
    // So many at a time would go together, if they were smaller.
    let queue = it.queue.for_thread();
    let sent = (0..CALLS).map(|number| queue.publish(with_head(&number.to_string(), 50_000)));
    within("publish", futures_util::future::try_join_all(sent)).await.unwrap();
    for attempts in [0; CALLS].into_iter().chain([1; CALLS]) {
        let delivery = it.take().await;
        assert_eq!(delivery.call.headers["x-long"].len(), 50_000);
        assert_eq!(delivery.attempts, attempts);
        let again = if attempts == 0 { retry(now()) } else { succeeded() };
        it.settle(delivery, again).await;
    }
    it.is_empty().await;
}

#[tokio::test]
async fn a_call_whose_body_is_lost_is_handed_out_as_such() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let body = Bytes::from(vec![7; 2_000_000]);
    let start = Instant::now();
    it.publish(QueuedCall { body: body.clone(), ..call("lost") }).await;
    it.publish(QueuedCall { body, ..call("whole") }).await;
    let bodies = stream(&nats, "gateway-faas-request-bodies").await;
    bodies.purge().filter("faas-body.faas-request.lost.>").await.unwrap();
    let delivery = it.take().await;
    assert_eq!((delivery.call.id.as_str(), delivery.body_missing), ("whole", false));
    it.settle(delivery, succeeded()).await;
    // It was looked for some times, the first time perhaps before the other one was settled.
    let delivery = it.take().await;
    assert!(delivery.body_missing && start.elapsed() > LEASE, "{delivery:?}");
    it.settle(delivery, dead()).await;
    let status = it.queue.status("lost").await.unwrap().unwrap();
    assert!(status.dead_letter && status.attempts == 0, "{status:?}");
    assert_eq!(it.unfinished().await, 0);
    assert_eq!(it.queue.cancel("lost").await, Ok(ChangeOutcome::Applied));
    assert_eq!(it.state("lost").await, Some(CallState::Cancelled));
}

#[tokio::test]
async fn a_call_that_expires_keeps_what_was_answered_last() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    it.publish(call("late")).await;
    let delivery = it.take().await;
    it.settle(delivery, retry(now())).await;
    let delivery = it.take().await;
    let running = it.queue.status("late").await.unwrap().unwrap();
    assert_eq!(
        (running.state, running.attempts, running.status),
        (CallState::Running, 2, Some(503))
    );
    let (state, reason) = (CallState::Failed, Some("late".to_owned()));
    let expired =
        Settlement::Finished { state, status: None, reason, response: None, executed: false };
    it.settle(delivery, expired).await;
    let status = it.queue.status("late").await.unwrap().unwrap();
    assert_eq!((status.state, status.attempts, status.status), (state, 1, Some(503)));
}

#[tokio::test]
async fn a_call_that_breaks_its_worker_waits_before_it_is_made_again() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    it.publish(call("odd")).await;
    let delivery = it.take().await;
    let began = Instant::now();
    let broken = tokio::spawn(async move {
        let _delivery = delivery;
        panic!("meant to be");
    });
    assert!(broken.await.unwrap_err().is_panic());
    assert_eq!(it.take().await.call.id, "odd");
    assert!(began.elapsed() >= Duration::from_millis(900), "{:?}", began.elapsed());
}

#[tokio::test]
async fn one_who_makes_no_more_calls_leaves_none_behind_as_running() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let claims = async || stream(&nats, "gateway-faas-request-claims").await;
    let list = async || loop {
        let claims = claims().await;
        let last = claims.cached_info().state.last_sequence;
        // There may be another one by now.
        if let Ok(list) = claims.get_raw_message(last).await {
            return String::from_utf8(list.payload.to_vec()).unwrap();
        }
    };
    it.publish(call("first")).await;
    let delivery = it.take().await;
    assert!(list().await.contains("echo"));
    it.settle(delivery, succeeded()).await;
    eventually("its list is empty", async || list().await == r#"{"calls":{}}"#).await;
    it.publish(call("second")).await;
    let delivery = it.take().await;
    assert!(list().await.contains("echo"));
    it.settle(delivery, succeeded()).await;
    it.dies(Vec::new()).await;
    assert_eq!(list().await, r#"{"calls":{}}"#);
}

/// Of each consumer, how many ask it for calls.
async fn consumers(nats: &Nats) -> Vec<usize> {
    let calls = stream(nats, "gateway-faas-request-calls").await;
    calls.consumers().map_ok(|consumer| consumer.num_waiting).try_collect().await.unwrap()
}

#[tokio::test]
async fn consumers_of_functions_without_calls_are_tidied_away_and_come_back() {
    let nats = Nats::start();
    let (it, other) = (Gateway::on(&nats).await, Gateway::on(&nats).await);
    it.publish(call_of("gone", "1")).await;
    it.publish(call_of("kept", "2")).await;
    let mut taken = [it.take().await, it.take().await];
    taken.sort_by_key(|delivery| delivery.call.id.clone());
    let [gone, kept] = taken;
    it.settle(gone, succeeded()).await;
    eventually("one is left", async || it.unfinished().await == 1).await;
    let age = LEASE * 1000;
    it.tidy(age, age).await.unwrap();
    assert_eq!(consumers(&nats).await.len(), 2);
    let asked = async || consumers(&nats).await;
    eventually("nobody asks for calls", async || asked().await == [0, 0]).await;
    let waits = async {
        eventually("another one does", async || asked().await == [1, 1]).await;
        it.tidy(age, Duration::ZERO).await.unwrap();
        assert_eq!(consumers(&nats).await.len(), 1);
        tokio::time::sleep(LEASE).await;
        assert_eq!(consumers(&nats).await.len(), 1, "nobody makes it anew for nothing");
        // Who published before believes that it is there still.
        it.publish(call_of("gone", "3")).await;
        std::future::pending::<()>().await;
    };
    let delivery = tokio::select! {
        delivery = other.take() => delivery,
        () = waits => unreachable!(),
    };
    assert_eq!(delivery.call.id, "3");
    assert_eq!(consumers(&nats).await.len(), 2);
    other.settle(delivery, succeeded()).await;
    it.settle(kept, succeeded()).await;
    it.is_empty().await;
    it.tidy(age, Duration::ZERO).await.unwrap();
    assert!(consumers(&nats).await.is_empty());
}
