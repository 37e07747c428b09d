//! Gateways, workers and queues on NATS Streaming.

use std::time::Duration;

use gateway::queue::embedded::Limits;
use gateway::queue::status::{CallState, Settlement};
use gateway::queue::{Delivery, Queue, jetstream, stan};
use serde_json::Value;

use crate::support::fake_stan::{CHANNEL, CLUSTER, Stan};
use crate::support::gateway::{Builder, Gateway};
use crate::support::nats::Nats;
use crate::support::provider::Provider;
use crate::support::{eventually, within};

pub(crate) const LATER: &str = "faas-request.later";
/// Where calls wait that are made within an hour.
pub(crate) const HOUR: &str = "faas-request.later.1h";
pub(crate) const FAR: &str = "faas-request.later.far";
pub(crate) const DEAD: &str = "faas-request.dead";

pub(crate) fn on(nats: &Nats, builder: Builder) -> Builder {
    builder
        .var("queue", "stan")
        .var("faas_nats_address", "127.0.0.1")
        .var("faas_nats_port", nats.port())
        .var("callback_allowlist", "loopback")
}

/// A gateway that takes calls in and makes them, once it does.
pub(crate) async fn gateway(nats: &Nats, provider: &Provider) -> Gateway {
    let gateway = on(nats, Gateway::builder()).provider(provider).start().await;
    eventually("both its clients are registered", async || {
        gateway.log().iter().filter(|line| line.contains("Registered with NATS Streaming")).count()
            == 2
    })
    .await;
    gateway
}

/// Whether `/_/ready` says that the queue is away.
pub(crate) async fn lacks_queue(gateway: &Gateway) -> bool {
    let ready = gateway.get("/_/ready").await;
    ready.status() == 200 && ready.text().contains(r#""degraded":["queue"]"#)
}

/// This machine, as it is part of the clients' ids.
pub(crate) fn host() -> String {
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

/// Whether a line of the log with `text` names the call with `id`.
pub(crate) fn tells(process: &Gateway, text: &str, id: &str) -> bool {
    let lines = process.log().into_iter().filter(|line| line.contains(text));
    let mut fields =
        lines.map(|line| serde_json::from_str::<Value>(&line).unwrap()["fields"].take());
    fields.any(|fields| fields["call_id"] == id)
}

/// A worker of its own machine, in this process.
pub(crate) async fn member(nats: &Nats, host: &str) -> Queue {
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
        limits: Limits { max_pending: 0, result_ttl: 0, idempotency_ttl: 0 },
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
    within("take", queue.receive(4)).await.unwrap()
}

pub(crate) fn over() -> Settlement {
    Settlement::Finished {
        state: CallState::Succeeded,
        status: Some(200),
        reason: None,
        response: None,
        executed: true,
    }
}

/// A worker that has been registered, and has taken nothing yet.
pub(crate) async fn working(nats: &Nats, stan: &Stan, host: &str) -> Queue {
    let worker = member(nats, host).await;
    assert!(tokio::time::timeout(Duration::from_millis(1), worker.receive(4)).await.is_err());
    let id = format!("faas-worker-{host}");
    eventually("it works", async || stan.clients().contains(&id)).await;
    worker
}

/// The id of the call that a message is.
pub(crate) fn id_of(message: &Value) -> String {
    message["Header"]["X-Call-Id"][0].as_str().unwrap().to_owned()
}
