//! A NATS Streaming server that is unavailable, silent, or has lost its state.

use bytes::Bytes;
use futures_util::StreamExt as _;
use prost::Message as _;

use crate::support::fake_stan::proto::{ConnectRequest, ConnectResponse};
use crate::support::fake_stan::{CHANNEL, CLUSTER, Stan};
use crate::support::gateway::Gateway;
use crate::support::metrics::Metrics;
use crate::support::nats::Nats;
use crate::support::queue::{answering, patient};
use crate::support::stan_queue::{all_done, gateway, host, lacks_queue, on, tells};
use crate::support::{eventually, within};

#[tokio::test]
async fn what_the_server_does_not_store_is_told_of_with_its_id() {
    let (nats, provider) = (Nats::start(), answering(&[500], "no"));
    let stan = Stan::start(&nats).await;
    let builder = on(&nats, Gateway::builder()).provider(&provider).var("log_level", "debug");
    let gateway = builder.var("with_worker", "false").start().await;
    gateway.logs("Registered with NATS Streaming").await;
    stan.refuse(CHANNEL, 1);
    let answer = gateway.queue("echo", &[], "").await;
    let id = answer.header("x-call-id").unwrap();
    assert_eq!(answer.status(), 503, "{answer}");
    eventually("both are told of", async || {
        tells(&gateway, "rejected a call", id) && tells(&gateway, "Request failed", id)
    })
    .await;
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
