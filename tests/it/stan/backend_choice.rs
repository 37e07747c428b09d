//! `queue: auto` chooses between NATS Streaming and JetStream.

use crate::support::eventually;
use crate::support::fake_stan::{CHANNEL, Stan};
use crate::support::gateway::{Builder, Gateway};
use crate::support::nats::Nats;
use crate::support::queue::answering;
use crate::support::stan_queue::{all_done, on};

#[tokio::test]
async fn nats_streaming_that_is_away_for_a_moment_is_waited_for() {
    let (nats, provider) = (Nats::start(), answering(&[200], "done"));
    let mut stan = Stan::away(&nats);
    let gateway = on(&nats, Gateway::builder()).provider(&provider).var("queue", "auto");
    let gateway = gateway.start().await;
    eventually("it has looked", async || {
        gateway.log().iter().any(|it| it.contains("Connected to the NATS server"))
    })
    .await;
    assert_eq!(gateway.queue("echo", &[], "").await.status(), 503);
    stan.restart().await;
    eventually("it takes in", async || gateway.queue("echo", &[], "").await.status() == 202).await;
    all_done(&stan, CHANNEL).await;
    assert_eq!(stan.messages(CHANNEL).len(), 1);
}

#[tokio::test]
async fn jetstream_is_taken_where_nats_streaming_may_not_be_asked_for() {
    let directory = tempfile::TempDir::new().unwrap();
    let path = directory.path().join("nats.conf");
    let user = r#"{ user: a, password: b, permissions: { publish: { deny: "_STAN.>" } } }"#;
    std::fs::write(&path, format!("authorization {{ users = [ {user} ] }}")).unwrap();
    let nats = Nats::start_with(&["-c", path.to_str().unwrap()]);
    let provider = answering(&[200], "done");
    let login = |builder: Builder| {
        let builder = on(&nats, builder).var("nats_user", "a").var("nats_password", "b");
        builder.provider(&provider).var("queue", "auto")
    };
    let first = login(Gateway::builder()).start().await;
    eventually("it takes in", async || first.queue("echo", &[], "").await.status() == 202).await;
    first.logs("whether there is NATS Streaming cannot be told").await;
    eventually("it is made", async || provider.calls() == 1).await;
    // Once it has been taken it is found at once, and NATS Streaming is noticed that comes later.
    drop(first);
    let second = login(Gateway::worker()).start().await;
    second.logs("kept by JetStream").await;
}

#[tokio::test]
async fn nats_streaming_that_comes_too_late_is_told_of() {
    let (nats, provider) = (Nats::start(), answering(&[200], "done"));
    let mut stan = Stan::away(&nats);
    let named = on(&nats, Gateway::builder()).provider(&provider).var("queue", "jetstream");
    let named = named.start().await;
    eventually("it takes in", async || named.queue("echo", &[], "").await.status() == 202).await;
    let auto = on(&nats, Gateway::worker()).provider(&provider).var("queue", "auto");
    let auto = auto.start().await;
    auto.logs("kept by JetStream").await;
    stan.restart().await;
    auto.logs("NATS Streaming answers as well").await;
}
