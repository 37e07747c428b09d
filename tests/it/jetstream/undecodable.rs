//! Messages that cannot be decoded become dead letters, with their headers and payload.

use std::collections::BTreeMap;
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::consumer::PullConsumer;
use async_nats::jetstream::{AckKind, message::StreamMessage};
use futures_util::StreamExt;
use gateway_queue::status::{CallRecord, CallState};
use gateway_queue::{ChangeOutcome, Filter, JobQueue as _, JobStore as _};

use crate::support::jetstream_batch::{CALLS, id_set, message_count, new_call};
use crate::support::jetstream_queue::{
    CONCURRENCY, LEASE, TestQueue, call, foreign_client, stream, succeeded,
};
use crate::support::nats::Nats;
use crate::support::{eventually, within};

/// Subject of calls of the function `echo.fn`.
const SUBJECT: &str = "faas.faas-request.fn.echo";

/// Publishes a message under `token` that no gateway wrote.
async fn publish_foreign(
    nats: &Nats,
    token: &str,
    headers: &[(&str, &str)],
    payload: &'static str,
) {
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        map.append(*name, *value);
    }
    let subject = format!("{SUBJECT}.{token}");
    let client = foreign_client(nats).await;
    let stored = client.publish_with_headers(subject, map, payload.into()).await.unwrap();
    stored.await.unwrap();
}

/// Receives in the background, until the calls in the stream are this many. Panics if a call is delivered.
async fn reject_until(queue: &TestQueue, nats: &Nats, messages: u64) {
    tokio::select! {
        received = queue.inner.receive(CONCURRENCY) => panic!("delivered: {received:?}"),
        () = eventually("messages are rejected", async || {
            message_count(nats, "calls").await == messages
        }) => {}
    }
}

async fn dead_letters(queue: &TestQueue) -> Vec<CallRecord> {
    let dead = Filter { dead_letter: Some(true), ..Filter::default() };
    queue.inner.list(&dead, None, 100).await.unwrap().calls
}

/// The stored dead letter on this subject.
async fn stored_letter(nats: &Nats, token: &str) -> StreamMessage {
    let dead = stream(nats, "gateway-faas-request-dead").await;
    let subject = format!("faas-dead.faas-request.fn.echo.{token}");
    dead.get_last_raw_message_by_subject(&subject).await.unwrap()
}

#[tokio::test]
async fn a_damaged_call_becomes_a_dead_letter_with_its_headers_and_payload() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    queue.publish(call("good")).await;
    queue.settle(queue.receive().await, succeeded()).await;
    let headers = [("Gateway-Version", "1"), ("Gateway-Call", "{\"id\":"), ("X-Own", "1")];
    publish_foreign(&nats, "broken", &headers, "raw").await;
    reject_until(&queue, &nats, 0).await;
    let record = dead_letters(&queue).await.pop().unwrap();
    assert_eq!((record.id.as_str(), record.function.as_str()), ("broken", "echo.fn"));
    assert!(record.dead_letter && record.state == CallState::Failed && record.submitted_at > 0);
    assert_eq!(record.reason.as_deref(), Some("a queued call cannot be parsed"));
    assert_eq!(queue.state("broken").await, Some(CallState::Failed));
    assert_eq!(queue.inner.depths().await.unwrap()[0].1.dead_letters, 1);
    let stored = stored_letter(&nats, "broken").await;
    assert_eq!(&stored.payload[..], b"raw");
    assert_eq!(stored.headers.get("Gateway-Call").unwrap().as_str(), "{\"id\":");
    assert_eq!(stored.headers.get("X-Own").unwrap().as_str(), "1");
    // Enqueued again, it cannot be decoded again, and replaces its dead letter.
    assert_eq!(queue.inner.redrive("broken").await, Ok(ChangeOutcome::Applied));
    reject_until(&queue, &nats, 0).await;
    assert_eq!(dead_letters(&queue).await.len(), 1);
    let stored = stored_letter(&nats, "broken").await;
    assert_eq!(stored.headers.get("X-Own").unwrap().as_str(), "1");
    assert_eq!(queue.inner.cancel("broken").await, Ok(ChangeOutcome::Applied));
    assert_eq!(dead_letters(&queue).await, []);
}

#[tokio::test]
async fn a_message_with_the_subject_of_another_call_is_not_executed() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    queue.publish(call("a")).await;
    queue.settle(queue.receive().await, succeeded()).await;
    let meta = r#"{"id":"a","name":"echo","namespace":"fn"}"#;
    publish_foreign(&nats, "b", &[("Gateway-Version", "1"), ("Gateway-Call", meta)], "").await;
    reject_until(&queue, &nats, 0).await;
    let record = dead_letters(&queue).await.pop().unwrap();
    assert_eq!(record.id, "b");
    assert!(record.reason.unwrap().contains("another call"));
    assert_eq!(queue.state("a").await, Some(CallState::Succeeded));
}

#[tokio::test]
async fn a_damaged_batch_becomes_one_dead_letter() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    queue.publish(call("good")).await;
    queue.settle(queue.receive().await, succeeded()).await;
    publish_foreign(&nats, "+000000000a41", &[("Gateway-Version", "2")], "raw").await;
    // A client may choose the id of a call, but not one that hides the dead letter.
    queue.publish(call("+000000000a41")).await;
    queue.settle(queue.receive().await, succeeded()).await;
    reject_until(&queue, &nats, 0).await;
    let record = dead_letters(&queue).await.pop().unwrap();
    assert_eq!((record.id.as_str(), record.function.as_str()), ("+000000000a41", "echo.fn"));
    assert_eq!(&stored_letter(&nats, "+000000000a41").await.payload[..], b"raw");
    let dead = Filter { dead_letter: Some(true), ..Filter::default() };
    assert_eq!(queue.inner.purge(&dead).await, Ok(1));
    assert_eq!(dead_letters(&queue).await, []);
}

#[tokio::test]
async fn a_batch_with_a_damaged_record_is_executed_after_it_is_redriven() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    let ids = queue.publish_batch(CALLS, new_call).await;
    let calls = stream(&nats, "gateway-faas-request-calls").await;
    let batches = calls.info_with_subjects(format!("{SUBJECT}.*")).await.unwrap();
    let batches: Vec<String> = batches.map(|subject| subject.unwrap().0).collect().await;
    for batch in &batches {
        let stored = calls.get_last_raw_message_by_subject(batch).await.unwrap();
        // The sequence of the batch, an index, and an unknown tag.
        let record = [&stored.sequence.to_be_bytes()[..], &[0, 99]].concat();
        let subject = batch.replacen("faas.", "faas-open.", 1);
        foreign_client(&nats).await.publish(subject, record.into()).await.unwrap().await.unwrap();
    }
    // A new process, since this one knows that no other has changed the batches.
    drop(queue);
    reject_deliveries(&nats, batches.len(), 60).await;
    let queue = TestQueue::connected(&nats).await;
    reject_until(&queue, &nats, 0).await;
    let dead = dead_letters(&queue).await;
    assert_eq!(dead.len(), batches.len());
    for record in dead {
        assert!(record.reason.unwrap().contains("record"));
        assert_eq!(queue.inner.redrive(&record.id).await, Ok(ChangeOutcome::Applied));
    }
    let mut executed = Vec::new();
    for _ in 0..CALLS {
        let delivery = queue.receive().await;
        executed.push(delivery.call.id.clone());
        queue.settle(delivery, succeeded()).await;
    }
    assert_eq!(id_set(&executed), id_set(&ids));
    assert_eq!(dead_letters(&queue).await, []);
}

/// Receives each of `messages` messages at least `times` times, and rejects it, as other gateways would.
async fn reject_deliveries(nats: &Nats, messages: usize, times: i64) {
    let calls = stream(nats, "gateway-faas-request-calls").await;
    let consumer: PullConsumer = calls.get_consumer("fn,echo").await.unwrap();
    let mut counts = BTreeMap::new();
    while counts.values().filter(|count| **count >= times).count() < messages {
        // No pull is left open: the server would deliver a message to nobody.
        let mut pulled = consumer.fetch().max_messages(1).messages().await.unwrap();
        let Some(message) = within("receive a message", pulled.next()).await else { continue };
        let message = message.unwrap();
        let info = message.info().unwrap();
        counts.insert(info.stream_sequence, info.delivered);
        message.ack_with(AckKind::Nak(None)).await.unwrap();
    }
}

#[tokio::test]
async fn a_message_of_a_newer_version_is_left_for_newer_gateways_for_a_while() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    queue.publish(call("good")).await;
    queue.settle(queue.receive().await, succeeded()).await;
    publish_foreign(&nats, "newer", &[("Gateway-Version", "9")], "raw").await;
    assert!(queue.receives_nothing(LEASE).await);
    assert_eq!((message_count(&nats, "calls").await, dead_letters(&queue).await.len()), (1, 0));
    queue.crash(Vec::new()).await;
    // The first delivery delayed the next one; a consumer that is created again delivers at once.
    let calls = stream(&nats, "gateway-faas-request-calls").await;
    calls.delete_consumer("fn,echo").await.unwrap();
    let queue = TestQueue::connected(&nats).await;
    queue.publish(call("good again")).await;
    queue.settle(queue.receive().await, succeeded()).await;
    queue.crash(Vec::new()).await;
    calls.delete_consumer("fn,echo").await.unwrap();
    let config = async_nats::jetstream::consumer::pull::Config {
        durable_name: Some("fn,echo".to_owned()),
        filter_subject: format!("{SUBJECT}.*"),
        ack_wait: LEASE,
        ..Default::default()
    };
    calls.create_consumer(config).await.unwrap();
    reject_deliveries(&nats, 1, 60).await;
    let queue = TestQueue::connected(&nats).await;
    reject_until(&queue, &nats, 0).await;
    let record = dead_letters(&queue).await.pop().unwrap();
    assert_eq!(record.id, "newer");
    assert!(record.reason.unwrap().contains("version 9"));
    assert_eq!(&stored_letter(&nats, "newer").await.payload[..], b"raw");
}

#[tokio::test]
async fn a_message_whose_ack_is_lost_becomes_one_dead_letter() {
    let (_directory, nats, queue, other) = TestQueue::restricted("$JS.ACK.>").await;
    publish_foreign(&nats, "broken", &[], "raw").await;
    // Delivered again and again, as its acks are lost.
    assert!(queue.receives_nothing(LEASE * 3).await);
    let dead = stream(&nats, "gateway-faas-request-dead").await;
    let state = &dead.cached_info().state;
    assert_eq!(message_count(&nats, "calls").await, 1);
    // The stream also has the marker of the server's start.
    assert_eq!(dead_letters(&other).await.len(), 1);
    assert!(state.last_sequence <= 3, "stored more than once: {state:?}");
    reject_until(&other, &nats, 0).await;
    assert_eq!(dead_letters(&other).await.len(), 1);
}

#[tokio::test]
async fn a_message_is_not_acknowledged_before_its_dead_letter_is_stored() {
    let (_directory, nats, queue, other) =
        TestQueue::restricted("faas-dead.faas-request.fn.>").await;
    publish_foreign(&nats, "broken", &[], "raw").await;
    assert!(queue.receives_nothing(LEASE + Duration::from_secs(2)).await);
    assert_eq!((message_count(&nats, "calls").await, dead_letters(&other).await.len()), (1, 0));
}
