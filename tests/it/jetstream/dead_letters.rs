//! Dead letters: calls that have used up their attempts.

use bytes::Bytes;
use gateway_queue::call::QueuedCall;
use gateway_queue::jetstream::{Auth, Options};
use gateway_queue::status::CallState;
use gateway_queue::{ChangeOutcome, Filter, JobStore as _};

use crate::support::eventually;
use crate::support::jetstream_queue::{
    TestQueue, call, dead_lettered, options, retry, succeeded, unix_millis,
};
use crate::support::nats::Nats;

#[tokio::test]
async fn a_dead_letter_is_kept_until_it_is_redriven() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    queue.publish(call("a")).await;
    queue.settle(queue.receive().await, dead_lettered()).await;
    let counts = queue.inner.depths().await.unwrap();
    assert_eq!((counts[0].0.to_string(), counts[0].1.dead_letters), ("echo.fn".to_owned(), 1));
    let filter = Filter { dead_letter: Some(true), ..Filter::default() };
    assert_eq!(queue.inner.list(&filter, None, 10).await.unwrap().calls[0].id, "a");
    assert_eq!(queue.inner.redrive("a").await, Ok(ChangeOutcome::Applied));
    let delivery = queue.receive().await;
    assert_eq!((delivery.call.id.as_str(), delivery.attempts), ("a", 0));
    assert_eq!(queue.inner.redrive("a").await, Ok(ChangeOutcome::WrongState(CallState::Running)));
    queue.settle(delivery, dead_lettered()).await;
    assert_eq!(queue.inner.purge(&filter).await, Ok(1));
    assert_eq!(queue.inner.status("a").await, Ok(None));
    assert_eq!(queue.inner.depths().await, Ok(vec![]));
    assert_eq!(queue.inner.redrive("a").await, Ok(ChangeOutcome::NotFound));
}

#[tokio::test]
async fn a_redriven_call_that_succeeds_is_no_dead_letter() {
    let directory = tempfile::TempDir::new().unwrap();
    let path = directory.path().join("nats.conf");
    // A client that may redrive a dead letter but not delete it.
    let deny = r#"{ publish: { deny: "$JS.API.STREAM.MSG.DELETE.gateway-faas-request-dead" } }"#;
    let restricted = format!("{{ user: restricted, password: p, permissions: {deny} }}");
    let users = format!("users = [ {restricted}, {{ user: other, password: p }} ]");
    std::fs::write(&path, format!("authorization {{ {users} }}")).unwrap();
    let nats = Nats::start_with(&["-c", path.to_str().unwrap()]);
    let open = async |user: &str| {
        let auth = Auth::Password { user: user.to_owned(), password: "p".to_owned() };
        TestQueue::open(Options { auth, ..options(&nats) }).await
    };
    let (restricted, queue) = (open("restricted").await, open("other").await);
    for queue in [&restricted, &queue] {
        eventually("the server responds", async || queue.inner.status("x").await.is_ok()).await;
    }
    queue.publish(call("a")).await;
    queue.settle(queue.receive().await, dead_lettered()).await;
    assert_eq!(restricted.inner.redrive("a").await, Ok(ChangeOutcome::Applied));
    // A second client that still sees the dead letter does not redrive it again.
    assert_eq!(queue.inner.redrive("a").await, Ok(ChangeOutcome::WrongState(CallState::Queued)));
    queue.settle(queue.receive().await, retry(unix_millis())).await;
    queue.settle(queue.receive().await, succeeded()).await;
    queue.wait_until_empty().await;
    let dead = queue
        .inner
        .depths()
        .await
        .unwrap()
        .iter()
        .map(|(_, counts)| counts.dead_letters)
        .sum::<u64>();
    assert_eq!((queue.state("a").await, dead), (Some(CallState::Succeeded), 0));
}

#[tokio::test]
async fn a_dead_letter_is_either_discarded_or_redriven() {
    let nats = Nats::start();
    let (one, two) = (TestQueue::connected(&nats).await, TestQueue::connected(&nats).await);
    let body = Bytes::from(vec![7; 1_100_000]);
    for round in 0..8 {
        let id = round.to_string();
        one.publish(QueuedCall { body: body.clone(), ..call(&id) }).await;
        one.settle(one.receive().await, dead_lettered()).await;
        let (dropped, revived) = tokio::join!(two.inner.cancel(&id), one.inner.redrive(&id));
        let (dropped, revived) = (dropped.unwrap(), revived.unwrap());
        if revived == ChangeOutcome::Applied && dropped != ChangeOutcome::Applied {
            let delivery = one.receive().await;
            assert!(delivery.call.body == body);
            one.settle(delivery, succeeded()).await;
        }
        let expect = if dropped == ChangeOutcome::Applied {
            CallState::Cancelled
        } else {
            CallState::Succeeded
        };
        assert_eq!(one.state(&id).await, Some(expect), "{round}: {dropped:?} {revived:?}");
        one.wait_until_empty().await;
    }
}
