//! Bodies that are larger than a NATS message.

use std::time::Duration;

use bytes::Bytes;
use gateway::queue::ChangeOutcome;
use gateway::queue::call::QueuedCall;
use gateway::queue::status::{CallState, Settlement, StoredResponse};

use crate::support::jetstream_queue::{Gateway, LEASE, call, call_of, dead, now, retry, stream};
use crate::support::nats::Nats;

#[tokio::test]
async fn a_body_larger_than_a_message_passes() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let body: Bytes = (0..3_500_000u32).map(|n| (n % 251) as u8).collect::<Vec<_>>().into();
    let large = |id: &str| QueuedCall { body: body.clone(), ..call(id) };
    it.publish(large("a")).await;
    let delivery = it.take().await;
    assert!(delivery.call.body == body);
    it.settle(delivery, retry(now())).await;
    let delivery = it.take().await;
    assert_eq!((delivery.call.body == body, delivery.attempts), (true, 1));
    it.settle(delivery, dead()).await;
    assert_eq!(it.queue.redrive("a").await, Ok(ChangeOutcome::Applied));
    let delivery = it.take().await;
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
    it.settle(delivery, done).await;
    assert!(it.queue.result("a").await.unwrap().unwrap().body == body);
    it.publish(large("b")).await;
    assert!(it.publish(large("b")).await.duplicate);
    assert_eq!(it.queue.cancel("b").await, Ok(ChangeOutcome::Applied));
    // Nothing is left of bodies whose calls are over.
    let stored = stream(&nats, "gateway-faas-request-bodies").await;
    assert_eq!(stored.cached_info().state.messages, 0);
}

#[tokio::test]
async fn a_body_that_no_call_has_is_tidied_away() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    let large = |id: &str| QueuedCall { body: vec![7; 2_000_000].into(), ..call(id) };
    it.publish(large("kept")).await;
    it.publish(large("lost")).await;
    let calls = stream(&nats, "gateway-faas-request-calls").await;
    calls.purge().filter("faas.faas-request.*.*.lost").await.unwrap();
    // Another function's call may have the same id.
    it.publish(QueuedCall { body: vec![7; 2_000_000].into(), ..call_of("other", "kept") }).await;
    assert_eq!(it.tidy(LEASE * 1000, LEASE * 1000).await, Ok(0));
    assert_eq!(it.tidy(Duration::ZERO, LEASE * 1000).await, Ok(1));
    for _ in 0..2 {
        assert_eq!(it.take().await.call.body.len(), 2_000_000);
    }
}
