//! `queue: auto` chooses between NATS Streaming and JetStream.

use crate::support::eventually;
use crate::support::fake_stan::{CHANNEL, FakeStan};
use crate::support::gateway::{Builder, Gateway};
use crate::support::nats::Nats;
use crate::support::queue::replying_with;
use crate::support::stan_queue::{on_stan, wait_until_acknowledged};

#[tokio::test]
async fn nats_streaming_that_is_briefly_unavailable_is_awaited() {
    let (nats, provider) = (Nats::start(), replying_with(&[200], "done"));
    let mut stan = FakeStan::not_started(&nats);
    let gateway = on_stan(&nats, Gateway::builder()).provider(&provider).var("queue", "auto");
    let gateway = gateway.start().await;
    eventually("NATS Streaming was probed", async || {
        gateway.log().iter().any(|line| line.contains("Connected to the NATS server"))
    })
    .await;
    assert_eq!(gateway.send_async("echo", &[], "").await.status(), 503);
    stan.restart().await;
    eventually("calls are accepted", async || {
        gateway.send_async("echo", &[], "").await.status() == 202
    })
    .await;
    wait_until_acknowledged(&stan, CHANNEL).await;
    assert_eq!(stan.messages(CHANNEL).len(), 1);
}

#[tokio::test]
async fn jetstream_is_chosen_if_nats_streaming_may_not_be_queried() {
    let directory = tempfile::TempDir::new().unwrap();
    let path = directory.path().join("nats.conf");
    let user = r#"{ user: a, password: b, permissions: { publish: { deny: "_STAN.>" } } }"#;
    std::fs::write(&path, format!("authorization {{ users = [ {user} ] }}")).unwrap();
    let nats = Nats::start_with(&["-c", path.to_str().unwrap()]);
    let provider = replying_with(&[200], "done");
    let login = |builder: Builder| {
        let builder = on_stan(&nats, builder).var("nats_user", "a").var("nats_password", "b");
        builder.provider(&provider).var("queue", "auto")
    };
    let first = login(Gateway::builder()).start().await;
    eventually("calls are accepted", async || {
        first.send_async("echo", &[], "").await.status() == 202
    })
    .await;
    first.wait_for_log("NATS Streaming could not be ruled out").await;
    eventually("the call is executed", async || provider.call_count() == 1).await;
    // JetStream was chosen before, so it is found immediately; NATS Streaming that appears later is noticed.
    drop(first);
    let second = login(Gateway::worker()).start().await;
    second.wait_for_log("JetStream stores the queued calls").await;
}

#[tokio::test]
async fn nats_streaming_found_after_the_choice_is_logged() {
    let (nats, provider) = (Nats::start(), replying_with(&[200], "done"));
    let mut stan = FakeStan::not_started(&nats);
    let named = on_stan(&nats, Gateway::builder()).provider(&provider).var("queue", "jetstream");
    let named = named.start().await;
    eventually("calls are accepted", async || {
        named.send_async("echo", &[], "").await.status() == 202
    })
    .await;
    let auto = on_stan(&nats, Gateway::worker()).provider(&provider).var("queue", "auto");
    let auto = auto.start().await;
    auto.wait_for_log("JetStream stores the queued calls").await;
    stan.restart().await;
    auto.wait_for_log("NATS Streaming answers as well").await;
}
