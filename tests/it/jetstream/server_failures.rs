//! A NATS server that is unavailable, is killed, or has lost its streams.

use std::collections::BTreeMap;
use std::time::Instant;

use gateway_queue::embedded::Limits;
use gateway_queue::jetstream::Options;
use gateway_queue::status::CallState;
use gateway_queue::{Error, JobQueue as _, JobStore as _};

use crate::support::eventually;
use crate::support::gateway::Gateway;
use crate::support::jetstream_queue::{
    CONCURRENCY, LIMITS, REFUSAL_TIMEOUT, TestQueue, call, call_to, dead_lettered, options, retry,
    stream, succeeded, unix_millis,
};
use crate::support::nats::Nats;
use crate::support::provider::Provider;

#[tokio::test]
async fn unsettled_calls_survive_a_restart() {
    let mut nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    for id in ["done", "retried", "dead", "running", "waiting"] {
        queue.publish(call(id)).await;
    }
    queue.settle(queue.receive().await, succeeded()).await;
    queue.settle(queue.receive().await, retry(unix_millis())).await;
    queue.settle(queue.receive().await, dead_lettered()).await;
    let running = queue.receive().await;
    queue.crash(vec![running]).await;
    nats.kill();
    nats.restart();
    let queue = TestQueue::connected(&nats).await;
    assert_eq!(queue.state("done").await, Some(CallState::Succeeded));
    assert_eq!(queue.state("dead").await, Some(CallState::Failed));
    assert_eq!(queue.state("retried").await, Some(CallState::Retrying));
    let mut again = BTreeMap::new();
    for _ in 0..3 {
        let delivery = queue.receive().await;
        again.insert(delivery.call.id.clone(), delivery.attempts);
        queue.settle(delivery, succeeded()).await;
    }
    let expect = [("retried", 1), ("running", 0), ("waiting", 0)];
    assert_eq!(again, expect.map(|(id, attempts)| (id.to_owned(), attempts)).into());
    queue.assert_nothing_redelivered().await;
}

#[tokio::test]
async fn no_call_is_lost_when_the_server_is_killed_during_execution() {
    const CALLS: usize = 40;
    let mut nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    for number in 0..CALLS {
        queue.publish(call(&number.to_string())).await;
    }
    let work = async {
        let mut executed = BTreeMap::new();
        while executed.len() < CALLS {
            let delivery = queue.receive().await;
            *executed.entry(delivery.call.id.clone()).or_insert(0) += 1;
            // A call that cannot be settled is redelivered.
            let _ = delivery.settle(&succeeded()).await;
        }
        executed
    };
    let trouble = async {
        eventually("some calls are executed", async || {
            queue.inner.status("5").await.is_ok_and(|s| s.is_some_and(|s| s.state.is_final()))
        })
        .await;
        nats.kill();
        let start = Instant::now();
        assert_eq!(queue.inner.publish(call("away"), None).await, Err(Error::Unreachable));
        assert!(start.elapsed() < REFUSAL_TIMEOUT, "{:?}", start.elapsed());
        assert_eq!(queue.inner.status("5").await, Err(Error::Unreachable));
        assert!(!queue.inner.is_reachable());
        nats.restart();
    };
    let (executed, ()) = tokio::join!(work, trouble);
    assert!(executed.values().sum::<usize>() <= CALLS + 2, "{executed:?}");
    for number in 0..CALLS {
        assert_eq!(queue.state(&number.to_string()).await, Some(CallState::Succeeded), "{number}");
    }
    assert!(queue.inner.is_reachable());
    queue.assert_nothing_redelivered().await;
}

#[tokio::test]
async fn a_server_unavailable_at_startup_is_used_later() {
    let mut nats = Nats::not_started();
    let queue = TestQueue::open(options(&nats)).await;
    for _ in 0..2 {
        let start = Instant::now();
        assert_eq!(queue.inner.publish(call("a"), None).await, Err(Error::Unreachable));
        assert!(start.elapsed() < REFUSAL_TIMEOUT, "{:?}", start.elapsed());
    }
    assert!(!queue.inner.is_reachable());
    let taker = async { queue.receive().await };
    let later = async {
        nats.restart();
        eventually("the call is published", async || {
            queue.inner.publish(call("a"), None).await.is_ok()
        })
        .await;
    };
    let (delivery, ()) = tokio::join!(taker, later);
    assert_eq!(delivery.call.id, "a");
    assert!(queue.inner.is_reachable());
}

#[tokio::test]
async fn limits_of_an_existing_stream_are_not_lowered() {
    let nats = Nats::start();
    drop(TestQueue::connected(&nats).await);
    let limits = Limits { max_pending: 7, ..LIMITS };
    let queue = TestQueue::open(Options { limits, ..options(&nats) }).await;
    eventually("the server responds", async || queue.inner.status("x").await.is_ok()).await;
    let calls = stream(&nats, "gateway-faas-request-calls").await;
    assert_eq!(calls.cached_info().config.max_messages, 2 * 50 + 1024);
    // The gateway logs the difference, and the queue works.
    let gateway = Gateway::builder()
        .provider(&Provider::replying("done"))
        .var("queue", "jetstream")
        .var("faas_nats_address", "127.0.0.1")
        .var("faas_nats_port", nats.port())
        .var("max_pending_calls", "7")
        .start()
        .await;
    eventually("the call is enqueued", async || {
        gateway.send_async("echo", &[], "").await.status() == 202
    })
    .await;
    gateway.wait_for_log("A stream of the queue differs from the settings").await;
    let log = gateway.log().concat();
    assert!(log.contains("gateway-faas-request-calls") && log.contains("max_msgs"), "{log}");
}

#[tokio::test]
async fn deleted_consumers_and_streams_are_created_again() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    queue.publish(call("a")).await;
    let client = async_nats::jetstream::new(async_nats::connect(nats.url()).await.unwrap());
    client.delete_consumer_from_stream("fn,echo", "gateway-faas-request-calls").await.unwrap();
    // For a client that does not know the function yet, and for one that does.
    let other = TestQueue::connected(&nats).await;
    assert_eq!(other.receive().await.call.id, "a");
    client.delete_stream("gateway-faas-request-calls").await.unwrap();
    client.delete_stream("gateway-faas-request-claims").await.unwrap();
    eventually("the call is published", async || {
        queue.inner.publish(call("b"), None).await.is_ok()
    })
    .await;
    assert_eq!(queue.receive().await.call.id, "b");
}

#[tokio::test]
async fn accepted_calls_are_executed_while_the_server_is_killed_repeatedly() {
    const CALLS: usize = 60;
    let mut nats = Nats::start();
    let (queue, worker) = (TestQueue::connected(&nats).await, TestQueue::connected(&nats).await);
    let publish = async {
        for number in 0..CALLS {
            let call = call_to(["a", "b"][number % 2], &number.to_string());
            eventually("the call is accepted", async || {
                queue.inner.publish(call.clone(), None).await.is_ok()
            })
            .await;
        }
    };
    let executed = std::sync::Mutex::new(BTreeMap::new());
    let work = async {
        loop {
            // The duration depends on the server, which may be unavailable several times meanwhile.
            let delivery = worker.inner.receive(CONCURRENCY).await.unwrap();
            *executed.lock().unwrap().entry(delivery.call.id.clone()).or_insert(0) += 1;
            let first = delivery.attempts == 0;
            let settlement = if first { retry(unix_millis() + 50) } else { succeeded() };
            // A failed settlement may have been applied; the state tells.
            let _ = delivery.settle(&settlement).await;
        }
    };
    let trouble = async {
        for at in [10, 25, 45] {
            let id = at.to_string();
            eventually("some are accepted", async || {
                queue.inner.status(&id).await.is_ok_and(|status| status.is_some())
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
            eventually("the call has succeeded", async || {
                let status = queue.inner.status(&id).await;
                status.is_ok_and(|status| {
                    status.is_some_and(|status| status.state == CallState::Succeeded)
                })
            })
            .await;
        }
    };
    tokio::select! {
        () = work => {}
        () = all => {}
    }
    let executed = executed.into_inner().unwrap();
    // Each call is executed twice, except for calls in flight when the server was killed.
    assert!(
        executed.len() == CALLS && executed.values().sum::<usize>() < CALLS * 3,
        "{executed:?}"
    );
}
