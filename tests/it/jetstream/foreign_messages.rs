//! Messages that no gateway wrote, and messages that cannot be deleted.

use gateway::queue::status::CallState;
use gateway::queue::{ChangeOutcome, Error, Filter};

use crate::support::eventually;
use crate::support::jetstream_queue::{Gateway, LEASE, PLACES, call, stranger, stream, succeeded};
use crate::support::nats::Nats;

#[tokio::test]
async fn a_message_that_no_gateway_wrote_holds_up_nobody() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    it.publish(call("a")).await;
    let strange = stranger(&nats).await;
    let names = vec![r#"["h","1"]"#; 5_000];
    let meta = |headers: &str, target: &str| {
        let names = r#""id":"x","name":"echo","namespace":"fn""#;
        format!(r#"{{{names},"headers":[{headers}],"target":"{target}"}}"#)
    };
    // More headers than there is room for, a path to another place, and a body without end.
    let crowd = meta(&names.join(","), "");
    let (dots, large) = (meta("", "/%2e%2e/x"), meta("", ""));
    let parts = format!(r#"{{"name":"x","count":{}}}"#, usize::MAX);
    for (id, call, body) in [("x", &crowd, None), ("y", &dots, None), ("z", &large, Some(parts))] {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Gateway-Version", "1");
        headers.insert("Gateway-Call", call.as_str());
        if let Some(body) = body {
            headers.insert("Gateway-Body", body.as_str());
        }
        let subject = format!("faas.faas-request.fn.echo.{id}");
        strange.publish_with_headers(subject, headers, "".into()).await.unwrap().await.unwrap();
    }
    it.publish(call("b")).await;
    for _ in 0..2 {
        let delivery = it.take().await;
        assert!(["a", "b"].contains(&delivery.call.id.as_str()), "{delivery:?}");
        it.settle(delivery, succeeded()).await;
    }
    assert!(it.takes_nothing(LEASE).await);
    assert!(
        it.queue.depths().await.is_ok() && it.queue.list(&Filter::default(), None, 9).await.is_ok()
    );
}

/// The stream of calls, of which nobody may remove any but by making it.
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
    let made = async || stranger(nats).await.create_stream(calls.clone()).await.is_ok();
    eventually("the stream is made", made).await;
}

#[tokio::test]
async fn a_cancelled_call_is_not_made_though_its_message_cannot_be_removed() {
    let nats = Nats::start();
    undeletable_calls(&nats).await;
    let it = Gateway::on(&nats).await;
    it.publish(call("a")).await;
    it.publish(call("b")).await;
    assert_eq!(it.queue.cancel("a").await, Ok(ChangeOutcome::Applied));
    assert_eq!(it.state("a").await, Some(CallState::Cancelled));
    // To purge a call is nothing but to remove it: that it is there is said.
    let queued = Filter { state: Some(CallState::Queued), ..Filter::default() };
    assert_eq!(it.queue.purge(&queued).await, Err(Error::Failed));
    let delivery = it.take().await;
    assert_eq!(delivery.call.id, "b");
    it.settle(delivery, succeeded()).await;
    // Whoever is given it has it go.
    let mut calls = stream(&nats, "gateway-faas-request-calls").await;
    tokio::select! {
        taken = it.queue.receive(PLACES) => panic!("made though it was cancelled: {taken:?}"),
        () = eventually("it is gone", async || calls.info().await.unwrap().state.messages == 0) => {}
    }
    assert_eq!(it.state("a").await, Some(CallState::Cancelled));
}
