//! Calls that fail, calls with a delay, and dead letters.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::support::eventually;
use crate::support::fake_stan::{CHANNEL, Stan};
use crate::support::gateway::Gateway;
use crate::support::nats::Nats;
use crate::support::provider::Provider;
use crate::support::queue::answering;
use crate::support::stan_queue::{DEAD, FAR, HOUR, LATER, all_done, gateway, id_of, on, tells};

#[tokio::test]
async fn a_call_that_fails_is_made_again_and_called_back_once() {
    let (nats, provider) = (Nats::start(), answering(&[500, 503, 200], "done"));
    let stan = Stan::start(&nats).await;
    let mut receiver = Provider::by_hand();
    let gateway = gateway(&nats, &provider).await;
    let callback = format!("X-Callback-Url: {}/function/hook", receiver.url());
    gateway.queued("echo", &[&callback], "").await;
    let mut called = receiver.call().await;
    assert_eq!(called.head.header("x-retry"), Some("3"));
    assert_eq!(called.head.header("x-function-status"), Some("200"));
    called.answer(200, "").await;
    all_done(&stan, CHANNEL).await;
    all_done(&stan, LATER).await;
    assert_eq!((provider.calls(), receiver.calls()), (3, 1));
    let attempts: Vec<_> = stan
        .messages(LATER)
        .iter()
        .map(|message| message["Header"]["X-Gateway-Attempts"][0].clone())
        .collect();
    assert_eq!(attempts, ["1", "2"]);
    assert!(stan.messages(DEAD).is_empty());
}

#[tokio::test]
async fn a_call_that_fails_for_good_is_kept_where_nobody_takes_it() {
    let (nats, provider) = (Nats::start(), answering(&[500], "no"));
    let stan = Stan::start(&nats).await;
    let gateway = gateway(&nats, &provider).await;
    let id = gateway.queued("echo", &["X-Max-Attempts: 2"], "body").await;
    gateway.logs("failed for good").await;
    all_done(&stan, LATER).await;
    assert!(gateway.log().iter().any(|line| line.contains("ERROR") && line.contains(&id)));
    let [dead] = &stan.messages(DEAD)[..] else { panic!("one dead call") };
    assert_eq!(dead["Header"]["X-Gateway-Reason"][0], "status 500");
    assert_eq!((&dead["Header"]["X-Call-Id"][0], &dead["Body"]), (&id.into(), &"Ym9keQ==".into()));
    assert_eq!(provider.calls(), 2);
}

#[tokio::test]
async fn a_dead_call_that_the_server_refuses_is_offered_again() {
    let (nats, provider) = (Nats::start(), answering(&[500], "no"));
    let stan = Stan::start(&nats).await;
    let gateway = gateway(&nats, &provider).await;
    stan.refuse(DEAD, 2);
    let id = gateway.queued("echo", &["X-Max-Attempts: 1"], "body").await;
    eventually("it is kept", async || stan.messages(DEAD).len() == 1).await;
    all_done(&stan, CHANNEL).await;
    assert_eq!(stan.messages(DEAD)[0]["Header"]["X-Call-Id"][0], id.as_str());
    assert_eq!((provider.calls(), stan.refusals(DEAD)), (1, 0));
}

#[tokio::test]
async fn a_slow_store_does_not_multiply_a_retry() {
    let (nats, provider) = (Nats::start(), answering(&[500, 200], "x"));
    let stan = Stan::start(&nats).await;
    stan.tell_later(LATER, Duration::from_secs(7));
    let _worker = on(&nats, Gateway::worker()).provider(&provider).start().await;
    stan.store_message(CHANNEL, r#"{"Function":"echo"}"#);
    all_done(&stan, CHANNEL).await;
    eventually("it is made again", async || provider.calls() == 2).await;
    eventually("all is done", async || stan.sent(LATER) == (1, 0)).await;
    assert_eq!((stan.messages(LATER).len(), provider.calls()), (1, 2));
}

#[tokio::test]
async fn calls_are_made_and_made_again_without_the_channels_for_later() {
    let (nats, provider) = (Nats::start(), answering(&[500, 503, 200], "x"));
    let stan = Stan::start(&nats).await;
    stan.deliver_none_of(LATER);
    stan.refuse(LATER, usize::MAX);
    let worker = on(&nats, Gateway::worker()).provider(&provider).start().await;
    stan.store_message(CHANNEL, r#"{"Function":"echo"}"#);
    all_done(&stan, CHANNEL).await;
    worker.logs("rejects the subscription to a channel").await;
    assert_eq!(provider.calls(), 3);
    assert_eq!((stan.messages(LATER), stan.messages(DEAD)), (vec![], vec![]));
}

#[tokio::test]
async fn large_calls_that_are_made_later_hold_up_no_others() {
    const CALLS: usize = 60;
    const LARGE: usize = 700_000;
    let nats = Nats::start();
    let stan = Stan::start(&nats).await;
    let body = STANDARD.encode(vec![b'x'; LARGE]);
    let far = format!(
        r#"{{"Function":"far","Body":"{body}","Header":{{"X-Gateway-Not-Before":["9999999999999"],"X-Call-Id":["far"]}}}}"#
    );
    for _ in 0..CALLS {
        stan.store_message(FAR, far.clone());
    }
    stan.refuse(FAR, 1);
    let provider = answering(&[200], "x");
    let worker = on(&nats, Gateway::worker()).provider(&provider).var("log_level", "debug");
    let worker = worker.start().await;
    eventually("they are delivered", async || stan.sent(FAR).0 >= CALLS).await;
    stan.store_message(CHANNEL, r#"{"Function":"echo"}"#);
    all_done(&stan, CHANNEL).await;
    eventually("what stays is told of", async || tells(&worker, "stays where it is", "far")).await;
}

#[tokio::test]
async fn calls_with_a_time_wait_for_it_and_make_room_for_others() {
    let (nats, provider) = (Nats::start(), answering(&[200], "done"));
    let stan = Stan::start(&nats).await;
    let gateway = gateway(&nats, &provider).await;
    gateway.queued("echo", &["X-Delay-Seconds: 1000"], "").await;
    let far = stan.messages(HOUR)[0].clone();
    // More than a worker is sent at a time, each a call of its own.
    let id = id_of(&far);
    for number in 0..400 {
        stan.store_message(HOUR, far.to_string().replace(&id, &number.to_string()));
    }
    // One of these, whose time has come, is behind them.
    let due = far
        .to_string()
        .replace(&id, "due")
        .replace(far["Header"]["X-Gateway-Not-Before"][0].as_str().unwrap(), "1");
    stan.store_message(HOUR, due);
    gateway.queued("echo", &["X-Delay-Seconds: 1"], "").await;
    eventually("both are made", async || provider.calls() == 2).await;
    assert!(stan.messages(CHANNEL).is_empty());
    // What is to be made soon is not held up by what is not.
    assert_eq!(stan.messages(LATER).len(), 1);
    // Those that made room are at the end of the channel.
    assert!(stan.messages(HOUR).len() > 402);
    assert_eq!(provider.calls(), 2);
}
