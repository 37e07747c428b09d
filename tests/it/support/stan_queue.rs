//! Gateways, workers and queues on NATS Streaming.

use std::time::Duration;

use gateway_queue::embedded::Limits;
use gateway_queue::stan::{self, Stan};
use gateway_queue::status::{CallState, Settlement};
use gateway_queue::{Delivery, JobQueue as _, jetstream};
use serde_json::Value;

use crate::support::fake_stan::{CHANNEL, CLUSTER, FakeStan};
use crate::support::gateway::{Builder, Gateway};
use crate::support::nats::Nats;
use crate::support::provider::Provider;
use crate::support::{eventually, within};

pub(crate) const DELAYED: &str = "faas-request.later";
/// Channel of calls that are due within an hour.
pub(crate) const DELAYED_1H: &str = "faas-request.later.1h";
pub(crate) const DELAYED_FAR: &str = "faas-request.later.far";
pub(crate) const DEAD_LETTERS: &str = "faas-request.dead";

pub(crate) fn on_stan(nats: &Nats, builder: Builder) -> Builder {
    builder
        .var("queue", "stan")
        .var("faas_nats_address", "127.0.0.1")
        .var("faas_nats_port", nats.port())
        .var("callback_allowlist", "loopback")
}

/// Starts a gateway that enqueues and executes calls, and waits until it is connected.
pub(crate) async fn start_gateway(nats: &Nats, provider: &Provider) -> Gateway {
    let gateway = on_stan(nats, Gateway::builder()).provider(provider).start().await;
    eventually("both its clients are registered", async || {
        gateway.log().iter().filter(|line| line.contains("Registered with NATS Streaming")).count()
            == 2
    })
    .await;
    gateway
}

/// Returns whether `/_/ready` reports that the queue is unavailable.
pub(crate) async fn is_queue_degraded(gateway: &Gateway) -> bool {
    let ready = gateway.get("/_/ready").await;
    ready.status() == 200 && ready.text().contains(r#""degraded":["queue"]"#)
}

/// Name of this machine, as part of client ids.
pub(crate) fn host_id() -> String {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    name.chars().map(|c| if allowed(c) { c } else { '_' }).collect()
}

/// Waits until all messages of `channel` are acknowledged.
pub(crate) async fn wait_until_acknowledged(stan: &FakeStan, channel: &str) {
    eventually("all messages are acknowledged", async || {
        let (sent, pending) = stan.deliveries_and_pending(channel);
        sent >= stan.messages(channel).len() && pending == 0
    })
    .await;
}

/// Returns whether a log line with `text` names the call `id`.
pub(crate) fn logs_call(process: &Gateway, text: &str, id: &str) -> bool {
    let lines = process.log().into_iter().filter(|line| line.contains(text));
    let mut fields =
        lines.map(|line| serde_json::from_str::<Value>(&line).unwrap()["fields"].take());
    fields.any(|fields| fields["call_id"] == id)
}

/// A worker in this process that acts as the machine `host`.
pub(crate) async fn open_worker(nats: &Nats, host: &str) -> Stan {
    open_worker_at(nats.url(), host).await
}

/// The same on the server at `url`.
pub(crate) async fn open_worker_at(url: String, host: &str) -> Stan {
    let connection = jetstream::Options {
        servers: vec![url],
        auth: jetstream::Auth::Anonymous,
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
    Stan::open(connection, options).await.unwrap()
}

pub(crate) async fn receive(queue: &Stan) -> Delivery {
    within("receive a call", queue.receive(4)).await.unwrap()
}

pub(crate) fn succeeded() -> Settlement {
    Settlement::Finished {
        state: CallState::Succeeded,
        status: Some(200),
        reason: None,
        response: None,
        executed: true,
    }
}

/// A worker that is registered, and has received nothing yet.
pub(crate) async fn open_registered_worker(nats: &Nats, stan: &FakeStan, host: &str) -> Stan {
    let worker = open_worker(nats, host).await;
    assert!(tokio::time::timeout(Duration::from_millis(1), worker.receive(4)).await.is_err());
    let id = format!("faas-worker-{host}");
    eventually("the worker is registered", async || stan.client_ids().contains(&id)).await;
    worker
}

/// Id of the call in a message.
pub(crate) fn call_id(message: &Value) -> String {
    message["Header"]["X-Call-Id"][0].as_str().unwrap().to_owned()
}
