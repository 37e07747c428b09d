//! Bodies that are larger than a NATS message.

use std::time::Duration;

use bytes::Bytes;
use gateway_queue::call::QueuedCall;
use gateway_queue::status::{CallState, Settlement, StoredResponse};
use gateway_queue::{ChangeOutcome, JobStore as _};

use crate::support::jetstream_queue::{
    LEASE, TestQueue, call, call_to, dead_lettered, retry, stream, unix_millis,
};
use crate::support::nats::Nats;

#[tokio::test]
async fn a_body_larger_than_a_nats_message_passes() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    let body: Bytes = (0..3_500_000u32).map(|n| (n % 251) as u8).collect::<Vec<_>>().into();
    let large = |id: &str| QueuedCall { body: body.clone(), ..call(id) };
    queue.publish(large("a")).await;
    let delivery = queue.receive().await;
    assert!(delivery.call.body == body);
    queue.settle(delivery, retry(unix_millis())).await;
    let delivery = queue.receive().await;
    assert_eq!((delivery.call.body == body, delivery.attempts), (true, 1));
    queue.settle(delivery, dead_lettered()).await;
    assert_eq!(queue.inner.redrive("a").await, Ok(ChangeOutcome::Applied));
    let delivery = queue.receive().await;
    assert!(delivery.call.body == body);
    let answer =
        StoredResponse { status: 200, headers: Vec::new(), body: body.clone(), truncated: false };
    let (status, answer) = (Some(200), Some(answer));
    let done = Settlement::Finished {
        state: CallState::Succeeded,
        status,
        reason: None,
        response: answer,
        executed: true,
    };
    queue.settle(delivery, done).await;
    assert!(queue.inner.result("a").await.unwrap().unwrap().body == body);
    queue.publish(large("b")).await;
    assert!(queue.publish(large("b")).await.duplicate);
    assert_eq!(queue.inner.cancel("b").await, Ok(ChangeOutcome::Applied));
    // Bodies of finished calls are deleted.
    let stored = stream(&nats, "gateway-faas-request-bodies").await;
    assert_eq!(stored.cached_info().state.messages, 0);
}

#[tokio::test]
async fn an_orphaned_body_is_collected() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    let large = |id: &str| QueuedCall { body: vec![7; 2_000_000].into(), ..call(id) };
    queue.publish(large("kept")).await;
    queue.publish(large("lost")).await;
    let calls = stream(&nats, "gateway-faas-request-calls").await;
    calls.purge().filter("faas.faas-request.*.*.lost").await.unwrap();
    // Another function's call may have the same id.
    queue.publish(QueuedCall { body: vec![7; 2_000_000].into(), ..call_to("other", "kept") }).await;
    assert_eq!(queue.collect_garbage(LEASE * 1000, LEASE * 1000).await, Ok(0));
    assert_eq!(queue.collect_garbage(Duration::ZERO, LEASE * 1000).await, Ok(1));
    for _ in 0..2 {
        assert_eq!(queue.receive().await.call.body.len(), 2_000_000);
    }
}
