//! Calls that fail, calls with a delay, and dead letters.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::support::eventually;
use crate::support::fake_stan::{CHANNEL, FakeStan};
use crate::support::gateway::Gateway;
use crate::support::nats::Nats;
use crate::support::provider::Provider;
use crate::support::queue::replying_with;
use crate::support::stan_queue::{
    DEAD_LETTERS, DELAYED, DELAYED_1H, DELAYED_FAR, call_id, logs_call, on_stan, start_gateway,
    wait_until_acknowledged,
};

#[tokio::test]
async fn a_failed_call_is_retried_with_one_callback() {
    let (nats, provider) = (Nats::start(), replying_with(&[500, 503, 200], "done"));
    let stan = FakeStan::start(&nats).await;
    let mut receiver = Provider::manual();
    let gateway = start_gateway(&nats, &provider).await;
    let callback = format!("X-Callback-Url: {}/function/hook", receiver.url());
    gateway.enqueue("echo", &[&callback], "").await;
    let mut called = receiver.next_call().await;
    assert_eq!(called.head.header("x-retry"), Some("3"));
    assert_eq!(called.head.header("x-function-status"), Some("200"));
    called.respond(200, "").await;
    wait_until_acknowledged(&stan, CHANNEL).await;
    wait_until_acknowledged(&stan, DELAYED).await;
    assert_eq!((provider.call_count(), receiver.call_count()), (3, 1));
    let attempts: Vec<_> = stan
        .messages(DELAYED)
        .iter()
        .map(|message| message["Header"]["X-Gateway-Attempts"][0].clone())
        .collect();
    assert_eq!(attempts, ["1", "2"]);
    assert!(stan.messages(DEAD_LETTERS).is_empty());
}

#[tokio::test]
async fn an_exhausted_call_is_stored_on_the_dead_letter_channel() {
    let (nats, provider) = (Nats::start(), replying_with(&[500], "no"));
    let stan = FakeStan::start(&nats).await;
    let gateway = start_gateway(&nats, &provider).await;
    let id = gateway.enqueue("echo", &["X-Max-Attempts: 2"], "body").await;
    gateway.wait_for_log("failed for good").await;
    wait_until_acknowledged(&stan, DELAYED).await;
    assert!(gateway.log().iter().any(|line| line.contains("ERROR") && line.contains(&id)));
    let [dead] = &stan.messages(DEAD_LETTERS)[..] else { panic!("one dead call") };
    assert_eq!(dead["Header"]["X-Gateway-Reason"][0], "status 500");
    assert_eq!((&dead["Header"]["X-Call-Id"][0], &dead["Body"]), (&id.into(), &"Ym9keQ==".into()));
    assert_eq!(provider.call_count(), 2);
}

#[tokio::test]
async fn a_refused_dead_letter_is_published_again() {
    let (nats, provider) = (Nats::start(), replying_with(&[500], "no"));
    let stan = FakeStan::start(&nats).await;
    let gateway = start_gateway(&nats, &provider).await;
    stan.refuse(DEAD_LETTERS, 2);
    let id = gateway.enqueue("echo", &["X-Max-Attempts: 1"], "body").await;
    eventually("the dead letter is stored", async || stan.messages(DEAD_LETTERS).len() == 1).await;
    wait_until_acknowledged(&stan, CHANNEL).await;
    assert_eq!(stan.messages(DEAD_LETTERS)[0]["Header"]["X-Call-Id"][0], id.as_str());
    assert_eq!((provider.call_count(), stan.remaining_refusals(DEAD_LETTERS)), (1, 0));
}

#[tokio::test]
async fn a_slow_store_does_not_duplicate_a_retry() {
    let (nats, provider) = (Nats::start(), replying_with(&[500, 200], "x"));
    let stan = FakeStan::start(&nats).await;
    stan.delay_publish_acks(DELAYED, Duration::from_secs(7));
    let _worker = on_stan(&nats, Gateway::worker()).provider(&provider).start().await;
    stan.store_message(CHANNEL, r#"{"Function":"echo"}"#);
    wait_until_acknowledged(&stan, CHANNEL).await;
    eventually("the call is retried", async || provider.call_count() == 2).await;
    eventually("all messages are acknowledged", async || {
        stan.deliveries_and_pending(DELAYED) == (1, 0)
    })
    .await;
    assert_eq!((stan.messages(DELAYED).len(), provider.call_count()), (1, 2));
}

#[tokio::test]
async fn retries_work_without_the_delay_channels() {
    let (nats, provider) = (Nats::start(), replying_with(&[500, 503, 200], "x"));
    let stan = FakeStan::start(&nats).await;
    stan.withhold_channels(DELAYED);
    stan.refuse(DELAYED, usize::MAX);
    let worker = on_stan(&nats, Gateway::worker()).provider(&provider).start().await;
    stan.store_message(CHANNEL, r#"{"Function":"echo"}"#);
    wait_until_acknowledged(&stan, CHANNEL).await;
    worker.wait_for_log("rejects the subscription to a channel").await;
    assert_eq!(provider.call_count(), 3);
    assert_eq!((stan.messages(DELAYED), stan.messages(DEAD_LETTERS)), (vec![], vec![]));
}

#[tokio::test]
async fn large_delayed_calls_do_not_block_others() {
    const CALLS: usize = 60;
    const LARGE: usize = 700_000;
    let nats = Nats::start();
    let stan = FakeStan::start(&nats).await;
    let body = STANDARD.encode(vec![b'x'; LARGE]);
    let far = format!(
        r#"{{"Function":"far","Body":"{body}","Header":{{"X-Gateway-Not-Before":["9999999999999"],"X-Call-Id":["far"]}}}}"#
    );
    for _ in 0..CALLS {
        stan.store_message(DELAYED_FAR, far.clone());
    }
    stan.refuse(DELAYED_FAR, 1);
    let provider = replying_with(&[200], "x");
    let worker = on_stan(&nats, Gateway::worker()).provider(&provider).var("log_level", "debug");
    let worker = worker.start().await;
    eventually("the calls are delivered", async || {
        stan.deliveries_and_pending(DELAYED_FAR).0 >= CALLS
    })
    .await;
    stan.store_message(CHANNEL, r#"{"Function":"echo"}"#);
    wait_until_acknowledged(&stan, CHANNEL).await;
    eventually("the parked call is logged", async || {
        logs_call(&worker, "could not be parked", "far")
    })
    .await;
}

#[tokio::test]
async fn delayed_calls_do_not_block_due_ones() {
    let (nats, provider) = (Nats::start(), replying_with(&[200], "done"));
    let stan = FakeStan::start(&nats).await;
    let gateway = start_gateway(&nats, &provider).await;
    gateway.enqueue("echo", &["X-Delay-Seconds: 1000"], "").await;
    let far = stan.messages(DELAYED_1H)[0].clone();
    // More than a worker is sent at a time, each a separate call.
    let id = call_id(&far);
    for number in 0..400 {
        stan.store_message(DELAYED_1H, far.to_string().replace(&id, &number.to_string()));
    }
    // A call that is due waits behind them.
    let due = far
        .to_string()
        .replace(&id, "due")
        .replace(far["Header"]["X-Gateway-Not-Before"][0].as_str().unwrap(), "1");
    stan.store_message(DELAYED_1H, due);
    gateway.enqueue("echo", &["X-Delay-Seconds: 1"], "").await;
    eventually("both calls are executed", async || provider.call_count() == 2).await;
    assert!(stan.messages(CHANNEL).is_empty());
    // Calls due soon are not blocked by later ones.
    assert_eq!(stan.messages(DELAYED).len(), 1);
    // The calls that were moved are at the end of the channel.
    assert!(stan.messages(DELAYED_1H).len() > 402);
    assert_eq!(provider.call_count(), 2);
}
