//! A NATS Streaming server that is unavailable, silent, or has lost its state.

use bytes::Bytes;
use futures_util::StreamExt as _;
use prost::Message as _;

use crate::support::fake_stan::proto::{ConnectRequest, ConnectResponse};
use crate::support::fake_stan::{CHANNEL, CLUSTER, FakeStan};
use crate::support::gateway::Gateway;
use crate::support::metrics::Metrics;
use crate::support::nats::Nats;
use crate::support::queue::{fast_retry, replying_with};
use crate::support::stan_queue::{
    host_id, is_queue_degraded, logs_call, on_stan, start_gateway, wait_until_acknowledged,
};
use crate::support::{eventually, within};

#[tokio::test]
async fn a_call_that_the_server_refuses_is_logged_with_its_id() {
    let (nats, provider) = (Nats::start(), replying_with(&[500], "no"));
    let stan = FakeStan::start(&nats).await;
    let builder = on_stan(&nats, Gateway::builder()).provider(&provider).var("log_level", "debug");
    let gateway = builder.var("with_worker", "false").start().await;
    gateway.wait_for_log("Registered with NATS Streaming").await;
    stan.refuse(CHANNEL, 1);
    let response = gateway.send_async("echo", &[], "").await;
    let id = response.header("x-call-id").unwrap();
    assert_eq!(response.status(), 503, "{response}");
    eventually("both are logged", async || {
        logs_call(&gateway, "rejected a call", id) && logs_call(&gateway, "Request failed", id)
    })
    .await;
}

#[tokio::test]
async fn synchronous_calls_continue_while_nats_is_unavailable() {
    let (mut nats, provider) = (Nats::not_started(), fast_retry().handler(echo).start());
    let mut stan = FakeStan::not_started(&nats);
    let gateway = on_stan(&nats, Gateway::builder()).provider(&provider).var("queue", "auto");
    let gateway = gateway.start().await;
    let assert_unavailable = async || {
        eventually("the queue is unavailable", async || is_queue_degraded(&gateway).await).await;
        let response = gateway.send_async("echo", &[], "").await;
        assert_eq!(
            (response.status(), response.header("retry-after")),
            (503, Some("1")),
            "{response}"
        );
        assert_eq!(gateway.get("/_/ready").await.status(), 200);
        assert_eq!(gateway.post("/function/echo", "x").await.text(), "x");
    };
    let mut executed = 0;
    let mut assert_available = async |stan: &FakeStan| {
        eventually("the queue is available", async || !is_queue_degraded(&gateway).await).await;
        gateway.enqueue("echo", &[], "").await;
        executed += 1;
        eventually("the call is executed", async || stan.messages(CHANNEL).len() == executed).await;
        wait_until_acknowledged(stan, CHANNEL).await;
    };
    assert_unavailable().await;
    nats.restart();
    stan.restart().await;
    assert_available(&stan).await;
    nats.kill();
    assert_unavailable().await;
    nats.restart();
    assert_available(&stan).await;
    stan.kill().await;
    assert_unavailable().await;
    stan.restart().await;
    assert_available(&stan).await;
    let reconnected =
        |metrics: &Metrics| metrics.get("gateway_nats_reconnect_total", &[]) >= Some(1.0);
    gateway.wait_for_metric("the connection is counted as reestablished", reconnected).await;
}

async fn echo(
    mut call: crate::support::provider::Invocation,
) -> Option<crate::support::connection::Connection> {
    let body = call.read_body().await.ok()?;
    call.send_response(200, &body).await;
    Some(call.connection)
}

#[tokio::test]
async fn a_server_that_lost_its_state_is_used_again() {
    let (nats, provider) = (Nats::start(), replying_with(&[200], "done"));
    let stan = FakeStan::start(&nats).await;
    let gateway = start_gateway(&nats, &provider).await;
    gateway.enqueue("echo", &[], "").await;
    eventually("the call is executed", async || provider.call_count() == 1).await;
    wait_until_acknowledged(&stan, CHANNEL).await;
    stan.lose_state();
    eventually("calls are accepted", async || {
        gateway.send_async("echo", &[], "").await.status() == 202
    })
    .await;
    // The new message has the sequence number of the old one.
    eventually("the call is executed", async || provider.call_count() == 2).await;
    wait_until_acknowledged(&stan, CHANNEL).await;
}

#[tokio::test]
async fn a_silent_server_is_reported_and_used_again_later() {
    let (nats, provider) = (Nats::start(), replying_with(&[200], "done"));
    let stan = FakeStan::start(&nats).await;
    let gateway = start_gateway(&nats, &provider).await;
    gateway.enqueue("echo", &[], "").await;
    stan.set_silent(true);
    eventually("the queue is unavailable", async || is_queue_degraded(&gateway).await).await;
    assert_eq!(gateway.send_async("echo", &[], "").await.status(), 503);
    stan.set_silent(false);
    eventually("the queue is available", async || !is_queue_degraded(&gateway).await).await;
    gateway.enqueue("echo", &[], "").await;
    wait_until_acknowledged(&stan, CHANNEL).await;
    assert_eq!(stan.messages(CHANNEL).len(), 2);
}

#[tokio::test]
async fn a_client_id_in_use_is_awaited() {
    let (nats, provider) = (Nats::start(), replying_with(&[200], "done"));
    let _stan = FakeStan::start(&nats).await;
    let id = format!("faas-publisher-{}", host_id());
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
    let gateway =
        on_stan(&nats, Gateway::builder()).provider(&provider).var("with_worker", "false");
    let gateway = gateway.start().await;
    gateway.wait_for_log("another client with this id").await;
    assert_eq!(gateway.send_async("echo", &[], "").await.status(), 503);
    answering.abort();
    eventually("the client id is free", async || {
        gateway.send_async("echo", &[], "").await.status() == 202
    })
    .await;
    let mentions_id = |line: &&String| line.contains("another client with this id");
    assert_eq!(gateway.log().iter().filter(mentions_id).count(), 1);
}
