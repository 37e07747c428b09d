//! The queue on NATS Streaming: with the real gateway and worker, and a server of the protocol on a real nats-server.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::StreamExt as _;
use gateway::function::Function;
use gateway::queue::call::{Call, Options as CallOptions};
use gateway::queue::embedded::Limits;
use gateway::queue::status::{Settlement, State};
use gateway::queue::{Delivery, Queue, jetstream, stan};
use http::HeaderMap;
use prost::Message as _;
use serde_json::Value;

use crate::support::gateway::{Builder, Gateway};
use crate::support::metrics::Metrics;
use crate::support::nats::Nats;
use crate::support::provider::Provider;
use crate::support::queue::{answering, patient};
use crate::support::stan::proto::{ConnectRequest, ConnectResponse, PubMsg};
use crate::support::stan::{CHANNEL, CLUSTER, Stan};
use crate::support::wire::request;
use crate::support::{eventually, within};

const LATER: &str = "faas-request.later";
/// Where calls wait that are made within an hour.
const HOUR: &str = "faas-request.later.1h";
const FAR: &str = "faas-request.later.far";
const DEAD: &str = "faas-request.dead";

pub(crate) fn on(nats: &Nats, builder: Builder) -> Builder {
    builder
        .var("queue", "stan")
        .var("faas_nats_address", "127.0.0.1")
        .var("faas_nats_port", nats.port())
        .var("callback_allowlist", "loopback")
}

/// A gateway that takes calls in and makes them, once it does.
async fn gateway(nats: &Nats, provider: &Provider) -> Gateway {
    let gateway = on(nats, Gateway::builder()).provider(provider).start().await;
    eventually("both its clients are registered", async || {
        gateway.log().iter().filter(|line| line.contains("NATS Streaming is there")).count() == 2
    })
    .await;
    gateway
}

/// Whether `/_/ready` says that the queue is away.
async fn lacks_queue(gateway: &Gateway) -> bool {
    let ready = gateway.get("/_/ready").await;
    ready.status() == 200 && ready.text().contains(r#""degraded":["queue"]"#)
}

/// This machine, as it is part of the clients' ids.
fn host() -> String {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    name.chars().map(|c| if allowed(c) { c } else { '_' }).collect()
}

/// All that was stored in `channel` has been made.
pub(crate) async fn all_done(stan: &Stan, channel: &str) {
    eventually("all is acknowledged", async || {
        let (sent, pending) = stan.sent(channel);
        sent >= stan.messages(channel).len() && pending == 0
    })
    .await;
}

/// The messages that the recorded Go gateway published.
fn recorded() -> Vec<String> {
    let lines = include_str!("../stan/transcript.jsonl").lines();
    let rows = lines.map(|line| serde_json::from_str::<Value>(line).unwrap());
    let published = rows.filter(|row| row["line"].as_str().unwrap().starts_with("PUB _STAN.pub."));
    published
        .map(|row| STANDARD.decode(row["payload_base64"].as_str().unwrap()).unwrap())
        .map(|message| PubMsg::decode(message.as_slice()).unwrap().data)
        .map(|data| String::from_utf8(data.to_vec()).unwrap())
        .collect()
}

#[tokio::test]
async fn a_call_is_taken_in_as_the_go_gateway_does_and_made() {
    let (nats, mut provider) = (Nats::start(), patient().start());
    let stan = Stan::start(&nats).await;
    let gateway = gateway(&nats, &provider).await;
    let headers = ["X-Multi: a", "X-Multi: b", "X-Gateway-Max-Attempts: 9"];
    let answer = gateway.queue("echo/p/q?a=1&b=%20", &headers, "first job").await;
    assert_eq!(answer.status(), 202, "{answer}");
    let id = answer.header("x-call-id").unwrap();
    let mut call = provider.call().await;
    assert_eq!(call.head.target(), "/function/echo.fn/p/q?a=1&b=%20");
    assert_eq!(call.head.header("x-call-id"), Some(id));
    assert_eq!(call.head.header("x-gateway-max-attempts"), None);
    assert_eq!(call.body().await.unwrap(), b"first job");
    assert_eq!(stan.sent(CHANNEL), (1, 1));
    call.answer_with(200, b"").await;
    all_done(&stan, CHANNEL).await;
    let [message] = &stan.messages(CHANNEL)[..] else { panic!("one message") };
    for (member, expect) in [
        ("/Body", "Zmlyc3Qgam9i"),
        ("/Method", "POST"),
        ("/Path", "/p/q"),
        ("/QueryString", "a=1&b=%20"),
        ("/Function", "echo.fn"),
        ("/Host", "gateway.test"),
        ("/Header/X-Call-Id/0", id),
        ("/Header/X-Multi/1", "b"),
        ("/Header/Content-Length/0", "9"),
    ] {
        assert_eq!(message.pointer(member).and_then(|it| it.as_str()), Some(expect), "{member}");
    }
    assert_eq!(message.get("CallbackUrl"), None);
    assert!(gateway.terminate().await.success());
    assert_eq!(stan.clients(), [""; 0]);
}

#[tokio::test]
async fn what_a_go_gateway_queued_is_made_and_called_back() {
    let (nats, mut receiver) = (Nats::start(), Provider::by_hand());
    let stan = Stan::start(&nats).await;
    let address = receiver.address.to_string();
    for job in recorded() {
        stan.store_message(CHANNEL, job.replace("127.0.0.1:8081", &address));
    }
    let mut provider = Provider::builder().start();
    let worker = on(&nats, Gateway::worker()).provider(&provider).start().await;
    let mut targets = Vec::new();
    for _ in 0..3 {
        let mut call = provider.call().await;
        let body = call.body().await.unwrap();
        targets.push((call.head.target().to_owned(), body.clone()));
        call.answer_with(200, &body).await;
    }
    targets.sort();
    let expect = [
        ("/function/echo.fn/", &b""[..]),
        ("/function/echo.fn/p/q?a=1&b=%20", b"first job"),
        ("/function/echo.openfaas-fn", b"\x00\x01\xff\xfe"),
    ];
    assert_eq!(targets, expect.map(|(target, body)| (target.to_owned(), body.to_vec())));
    let mut called = receiver.call().await;
    assert_eq!(called.head.target(), "/function/callback?x=1");
    assert_eq!(called.head.header("authorization"), Some("Basic dXNlcjpwdw=="));
    assert_eq!(called.head.header("x-call-id"), Some("10a17e36-996d-4dcd-a42f-e6984d2f1364"));
    assert_eq!(called.head.header("x-function-status"), Some("200"));
    called.answer(200, "").await;
    all_done(&stan, CHANNEL).await;
    assert_eq!(stan.clients(), [format!("faas-worker-{}", host())]);
    assert!(worker.terminate().await.success());
}

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

/// Whether a line of the log with `text` names the call with `id`.
fn tells(process: &Gateway, text: &str, id: &str) -> bool {
    let lines = process.log().into_iter().filter(|line| line.contains(text));
    let mut fields =
        lines.map(|line| serde_json::from_str::<Value>(&line).unwrap()["fields"].take());
    fields.any(|fields| fields["call_id"] == id)
}

#[tokio::test]
async fn what_the_server_does_not_store_is_told_of_with_its_id() {
    let (nats, provider) = (Nats::start(), answering(&[500], "no"));
    let stan = Stan::start(&nats).await;
    let builder = on(&nats, Gateway::builder()).provider(&provider).var("log_level", "debug");
    let gateway = builder.var("with_worker", "false").start().await;
    gateway.logs("NATS Streaming is there").await;
    stan.refuse(CHANNEL, 1);
    let answer = gateway.queue("echo", &[], "").await;
    let id = answer.header("x-call-id").unwrap();
    assert_eq!(answer.status(), 503, "{answer}");
    eventually("both are told of", async || {
        tells(&gateway, "does not store a call", id) && tells(&gateway, "Request failed", id)
    })
    .await;
}

#[tokio::test]
async fn a_message_that_is_no_call_holds_up_nobody() {
    let (nats, provider) = (Nats::start(), answering(&[200], "done"));
    let stan = Stan::start(&nats).await;
    // More headers than there is room for.
    let names: Vec<String> = (0..30_000).map(|n| format!(r#""h{n}":["1"]"#)).collect();
    let crowd = format!(r#"{{"Function":"echo","Header":{{{}}}}}"#, names.join(","));
    let dots = r#"{"Function":"echo","Path":"/%2e%2e/x"}"#;
    let outside = r#"{"Function":"../system","Header":{"X-Call-Id":["outside"]}}"#;
    for message in [outside, "7", dots, &crowd] {
        stan.store_message(CHANNEL, message.to_owned());
    }
    let worker = on(&nats, Gateway::worker()).provider(&provider).start().await;
    stan.store_message(CHANNEL, r#"{"Function":"echo"}"#);
    eventually("the call is made", async || provider.calls() == 1).await;
    all_done(&stan, CHANNEL).await;
    let (mut dead, queued) = (stan.messages(DEAD), stan.messages(CHANNEL));
    // They are stored side by side.
    dead.sort_by_key(|message| queued.iter().position(|it| it == message));
    assert_eq!(dead, queued[..4]);
    eventually("it is told of", async || tells(&worker, "no call was put into", "outside")).await;
}

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

/// A worker of its own machine, in this process.
async fn member(nats: &Nats, host: &str) -> Queue {
    member_at(nats.url(), host).await
}

/// The same on the server with that URL.
pub(crate) async fn member_at(url: String, host: &str) -> Queue {
    let connection = jetstream::Options {
        servers: vec![url],
        auth: jetstream::Auth::Nobody,
        tls: false,
        root_ca: None,
        name: "gateway-test".to_owned(),
        queue: CHANNEL.to_owned(),
        replicas: 1,
        in_memory: false,
        lease: Duration::from_secs(1),
        limits: Limits { pending: 0, result_ttl: 0, key_ttl: 0 },
    };
    let options = stan::Options {
        cluster: CLUSTER.to_owned(),
        group: "faas".to_owned(),
        host: host.to_owned(),
        reconnect_delay: Duration::from_secs(2),
        default_namespace: "fn".to_owned(),
        publishes: true,
    };
    Queue::Stan(stan::Stan::open(connection, options).await.unwrap())
}

pub(crate) async fn take(queue: &Queue) -> Delivery {
    within("take", queue.take(4)).await.unwrap()
}

pub(crate) fn over() -> Settlement {
    Settlement::Finished {
        state: State::Succeeded,
        status: Some(200),
        reason: None,
        answer: None,
        made: true,
    }
}

#[tokio::test]
async fn workers_ask_each_other_before_they_make_a_call_again() {
    let nats = Nats::start();
    let stan = Stan::start(&nats).await;
    let (one, two) = (member(&nats, "one").await, member(&nats, "two").await);
    let both = async { tokio::join!(one.take(4), two.take(4)) };
    // The first take has a worker registered; nothing is there yet.
    assert!(tokio::time::timeout(Duration::from_millis(1), both).await.is_err());
    eventually("both work", async || {
        let workers = stan.clients().into_iter().filter(|id| id.starts_with("faas-worker"));
        workers.count() == 2
    })
    .await;
    let call = Call {
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
        let again = tokio::time::timeout(Duration::from_millis(1), other.take(4)).await;
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

/// A worker that has been registered, and has taken nothing yet.
pub(crate) async fn working(nats: &Nats, stan: &Stan, host: &str) -> Queue {
    let worker = member(nats, host).await;
    assert!(tokio::time::timeout(Duration::from_millis(1), worker.take(4)).await.is_err());
    let id = format!("faas-worker-{host}");
    eventually("it works", async || stan.clients().contains(&id)).await;
    worker
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
        let again = tokio::time::timeout(Duration::from_millis(1), two.take(4)).await;
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
    one.take_no_more();
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
    worker.logs("delivers nothing of a channel").await;
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
async fn calls_go_on_while_nats_is_away_and_all_heals() {
    let (mut nats, provider) = (Nats::away(), patient().answering(echo).start());
    let mut stan = Stan::away(&nats);
    let gateway = on(&nats, Gateway::builder()).provider(&provider).var("queue", "auto");
    let gateway = gateway.start().await;
    let away = async || {
        eventually("the queue is away", async || lacks_queue(&gateway).await).await;
        let answer = gateway.queue("echo", &[], "").await;
        assert_eq!((answer.status(), answer.header("retry-after")), (503, Some("1")), "{answer}");
        assert_eq!(gateway.get("/_/ready").await.status(), 200);
        assert_eq!(gateway.post("/function/echo", "x").await.text(), "x");
    };
    let mut made = 0;
    let mut back = async |stan: &Stan| {
        eventually("the queue is there", async || !lacks_queue(&gateway).await).await;
        gateway.queued("echo", &[], "").await;
        made += 1;
        eventually("it is made", async || stan.messages(CHANNEL).len() == made).await;
        all_done(stan, CHANNEL).await;
    };
    away().await;
    nats.restart();
    stan.restart().await;
    back(&stan).await;
    nats.kill();
    away().await;
    nats.restart();
    back(&stan).await;
    stan.kill().await;
    away().await;
    stan.restart().await;
    back(&stan).await;
    let reconnected = |it: &Metrics| it.get("gateway_nats_reconnect_total", &[]) >= Some(1.0);
    gateway.metrics_show("it has come back", reconnected).await;
}

#[tokio::test]
async fn nats_streaming_that_is_away_for_a_moment_is_waited_for() {
    let (nats, provider) = (Nats::start(), answering(&[200], "done"));
    let mut stan = Stan::away(&nats);
    let gateway = on(&nats, Gateway::builder()).provider(&provider).var("queue", "auto");
    let gateway = gateway.start().await;
    eventually("it has looked", async || {
        gateway.log().iter().any(|it| it.contains("NATS is there"))
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

async fn echo(mut call: crate::support::provider::Call) -> Option<crate::support::wire::Wire> {
    let body = call.body().await.ok()?;
    call.answer_with(200, &body).await;
    Some(call.wire)
}

#[tokio::test]
async fn a_server_that_has_forgotten_all_is_told_again() {
    let (nats, provider) = (Nats::start(), answering(&[200], "done"));
    let stan = Stan::start(&nats).await;
    let gateway = gateway(&nats, &provider).await;
    gateway.queued("echo", &[], "").await;
    eventually("it is made", async || provider.calls() == 1).await;
    all_done(&stan, CHANNEL).await;
    stan.forget();
    eventually("it takes in", async || gateway.queue("echo", &[], "").await.status() == 202).await;
    // The new message has the number of the old one.
    eventually("it is made", async || provider.calls() == 2).await;
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

#[tokio::test]
async fn a_server_that_answers_no_more_is_left_and_found_again() {
    let (nats, provider) = (Nats::start(), answering(&[200], "done"));
    let stan = Stan::start(&nats).await;
    let gateway = gateway(&nats, &provider).await;
    gateway.queued("echo", &[], "").await;
    stan.be_silent(true);
    eventually("the queue is away", async || lacks_queue(&gateway).await).await;
    assert_eq!(gateway.queue("echo", &[], "").await.status(), 503);
    stan.be_silent(false);
    eventually("the queue is there", async || !lacks_queue(&gateway).await).await;
    gateway.queued("echo", &[], "").await;
    all_done(&stan, CHANNEL).await;
    assert_eq!(stan.messages(CHANNEL).len(), 2);
}

#[tokio::test]
async fn an_id_that_is_taken_is_waited_for() {
    let (nats, provider) = (Nats::start(), answering(&[200], "done"));
    let _stan = Stan::start(&nats).await;
    let id = format!("faas-publisher-{}", host());
    let other = async_nats::connect(nats.url()).await.unwrap();
    let mut heartbeats = other.subscribe("other.heartbeats").await.unwrap();
    let register = ConnectRequest {
        client_id: id.clone(),
        heartbeat_inbox: "other.heartbeats".to_owned(),
        protocol: 1,
        connection: Bytes::from_static(b"other"),
        ping_interval: 5,
        ping_max_out: 3,
    };
    let subject = format!("_STAN.discover.{CLUSTER}");
    let registered = other.request(subject, register.encode_to_vec().into());
    let registered = within("registering", registered).await.unwrap();
    assert_eq!(ConnectResponse::decode(registered.payload).unwrap().error, "");
    let answering = {
        let other = other.clone();
        tokio::spawn(async move {
            while let Some(heartbeat) = heartbeats.next().await {
                other.publish(heartbeat.reply.unwrap(), Bytes::new()).await.unwrap();
            }
        })
    };
    let gateway = on(&nats, Gateway::builder()).provider(&provider).var("with_worker", "false");
    let gateway = gateway.start().await;
    gateway.logs("another client with this id").await;
    assert_eq!(gateway.queue("echo", &[], "").await.status(), 503);
    answering.abort();
    eventually("it is free", async || gateway.queue("echo", &[], "").await.status() == 202).await;
    let said = |line: &&String| line.contains("another client with this id");
    assert_eq!(gateway.log().iter().filter(said).count(), 1);
}

#[tokio::test]
async fn what_cannot_be_done_is_said() {
    let (nats, provider) = (Nats::start(), patient().start());
    let stan = Stan::start(&nats).await;
    let gateway = on(&nats, Gateway::builder()).provider(&provider).var("with_worker", "false");
    let gateway = gateway.start().await;
    gateway.logs("NATS Streaming is there").await;
    gateway.logs("states, results, lists, cancelling").await;
    let id = gateway.queued("echo", &[], "").await;
    for (method, target) in [
        ("GET", format!("/async-function/{id}")),
        ("GET", format!("/async-function/{id}/result")),
        ("DELETE", format!("/async-function/{id}")),
        ("GET", "/system/queues".to_owned()),
        ("GET", "/system/calls".to_owned()),
        ("POST", format!("/system/calls/{id}/retry")),
        ("DELETE", format!("/system/calls/{id}")),
        ("POST", "/system/queues/purge?state=dead".to_owned()),
    ] {
        let answer = gateway.ask(method, &target, &[]).await;
        assert_eq!(answer.status(), 501, "{method} {target}: {answer}");
        assert!(answer.text().contains("NATS Streaming"), "{answer}");
    }
    assert_eq!(gateway.queue("echo", &["Idempotency-Key: a"], "").await.status(), 501);
    assert_eq!(stan.messages(CHANNEL).len(), 1);
    // A body that the server would not take is refused before it comes.
    let large = gateway.queue("echo", &[], &"x".repeat(700_000)).await;
    assert_eq!(large.status(), 202, "{large}");
    let mut wire = gateway.connect().await;
    let head = request("POST", "/async-function/echo", &["Content-Length: 900000"], "");
    wire.send(head.replace("Content-Length: 0\r\n", "")).await;
    assert_eq!(wire.answer().await.status(), 413);
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

/// Takes calls as a worker of another machine does: it has those of `echo` made, puts others off, and buries them.
async fn second_worker(queue: Queue, made: Arc<Mutex<HashMap<String, usize>>>) {
    loop {
        let Ok(delivery) = queue.take(4).await else { continue };
        if !matches!(queue.begin(&delivery).await, Ok(true)) {
            continue;
        }
        let settlement = match (delivery.call.function.name.as_str(), delivery.attempts) {
            ("echo", _) => {
                *made.lock().unwrap().entry(delivery.call.id.clone()).or_default() += 1;
                over()
            }
            ("fails", 1..) => Settlement::Dead { status: Some(500), reason: None, answer: None },
            _ => Settlement::Retry { at: gateway::queue::now() + 100, status: None, reason: None },
        };
        while queue.settle(&delivery, &settlement).await.is_err() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

#[tokio::test]
async fn no_call_is_lost_whoever_dies() {
    const CALLS: usize = 300;
    let mut nats = Nats::start();
    let mut stan = Stan::start(&nats).await;
    let made: Arc<Mutex<HashMap<String, usize>>> = Arc::default();
    let (noting, failed) = (Arc::clone(&made), Arc::new(Mutex::new(HashSet::new())));
    let provider = patient().answering(move |mut call| {
        let (noting, failed) = (Arc::clone(&noting), Arc::clone(&failed));
        async move {
            call.body().await.ok()?;
            let id = call.head.header("x-call-id").unwrap().to_owned();
            let target = call.head.target().to_owned();
            let fails = target.contains("fails")
                || target.contains("flaky") && failed.lock().unwrap().insert(id.clone());
            if !fails {
                *noting.lock().unwrap().entry(id).or_default() += 1;
            }
            call.answer_with(if fails { 500 } else { 200 }, b"").await;
            Some(call.wire)
        }
    });
    let provider = provider.start();
    let gateway = on(&nats, Gateway::builder()).provider(&provider).var("with_worker", "false");
    let gateway = gateway.start().await;
    let worker = || on(&nats, Gateway::worker()).provider(&provider).var("ack_wait", "1s").start();
    let mut running = worker().await;
    let second = member(&nats, "second").await;
    let second = tokio::spawn(second_worker(second, Arc::clone(&made)));
    let taken = async |count: usize| {
        let mut ids = Vec::new();
        while ids.len() < count {
            let function = match ids.len() % 10 {
                0 => "fails",
                1..4 => "flaky",
                _ => "echo",
            };
            let answer = gateway.queue(function, &["X-Max-Attempts: 3"], "").await;
            if answer.status() == 202 {
                ids.push(answer.header("x-call-id").unwrap().to_owned());
            }
        }
        ids
    };
    let mut ids = within("calls are taken in", taken(CALLS / 3)).await;
    running.kill().await;
    running = worker().await;
    stan.kill().await;
    stan.restart().await;
    ids.extend(within("calls are taken in", taken(CALLS / 3)).await);
    nats.kill();
    nats.restart();
    ids.extend(within("calls are taken in", taken(CALLS / 3)).await);
    running.kill().await;
    let _running = on(&nats, Gateway::worker()).provider(&provider).start().await;
    eventually("every call is made or given up", async || {
        let dead: HashSet<String> = stan.messages(DEAD).iter().map(id_of).collect();
        let made = made.lock().unwrap();
        ids.iter().all(|id| made.contains_key(id) || dead.contains(id))
    })
    .await;
    all_done(&stan, CHANNEL).await;
    all_done(&stan, LATER).await;
    second.abort();
    let dead: HashSet<String> = stan.messages(DEAD).iter().map(id_of).collect();
    assert!(dead.len() >= CALLS / 10, "{}", dead.len());
    // What was in flight at one of two kills came twice, and what the dead server had no word of.
    let calls: usize = made.lock().unwrap().values().sum();
    assert!(calls <= CALLS + 4 * 50, "{calls}");
}

/// The id of the call that a message is.
fn id_of(message: &Value) -> String {
    message["Header"]["X-Call-Id"][0].as_str().unwrap().to_owned()
}
