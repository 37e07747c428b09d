//! A NATS server that is unavailable, is killed, or has lost its streams.

use std::collections::BTreeMap;
use std::time::Instant;

use gateway::queue::Error;
use gateway::queue::embedded::Limits;
use gateway::queue::jetstream::Options;
use gateway::queue::status::CallState;

use crate::support::eventually;
use crate::support::gateway::Gateway as Process;
use crate::support::jetstream_queue::{
    Gateway, LIMITS, PLACES, REFUSED_WITHIN, call, call_of, dead, now, options, retry, stream,
    succeeded,
};
use crate::support::nats::Nats;
use crate::support::provider::Provider;

#[tokio::test]
async fn what_was_not_settled_is_there_after_a_restart() {
    let mut nats = Nats::start();
    let it = Gateway::on(&nats).await;
    for id in ["done", "retried", "dead", "running", "waiting"] {
        it.publish(call(id)).await;
    }
    it.settle(it.take().await, succeeded()).await;
    it.settle(it.take().await, retry(now())).await;
    it.settle(it.take().await, dead()).await;
    let running = it.take().await;
    it.dies(vec![running]).await;
    nats.kill();
    nats.restart();
    let it = Gateway::on(&nats).await;
    assert_eq!(it.state("done").await, Some(CallState::Succeeded));
    assert_eq!(it.state("dead").await, Some(CallState::Failed));
    assert_eq!(it.state("retried").await, Some(CallState::Retrying));
    let mut again = BTreeMap::new();
    for _ in 0..3 {
        let delivery = it.take().await;
        again.insert(delivery.call.id.clone(), delivery.attempts);
        it.settle(delivery, succeeded()).await;
    }
    let expect = [("retried", 1), ("running", 0), ("waiting", 0)];
    assert_eq!(again, expect.map(|(id, attempts)| (id.to_owned(), attempts)).into());
    it.lets_go().await;
}

#[tokio::test]
async fn a_server_that_is_killed_in_mid_work_loses_nothing() {
    const CALLS: usize = 40;
    let mut nats = Nats::start();
    let it = Gateway::on(&nats).await;
    for number in 0..CALLS {
        it.publish(call(&number.to_string())).await;
    }
    let work = async {
        let mut made = BTreeMap::new();
        while made.len() < CALLS {
            let delivery = it.take().await;
            *made.entry(delivery.call.id.clone()).or_insert(0) += 1;
            // One that cannot be settled comes again.
            let _ = it.queue.settle(&delivery, &succeeded()).await;
        }
        made
    };
    let trouble = async {
        eventually("some are made", async || {
            it.queue.status("5").await.is_ok_and(|s| s.is_some_and(|s| s.state.is_final()))
        })
        .await;
        nats.kill();
        let start = Instant::now();
        assert_eq!(it.queue.publish(call("away")).await, Err(Error::Unreachable));
        assert!(start.elapsed() < REFUSED_WITHIN, "{:?}", start.elapsed());
        assert_eq!(it.queue.status("5").await, Err(Error::Unreachable));
        assert!(!it.queue.is_reachable());
        nats.restart();
    };
    let (made, ()) = tokio::join!(work, trouble);
    assert!(made.values().sum::<usize>() <= CALLS + 2, "{made:?}");
    for number in 0..CALLS {
        assert_eq!(it.state(&number.to_string()).await, Some(CallState::Succeeded), "{number}");
    }
    assert!(it.queue.is_reachable());
    it.lets_go().await;
}

#[tokio::test]
async fn a_server_that_is_away_at_start_is_found_later() {
    let mut nats = Nats::away();
    let it = Gateway::open(options(&nats)).await;
    for _ in 0..2 {
        let start = Instant::now();
        assert_eq!(it.queue.publish(call("a")).await, Err(Error::Unreachable));
        assert!(start.elapsed() < REFUSED_WITHIN, "{:?}", start.elapsed());
    }
    assert!(!it.queue.is_reachable());
    let taker = async { it.take().await };
    let later = async {
        nats.restart();
        eventually("it is published", async || it.queue.publish(call("a")).await.is_ok()).await;
    };
    let (delivery, ()) = tokio::join!(taker, later);
    assert_eq!(delivery.call.id, "a");
    assert!(it.queue.is_reachable());
}

#[tokio::test]
async fn a_stream_that_is_there_is_left_as_it_is() {
    let nats = Nats::start();
    drop(Gateway::on(&nats).await);
    let limits = Limits { max_pending: 7, ..LIMITS };
    let it = Gateway::open(Options { limits, ..options(&nats) }).await;
    eventually("the server answers", async || it.queue.status("x").await.is_ok()).await;
    let calls = stream(&nats, "gateway-faas-request-calls").await;
    assert_eq!(calls.cached_info().config.max_messages, 2 * 50 + 1024);
    // It is said, and the queue works.
    let gateway = Process::builder()
        .provider(&Provider::saying("done"))
        .var("queue", "jetstream")
        .var("faas_nats_address", "127.0.0.1")
        .var("faas_nats_port", nats.port())
        .var("max_pending_calls", "7")
        .start()
        .await;
    eventually("it is queued", async || gateway.queue("echo", &[], "").await.status() == 202).await;
    gateway.logs("A stream of the queue is not set up as it should be").await;
    let said = gateway.log().concat();
    assert!(said.contains("gateway-faas-request-calls") && said.contains("max_msgs"), "{said}");
}

#[tokio::test]
async fn what_an_operator_removes_is_made_again() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    it.publish(call("a")).await;
    let client = async_nats::jetstream::new(async_nats::connect(nats.url()).await.unwrap());
    client.delete_consumer_from_stream("fn,echo", "gateway-faas-request-calls").await.unwrap();
    // For one who has not known the function before, and for one who has.
    let other = Gateway::on(&nats).await;
    assert_eq!(other.take().await.call.id, "a");
    client.delete_stream("gateway-faas-request-calls").await.unwrap();
    client.delete_stream("gateway-faas-request-claims").await.unwrap();
    eventually("it is published", async || it.queue.publish(call("b")).await.is_ok()).await;
    assert_eq!(it.take().await.call.id, "b");
}

#[tokio::test]
async fn what_was_accepted_is_made_however_often_the_server_is_killed() {
    const CALLS: usize = 60;
    let mut nats = Nats::start();
    let (it, worker) = (Gateway::on(&nats).await, Gateway::on(&nats).await);
    let publish = async {
        for number in 0..CALLS {
            let call = call_of(["a", "b"][number % 2], &number.to_string());
            eventually("it is accepted", async || it.queue.publish(call.clone()).await.is_ok())
                .await;
        }
    };
    let made = std::sync::Mutex::new(BTreeMap::new());
    let work = async {
        loop {
            // How long it takes is up to the server: it may be away several times meanwhile.
            let delivery = worker.queue.receive(PLACES).await.unwrap();
            *made.lock().unwrap().entry(delivery.call.id.clone()).or_insert(0) += 1;
            let first = delivery.attempts == 0;
            let settlement = if first { retry(now() + 50) } else { succeeded() };
            // One that fails may have been done all the same: the state says so.
            let _ = worker.queue.settle(&delivery, &settlement).await;
        }
    };
    let trouble = async {
        for at in [10, 25, 45] {
            let id = at.to_string();
            eventually("some are accepted", async || {
                it.queue.status(&id).await.is_ok_and(|status| status.is_some())
            })
            .await;
            nats.kill();
            nats.restart();
        }
    };
    let all = async {
        tokio::join!(publish, trouble);
        for number in 0..CALLS {
            let id = number.to_string();
            eventually("it has succeeded", async || {
                let status = it.queue.status(&id).await;
                status.is_ok_and(|it| it.is_some_and(|it| it.state == CallState::Succeeded))
            })
            .await;
        }
    };
    tokio::select! {
        () = work => {}
        () = all => {}
    }
    let made = made.into_inner().unwrap();
    // Each is made twice, those apart that were under way when the server was killed.
    assert!(made.len() == CALLS && made.values().sum::<usize>() < CALLS * 3, "{made:?}");
}
