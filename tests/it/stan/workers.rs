//! Several workers of one queue: which of them executes a call, and what happens when one of them stops.

use std::time::Duration;

use bytes::Bytes;
use gateway::function::Function;
use gateway::queue::call::{CallOptions, QueuedCall};
use http::HeaderMap;

use crate::support::eventually;
use crate::support::fake_stan::{CHANNEL, Stan};
use crate::support::gateway::Gateway;
use crate::support::nats::Nats;
use crate::support::provider::Provider;
use crate::support::stan_queue::{HOUR, LATER, all_done, member, on, over, take, working};

#[tokio::test]
async fn a_call_that_runs_for_longer_than_ack_wait_is_made_once() {
    let (nats, mut provider) = (Nats::start(), Provider::by_hand());
    let stan = Stan::start(&nats).await;
    let worker = on(&nats, Gateway::worker()).provider(&provider).var("ack_wait", "1s");
    let _worker = worker.start().await;
    stan.store_message(CHANNEL, r#"{"Function":"echo"}"#);
    let mut call = provider.call().await;
    eventually("it is sent again", async || stan.sent(CHANNEL).0 >= 4).await;
    assert_eq!(provider.calls(), 1);
    call.answer(200, "").await;
    eventually("it is done", async || stan.sent(CHANNEL).1 == 0).await;
    assert_eq!(provider.calls(), 1);
}

#[tokio::test]
async fn workers_ask_each_other_before_they_make_a_call_again() {
    let nats = Nats::start();
    let stan = Stan::start(&nats).await;
    let (one, two) = (member(&nats, "one").await, member(&nats, "two").await);
    let both = async { tokio::join!(one.receive(4), two.receive(4)) };
    // The first take has a worker registered; nothing is there yet.
    assert!(tokio::time::timeout(Duration::from_millis(1), both).await.is_err());
    eventually("both work", async || {
        let workers = stan.clients().into_iter().filter(|id| id.starts_with("faas-worker"));
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
    eventually("it is taken in", async || one.publish(call.clone()).await.is_ok()).await;
    let (delivery, other) = tokio::select! {
        delivery = take(&one) => (delivery, &two),
        delivery = take(&two) => (delivery, &one),
    };
    assert_eq!((delivery.call.body.as_ref(), delivery.attempts), (&b"body"[..], 0));
    assert_eq!(delivery.call.options.expires_at, Some(7));
    eventually("it is sent to both", async || {
        let again = tokio::time::timeout(Duration::from_millis(1), other.receive(4)).await;
        assert!(again.is_err(), "{again:?}");
        stan.sent(CHANNEL).0 >= 5
    })
    .await;
    let owner = if std::ptr::eq(other, &two) { &one } else { &two };
    owner.settle(&delivery, &over()).await.unwrap();
    all_done(&stan, CHANNEL).await;
    // One that dies has what it took made by the other.
    one.publish(call).await.unwrap();
    let (delivery, owner, other) = tokio::select! {
        delivery = take(&one) => (delivery, &one, &two),
        delivery = take(&two) => (delivery, &two, &one),
    };
    drop(delivery);
    owner.stop().await;
    let delivery = take(other).await;
    other.settle(&delivery, &over()).await.unwrap();
    all_done(&stan, CHANNEL).await;
}

#[tokio::test]
async fn a_worker_that_the_server_does_not_know_answers_the_others() {
    let nats = Nats::start();
    let stan = Stan::start(&nats).await;
    let one = working(&nats, &stan, "one").await;
    stan.store_message(CHANNEL, r#"{"Function":"echo"}"#);
    let delivery = take(&one).await;
    let two = working(&nats, &stan, "two").await;
    stan.shut_out("faas-worker-one");
    eventually("it is sent to the other", async || {
        let again = tokio::time::timeout(Duration::from_millis(1), two.receive(4)).await;
        assert!(again.is_err(), "{again:?}");
        stan.sent(CHANNEL).0 >= 4
    })
    .await;
    assert!(!stan.clients().contains(&"faas-worker-one".to_owned()));
    one.settle(&delivery, &over()).await.unwrap();
    // The other hears that it is done when it comes again.
    all_done(&stan, CHANNEL).await;
}

#[tokio::test]
async fn a_worker_that_stops_takes_nothing_more() {
    let nats = Nats::start();
    let stan = Stan::start(&nats).await;
    let one = working(&nats, &stan, "one").await;
    for _ in 0..3 {
        stan.store_message(CHANNEL, r#"{"Function":"echo"}"#);
    }
    let running = take(&one).await;
    eventually("all are with it", async || stan.sent(CHANNEL).0 >= 3).await;
    let two = working(&nats, &stan, "two").await;
    one.stop_receiving();
    stan.store_message(CHANNEL, r#"{"Function":"echo"}"#);
    stan.store_message(CHANNEL, r#"{"Function":"echo"}"#);
    for _ in 0..4 {
        let delivery = take(&two).await;
        two.settle(&delivery, &over()).await.unwrap();
    }
    // It ends what it has begun.
    one.settle(&running, &over()).await.unwrap();
    all_done(&stan, CHANNEL).await;
}

#[tokio::test]
async fn a_worker_that_stops_gives_back_what_it_has() {
    let (nats, mut provider) = (Nats::start(), Provider::by_hand());
    let stan = Stan::start(&nats).await;
    let url = provider.url();
    let worker = || {
        let worker = on(&nats, Gateway::worker()).var("functions_provider_url", &url);
        // So long a wait that the test would fail.
        worker.var("ack_wait", "10m").var("shutdown_grace", "0s").start()
    };
    stan.store_message(CHANNEL, r#"{"Function":"echo"}"#);
    let first = worker().await;
    let _held = provider.call().await;
    assert!(first.terminate().await.success());
    let second = worker().await;
    let mut call = provider.call().await;
    second.kill().await;
    drop(call);
    // Nobody has signed off: the server finds out when somebody comes who has the same id.
    let _third = worker().await;
    call = provider.call().await;
    call.answer(200, "").await;
    all_done(&stan, CHANNEL).await;
}

#[tokio::test]
async fn calls_that_hang_hold_up_no_others() {
    const HANG: usize = 60;
    let (nats, let_go) = (Nats::start(), tokio::sync::watch::Sender::new(false));
    let stan = Stan::start(&nats).await;
    let hanging = let_go.subscribe();
    let provider = Provider::builder().answering(move |mut call| {
        let mut let_go = hanging.clone();
        async move {
            call.body().await.ok()?;
            if call.head.target().contains("hangs") {
                let_go.wait_for(|go| *go).await.ok()?;
            }
            call.answer_with(200, b"").await;
            Some(call.wire)
        }
    });
    let provider = provider.start();
    for _ in 0..HANG {
        stan.store_message(CHANNEL, r#"{"Function":"hangs"}"#);
    }
    // More of those that are made later than a worker is sent at a time, wherever they are.
    let far = r#"{"Function":"far","Header":{"X-Gateway-Not-Before":["9999999999999"]}}"#;
    for channel in [LATER, HOUR] {
        for _ in 0..400 {
            stan.store_message(channel, far);
        }
    }
    stan.store_message(CHANNEL, r#"{"Function":"quick"}"#);
    let worker = on(&nats, Gateway::worker()).provider(&provider).var("max_inflight", "4");
    let worker = worker.start().await;
    worker.metrics_show("the quick one is made", |it| it.calls("quick.fn", "200") == 1).await;
    assert_eq!(provider.calls(), 3 + 1);
    let_go.send_replace(true);
    worker.metrics_show("all are made", |it| it.calls("hangs.fn", "200") == HANG as u64).await;
    assert_eq!(provider.calls(), HANG + 1);
}
