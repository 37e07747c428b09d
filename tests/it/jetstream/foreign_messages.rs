//! Messages that no gateway wrote, and messages that cannot be deleted.

use std::collections::BTreeSet;

use gateway_queue::status::CallState;
use gateway_queue::{ChangeOutcome, Error, Filter, JobQueue as _, JobStore as _};

use crate::support::eventually;
use crate::support::jetstream_queue::{
    CONCURRENCY, LEASE, TestQueue, call, foreign_client, stream, succeeded,
};
use crate::support::nats::Nats;

#[tokio::test]
async fn an_invalid_message_does_not_block_other_calls() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    queue.publish(call("a")).await;
    let foreign = foreign_client(&nats).await;
    let names = vec![r#"["h","1"]"#; 5_000];
    let meta = |id: &str, headers: &str, target: &str| {
        let names = format!(r#""id":"{id}","name":"echo","namespace":"fn""#);
        format!(r#"{{{names},"headers":[{headers}],"target":"{target}"}}"#)
    };
    // More headers than allowed, a path outside of the function, and a body without end.
    let crowd = meta("x", &names.join(","), "");
    let (dots, large) = (meta("y", "", "/%2e%2e/x"), meta("z", "", ""));
    let parts = format!(r#"{{"name":"x","count":{}}}"#, usize::MAX);
    for (id, call, body) in [("x", &crowd, None), ("y", &dots, None), ("z", &large, Some(parts))] {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Gateway-Version", "1");
        headers.insert("Gateway-Call", call.as_str());
        if let Some(body) = body {
            headers.insert("Gateway-Body", body.as_str());
        }
        let subject = format!("faas.faas-request.fn.echo.{id}");
        foreign.publish_with_headers(subject, headers, "".into()).await.unwrap().await.unwrap();
    }
    queue.publish(call("b")).await;
    for _ in 0..2 {
        let delivery = queue.receive().await;
        assert!(["a", "b"].contains(&delivery.call.id.as_str()), "{delivery:?}");
        queue.settle(delivery, succeeded()).await;
    }
    assert!(queue.receives_nothing(LEASE).await);
    let dead = Filter { dead_letter: Some(true), ..Filter::default() };
    let dead = queue.inner.list(&dead, None, 9).await.unwrap().calls;
    let dead: BTreeSet<_> = dead.into_iter().map(|record| record.id).collect();
    assert_eq!(dead, BTreeSet::from(["x".to_owned(), "y".to_owned()]));
    assert!(
        queue.inner.depths().await.is_ok()
            && queue.inner.list(&Filter::default(), None, 9).await.is_ok()
    );
}

/// Creates the stream of calls with message deletion denied.
async fn undeletable_calls(nats: &Nats) {
    use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy};
    let calls = Config {
        name: "gateway-faas-request-calls".to_owned(),
        subjects: vec!["faas.faas-request.>".to_owned()],
        retention: RetentionPolicy::WorkQueue,
        discard: DiscardPolicy::New,
        max_messages: 50,
        max_messages_per_subject: 1,
        deny_delete: true,
        ..Config::default()
    };
    let executed = async || foreign_client(nats).await.create_stream(calls.clone()).await.is_ok();
    eventually("the stream is created", executed).await;
}

#[tokio::test]
async fn a_cancelled_call_is_not_executed_if_its_message_cannot_be_deleted() {
    let nats = Nats::start();
    undeletable_calls(&nats).await;
    let queue = TestQueue::connected(&nats).await;
    queue.publish(call("a")).await;
    queue.publish(call("b")).await;
    assert_eq!(queue.inner.cancel("a").await, Ok(ChangeOutcome::Applied));
    assert_eq!(queue.state("a").await, Some(CallState::Cancelled));
    // Purging means deleting, so it fails and the call stays listed.
    let queued = Filter { state: Some(CallState::Queued), ..Filter::default() };
    assert_eq!(queue.inner.purge(&queued).await, Err(Error::Failed));
    let delivery = queue.receive().await;
    assert_eq!(delivery.call.id, "b");
    queue.settle(delivery, succeeded()).await;
    // The worker that receives the cancelled call drops it.
    let mut calls = stream(&nats, "gateway-faas-request-calls").await;
    tokio::select! {
        received = queue.inner.receive(CONCURRENCY) => panic!("delivered though it was cancelled: {received:?}"),
        () = eventually("the process has ended", async || calls.info().await.unwrap().state.messages == 0) => {}
    }
    assert_eq!(queue.state("a").await, Some(CallState::Cancelled));
}
