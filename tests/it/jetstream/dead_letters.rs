//! Dead letters: calls that have used up their attempts.

use bytes::Bytes;
use gateway::queue::call::QueuedCall;
use gateway::queue::jetstream::{Auth, Options};
use gateway::queue::status::CallState;
use gateway::queue::{ChangeOutcome, Filter};

use crate::support::eventually;
use crate::support::jetstream_queue::{Gateway, call, dead, now, options, retry, succeeded};
use crate::support::nats::Nats;

#[tokio::test]
async fn a_dead_call_is_kept_until_it_is_revived() {
    let nats = Nats::start();
    let it = Gateway::on(&nats).await;
    it.publish(call("a")).await;
    it.settle(it.take().await, dead()).await;
    let counts = it.queue.depths().await.unwrap();
    assert_eq!((counts[0].0.to_string(), counts[0].1.dead_letters), ("echo.fn".to_owned(), 1));
    let filter = Filter { dead_letter: Some(true), ..Filter::default() };
    assert_eq!(it.queue.list(&filter, None, 10).await.unwrap().calls[0].id, "a");
    assert_eq!(it.queue.redrive("a").await, Ok(ChangeOutcome::Applied));
    let delivery = it.take().await;
    assert_eq!((delivery.call.id.as_str(), delivery.attempts), ("a", 0));
    assert_eq!(it.queue.redrive("a").await, Ok(ChangeOutcome::WrongState(CallState::Running)));
    it.settle(delivery, dead()).await;
    assert_eq!(it.queue.purge(&filter).await, Ok(1));
    assert_eq!(it.queue.status("a").await, Ok(None));
    assert_eq!(it.queue.depths().await, Ok(vec![]));
    assert_eq!(it.queue.redrive("a").await, Ok(ChangeOutcome::NotFound));
}

#[tokio::test]
async fn a_dead_call_that_succeeds_in_the_end_is_dead_no_more() {
    let directory = tempfile::TempDir::new().unwrap();
    let path = directory.path().join("nats.conf");
    // One who tries a dead call again, and comes no further than that.
    let deny = r#"{ publish: { deny: "$JS.API.STREAM.MSG.DELETE.gateway-faas-request-dead" } }"#;
    let halting = format!("{{ user: halting, password: p, permissions: {deny} }}");
    let users = format!("users = [ {halting}, {{ user: other, password: p }} ]");
    std::fs::write(&path, format!("authorization {{ {users} }}")).unwrap();
    let nats = Nats::start_with(&["-c", path.to_str().unwrap()]);
    let open = async |user: &str| {
        let auth = Auth::Password { user: user.to_owned(), password: "p".to_owned() };
        Gateway::open(Options { auth, ..options(&nats) }).await
    };
    let (halting, it) = (open("halting").await, open("other").await);
    for it in [&halting, &it] {
        eventually("the server answers", async || it.queue.status("x").await.is_ok()).await;
    }
    it.publish(call("a")).await;
    it.settle(it.take().await, dead()).await;
    assert_eq!(halting.queue.redrive("a").await, Ok(ChangeOutcome::Applied));
    // It is not made twice by one who saw it dead.
    assert_eq!(it.queue.redrive("a").await, Ok(ChangeOutcome::WrongState(CallState::Queued)));
    it.settle(it.take().await, retry(now())).await;
    it.settle(it.take().await, succeeded()).await;
    it.is_empty().await;
    let dead = it.queue.depths().await.unwrap().iter().map(|(_, it)| it.dead_letter).sum::<u64>();
    assert_eq!((it.state("a").await, dead), (Some(CallState::Succeeded), 0));
}

#[tokio::test]
async fn a_dead_call_is_dropped_or_tried_again_but_not_half_of_each() {
    let nats = Nats::start();
    let (one, two) = (Gateway::on(&nats).await, Gateway::on(&nats).await);
    let body = Bytes::from(vec![7; 1_100_000]);
    for round in 0..8 {
        let id = round.to_string();
        one.publish(QueuedCall { body: body.clone(), ..call(&id) }).await;
        one.settle(one.take().await, dead()).await;
        let (dropped, revived) = tokio::join!(two.queue.cancel(&id), one.queue.redrive(&id));
        let (dropped, revived) = (dropped.unwrap(), revived.unwrap());
        if revived == ChangeOutcome::Applied && dropped != ChangeOutcome::Applied {
            let delivery = one.take().await;
            assert!(delivery.call.body == body);
            one.settle(delivery, succeeded()).await;
        }
        let expect = if dropped == ChangeOutcome::Applied {
            CallState::Cancelled
        } else {
            CallState::Succeeded
        };
        assert_eq!(one.state(&id).await, Some(expect), "{round}: {dropped:?} {revived:?}");
        one.is_empty().await;
    }
}
