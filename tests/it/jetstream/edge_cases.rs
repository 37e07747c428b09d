//! JetStream: calls that cannot be stored, calls that have lost their body, and calls that panic their worker.

use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::TryStreamExt;
use gateway_queue::call::QueuedCall;
use gateway_queue::status::{CallState, Settlement};
use gateway_queue::{ChangeOutcome, Error, JobQueue as _, JobStore as _};
use http::{HeaderName, HeaderValue};

use crate::support::jetstream_queue::{
    LEASE, TestQueue, call, call_to, dead_lettered, retry, stream, succeeded, unix_millis,
};
use crate::support::nats::Nats;
use crate::support::{eventually, within};

const CALLS: usize = 20;

/// A call with `size` bytes of headers.
fn call_with_headers(id: &str, size: usize) -> QueuedCall {
    let mut call = call(id);
    let value = HeaderValue::try_from("x".repeat(size)).unwrap();
    call.headers.insert(HeaderName::from_static("x-long"), value);
    call
}

#[tokio::test]
async fn headers_above_the_server_limit_are_refused_and_long_ones_pass() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    let refused =
        within("publish", queue.inner.publish(call_with_headers("large", 64_000), None)).await;
    assert!(matches!(refused, Err(Error::HeadTooLarge(63_488))), "{refused:?}");
    assert_eq!(queue.state("large").await, None);
    // Smaller calls would be batched at this rate.
    let publisher = queue.inner.for_thread();
    let sent = (0..CALLS)
        .map(|number| publisher.publish(call_with_headers(&number.to_string(), 50_000), None));
    within("publish", futures_util::future::try_join_all(sent)).await.unwrap();
    for attempts in [0; CALLS].into_iter().chain([1; CALLS]) {
        let delivery = queue.receive().await;
        assert_eq!(delivery.call.headers["x-long"].len(), 50_000);
        assert_eq!(delivery.attempts, attempts);
        let again = if attempts == 0 { retry(unix_millis()) } else { succeeded() };
        queue.settle(delivery, again).await;
    }
    queue.wait_until_empty().await;
}

#[tokio::test]
async fn a_call_without_its_body_is_delivered_as_such() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    let body = Bytes::from(vec![7; 2_000_000]);
    let start = Instant::now();
    queue.publish(QueuedCall { body: body.clone(), ..call("lost") }).await;
    queue.publish(QueuedCall { body, ..call("whole") }).await;
    let bodies = stream(&nats, "gateway-faas-request-bodies").await;
    bodies.purge().filter("faas-body.faas-request.lost.>").await.unwrap();
    let delivery = queue.receive().await;
    assert_eq!((delivery.call.id.as_str(), delivery.body_missing), ("whole", false));
    queue.settle(delivery, succeeded()).await;
    // Several lookups were made, the first one perhaps before the other call was settled.
    let delivery = queue.receive().await;
    assert!(delivery.body_missing && start.elapsed() > LEASE, "{delivery:?}");
    queue.settle(delivery, dead_lettered()).await;
    let status = queue.inner.status("lost").await.unwrap().unwrap();
    assert!(status.dead_letter && status.attempts == 0, "{status:?}");
    assert_eq!(queue.unfinished().await, 0);
    assert_eq!(queue.inner.cancel("lost").await, Ok(ChangeOutcome::Applied));
    assert_eq!(queue.state("lost").await, Some(CallState::Cancelled));
}

#[tokio::test]
async fn an_expired_call_keeps_its_last_response_status() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    queue.publish(call("late")).await;
    let delivery = queue.receive().await;
    queue.settle(delivery, retry(unix_millis())).await;
    let delivery = queue.receive().await;
    let running = queue.inner.status("late").await.unwrap().unwrap();
    assert_eq!(
        (running.state, running.attempts, running.status),
        (CallState::Running, 2, Some(503))
    );
    let (state, reason) = (CallState::Failed, Some("late".to_owned()));
    let expired =
        Settlement::Finished { state, status: None, reason, response: None, executed: false };
    queue.settle(delivery, expired).await;
    let status = queue.inner.status("late").await.unwrap().unwrap();
    assert_eq!((status.state, status.attempts, status.status), (state, 1, Some(503)));
}

#[tokio::test]
async fn a_call_that_panics_its_worker_is_retried_after_a_pause() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    queue.publish(call("odd")).await;
    let delivery = queue.receive().await;
    let began = Instant::now();
    let broken = tokio::spawn(async move {
        let _delivery = delivery;
        panic!("meant to be");
    });
    assert!(broken.await.unwrap_err().is_panic());
    assert_eq!(queue.receive().await.call.id, "odd");
    assert!(began.elapsed() >= Duration::from_millis(900), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_stopped_worker_leaves_no_call_in_state_running() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    let claims = async || stream(&nats, "gateway-faas-request-claims").await;
    let list = async || loop {
        let claims = claims().await;
        let last = claims.cached_info().state.last_sequence;
        // There may be a newer one by now.
        if let Ok(list) = claims.get_raw_message(last).await {
            return String::from_utf8(list.payload.to_vec()).unwrap();
        }
    };
    queue.publish(call("first")).await;
    let delivery = queue.receive().await;
    assert!(list().await.contains("echo"));
    queue.settle(delivery, succeeded()).await;
    eventually("its list of running calls is empty", async || list().await == r#"{"calls":{}}"#)
        .await;
    queue.publish(call("second")).await;
    let delivery = queue.receive().await;
    assert!(list().await.contains("echo"));
    queue.settle(delivery, succeeded()).await;
    queue.crash(Vec::new()).await;
    assert_eq!(list().await, r#"{"calls":{}}"#);
}

/// The number of waiting pull requests of each consumer.
async fn consumers(nats: &Nats) -> Vec<usize> {
    let calls = stream(nats, "gateway-faas-request-calls").await;
    calls.consumers().map_ok(|consumer| consumer.num_waiting).try_collect().await.unwrap()
}

#[tokio::test]
async fn idle_consumers_are_deleted_and_created_again() {
    let nats = Nats::start();
    let (queue, other) = (TestQueue::connected(&nats).await, TestQueue::connected(&nats).await);
    queue.publish(call_to("gone", "1")).await;
    queue.publish(call_to("kept", "2")).await;
    let mut received = [queue.receive().await, queue.receive().await];
    received.sort_by_key(|delivery| delivery.call.id.clone());
    let [gone, kept] = received;
    queue.settle(gone, succeeded()).await;
    eventually("one call is left", async || queue.unfinished().await == 1).await;
    let age = LEASE * 1000;
    queue.collect_garbage(age, age).await.unwrap();
    assert_eq!(consumers(&nats).await.len(), 2);
    let waiting_pulls = async || consumers(&nats).await;
    eventually("no consumer has pull requests", async || waiting_pulls().await == [0, 0]).await;
    let waits = async {
        eventually("another consumer has", async || waiting_pulls().await == [1, 1]).await;
        queue.collect_garbage(age, Duration::ZERO).await.unwrap();
        assert_eq!(consumers(&nats).await.len(), 1);
        tokio::time::sleep(LEASE).await;
        assert_eq!(consumers(&nats).await.len(), 1, "an idle consumer is not created again");
        // A client that has published before assumes that the consumer still exists.
        queue.publish(call_to("gone", "3")).await;
        std::future::pending::<()>().await;
    };
    let delivery = tokio::select! {
        delivery = other.receive() => delivery,
        () = waits => unreachable!(),
    };
    assert_eq!(delivery.call.id, "3");
    assert_eq!(consumers(&nats).await.len(), 2);
    other.settle(delivery, succeeded()).await;
    queue.settle(kept, succeeded()).await;
    queue.wait_until_empty().await;
    queue.collect_garbage(age, Duration::ZERO).await.unwrap();
    assert!(consumers(&nats).await.is_empty());
}
