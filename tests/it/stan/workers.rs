//! Several workers of one queue: which of them executes a call, and what happens when one of them stops.

use std::time::Duration;

use bytes::Bytes;
use gateway_base::function::Function;
use gateway_queue::JobQueue as _;
use gateway_queue::call::{CallOptions, QueuedCall};
use http::HeaderMap;

use crate::support::eventually;
use crate::support::fake_stan::{CHANNEL, FakeStan};
use crate::support::gateway::Gateway;
use crate::support::nats::Nats;
use crate::support::provider::Provider;
use crate::support::stan_queue::{
    DELAYED, DELAYED_1H, on_stan, open_registered_worker, open_worker, receive, succeeded,
    wait_until_acknowledged,
};

#[tokio::test]
async fn a_call_longer_than_ack_wait_is_executed_once() {
    let (nats, mut provider) = (Nats::start(), Provider::manual());
    let stan = FakeStan::start(&nats).await;
    let worker = on_stan(&nats, Gateway::worker()).provider(&provider).var("ack_wait", "1s");
    let _worker = worker.start().await;
    stan.store_message(CHANNEL, r#"{"Function":"echo"}"#);
    let mut call = provider.next_call().await;
    eventually("the call is redelivered", async || stan.deliveries_and_pending(CHANNEL).0 >= 4)
        .await;
    assert_eq!(provider.call_count(), 1);
    call.respond(200, "").await;
    eventually("the call is acknowledged", async || stan.deliveries_and_pending(CHANNEL).1 == 0)
        .await;
    assert_eq!(provider.call_count(), 1);
}

#[tokio::test]
async fn a_redelivered_call_is_not_executed_while_its_owner_runs() {
    let nats = Nats::start();
    let stan = FakeStan::start(&nats).await;
    let (one, two) = (open_worker(&nats, "one").await, open_worker(&nats, "two").await);
    let both = async { tokio::join!(one.receive(4), two.receive(4)) };
    // The first receive registers a worker; nothing is there yet.
    assert!(tokio::time::timeout(Duration::from_millis(1), both).await.is_err());
    eventually("both workers execute calls", async || {
        let workers = stan.client_ids().into_iter().filter(|id| id.starts_with("faas-worker"));
        workers.count() == 2
    })
    .await;
    let call = QueuedCall {
        id: "a".to_owned(),
        function: Function { name: "echo".to_owned(), namespace: "fn".to_owned() },
        target: String::new(),
        headers: HeaderMap::new(),
        body: Bytes::from_static(b"body"),
        options: CallOptions { expires_at: Some(7), ..CallOptions::default() },
    };
    eventually("the call is accepted", async || one.publish(call.clone(), None).await.is_ok())
        .await;
    let (delivery, other) = tokio::select! {
        delivery = receive(&one) => (delivery, &two),
        delivery = receive(&two) => (delivery, &one),
    };
    assert_eq!((delivery.call.body.as_ref(), delivery.attempts), (&b"body"[..], 0));
    assert_eq!(delivery.call.options.expires_at, Some(7));
    eventually("the call is redelivered to both workers", async || {
        let again = tokio::time::timeout(Duration::from_millis(1), other.receive(4)).await;
        assert!(again.is_err(), "{again:?}");
        stan.deliveries_and_pending(CHANNEL).0 >= 5
    })
    .await;
    delivery.settle(&succeeded()).await.unwrap();
    wait_until_acknowledged(&stan, CHANNEL).await;
    // The calls of a worker that dies are executed by the other.
    one.publish(call, None).await.unwrap();
    let (delivery, owner, other) = tokio::select! {
        delivery = receive(&one) => (delivery, &one, &two),
        delivery = receive(&two) => (delivery, &two, &one),
    };
    drop(delivery);
    owner.close().await;
    let delivery = receive(other).await;
    delivery.settle(&succeeded()).await.unwrap();
    wait_until_acknowledged(&stan, CHANNEL).await;
}

#[tokio::test]
async fn an_unregistered_worker_still_answers_ownership_queries() {
    let nats = Nats::start();
    let stan = FakeStan::start(&nats).await;
    let one = open_registered_worker(&nats, &stan, "one").await;
    stan.store_message(CHANNEL, r#"{"Function":"echo"}"#);
    let delivery = receive(&one).await;
    let two = open_registered_worker(&nats, &stan, "two").await;
    stan.reject_client("faas-worker-one");
    eventually("the call is redelivered to the other worker", async || {
        let again = tokio::time::timeout(Duration::from_millis(1), two.receive(4)).await;
        assert!(again.is_err(), "{again:?}");
        stan.deliveries_and_pending(CHANNEL).0 >= 4
    })
    .await;
    assert!(!stan.client_ids().contains(&"faas-worker-one".to_owned()));
    delivery.settle(&succeeded()).await.unwrap();
    // The other worker learns that the call has finished when it is redelivered.
    wait_until_acknowledged(&stan, CHANNEL).await;
}

#[tokio::test]
async fn a_stopping_worker_receives_no_more_calls() {
    let nats = Nats::start();
    let stan = FakeStan::start(&nats).await;
    let one = open_registered_worker(&nats, &stan, "one").await;
    for _ in 0..3 {
        stan.store_message(CHANNEL, r#"{"Function":"echo"}"#);
    }
    let running = receive(&one).await;
    eventually("all calls are delivered to it", async || {
        stan.deliveries_and_pending(CHANNEL).0 >= 3
    })
    .await;
    let two = open_registered_worker(&nats, &stan, "two").await;
    one.stop_receiving();
    stan.store_message(CHANNEL, r#"{"Function":"echo"}"#);
    stan.store_message(CHANNEL, r#"{"Function":"echo"}"#);
    for _ in 0..4 {
        let delivery = receive(&two).await;
        delivery.settle(&succeeded()).await.unwrap();
    }
    // The stopping worker finishes its running call.
    running.settle(&succeeded()).await.unwrap();
    wait_until_acknowledged(&stan, CHANNEL).await;
}

#[tokio::test]
async fn a_stopped_worker_releases_its_calls() {
    let (nats, mut provider) = (Nats::start(), Provider::manual());
    let stan = FakeStan::start(&nats).await;
    let url = provider.url();
    let worker = || {
        let worker = on_stan(&nats, Gateway::worker()).var("functions_provider_url", &url);
        // If the call were not released, the test would time out.
        worker.var("ack_wait", "10m").var("shutdown_grace", "0s").start()
    };
    stan.store_message(CHANNEL, r#"{"Function":"echo"}"#);
    let first = worker().await;
    let _held = provider.next_call().await;
    assert!(first.terminate().await.success());
    let second = worker().await;
    let mut call = provider.next_call().await;
    second.kill().await;
    drop(call);
    // The killed worker has not unregistered: the server notices when a client with the same id connects.
    let _third = worker().await;
    call = provider.next_call().await;
    call.respond(200, "").await;
    wait_until_acknowledged(&stan, CHANNEL).await;
}

#[tokio::test]
async fn hanging_calls_do_not_block_others() {
    const HANG: usize = 60;
    let (nats, let_go) = (Nats::start(), tokio::sync::watch::Sender::new(false));
    let stan = FakeStan::start(&nats).await;
    let hanging = let_go.subscribe();
    let provider = Provider::builder().handler(move |mut call| {
        let mut let_go = hanging.clone();
        async move {
            call.read_body().await.ok()?;
            if call.head.target().contains("hangs") {
                let_go.wait_for(|go| *go).await.ok()?;
            }
            call.send_response(200, b"").await;
            Some(call.connection)
        }
    });
    let provider = provider.start();
    for _ in 0..HANG {
        stan.store_message(CHANNEL, r#"{"Function":"hangs"}"#);
    }
    // More delayed calls than a worker is sent at a time, on both channels.
    let far = r#"{"Function":"far","Header":{"X-Gateway-Not-Before":["9999999999999"]}}"#;
    for channel in [DELAYED, DELAYED_1H] {
        for _ in 0..400 {
            stan.store_message(channel, far);
        }
    }
    stan.store_message(CHANNEL, r#"{"Function":"quick"}"#);
    let worker = on_stan(&nats, Gateway::worker()).provider(&provider).var("max_inflight", "4");
    let worker = worker.start().await;
    worker
        .wait_for_metric("the quick call is executed", |metrics| {
            metrics.calls("quick.fn", "200") == 1
        })
        .await;
    assert_eq!(provider.call_count(), 3 + 1);
    let_go.send_replace(true);
    worker
        .wait_for_metric("all calls are executed", |metrics| {
            metrics.calls("hangs.fn", "200") == HANG as u64
        })
        .await;
    assert_eq!(provider.call_count(), HANG + 1);
}
