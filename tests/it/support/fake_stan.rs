//! A fake NATS Streaming server on a real nats-server, with the parts that a queue needs: durable queue groups,
//! redelivery, heartbeats, and unique client ids.

pub(crate) mod proto;
mod store;

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_nats::{Client, Message as NatsMessage};
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::select_all;
use prost::Message;
use serde_json::Value;
use tokio::task::JoinHandle;

use crate::support::fake_stan::proto::{
    Ack, CloseRequest, Complaint, ConnectRequest, ConnectResponse, Ping, PubAck, PubMsg,
    SubscriptionRequest, SubscriptionResponse,
};
use crate::support::fake_stan::store::Store;
use crate::support::nats::Nats;

pub(crate) const CLUSTER: &str = "faas-cluster";
pub(crate) const CHANNEL: &str = "faas-request";
/// Interval of heartbeats, and the number that a client may miss.
const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(500);
const MAX_MISSED_HEARTBEATS: u32 = 3;
const HEARTBEAT_TIMEOUT: Duration = Duration::from_millis(500);
/// Interval of deliveries.
const DELIVERY_INTERVAL: Duration = Duration::from_millis(10);

/// The server. Its stored messages survive a kill.
pub(crate) struct FakeStan {
    url: String,
    store: Arc<Mutex<Store>>,
    silent: Arc<AtomicBool>,
    running: Option<Running>,
}

struct Running {
    client: Client,
    task: JoinHandle<()>,
}

impl FakeStan {
    /// A running server on `nats`.
    pub(crate) async fn start(nats: &Nats) -> Self {
        let mut stan = Self::not_started(nats);
        stan.restart().await;
        stan
    }

    /// A server that has not been started.
    pub(crate) fn not_started(nats: &Nats) -> Self {
        Self { url: nats.url(), store: Arc::default(), silent: Arc::default(), running: None }
    }

    /// Starts the server on its stored messages.
    pub(crate) async fn restart(&mut self) {
        assert!(self.running.is_none(), "it runs");
        let options = async_nats::ConnectOptions::new().retry_on_initial_connect();
        let client = options.connect(&self.url).await.unwrap();
        let mut subscriptions = Vec::new();
        for subject in ["discover.C", "discover.C.pings", "pub.C.>", "sub.C", "close.C"] {
            let subject = format!("_STAN.{}", subject.replace('C', CLUSTER));
            subscriptions.push(client.subscribe(subject).await.unwrap());
        }
        subscriptions.push(client.subscribe("_ACKS.*").await.unwrap());
        client.flush().await.unwrap();
        let server = Server { client: client.clone(), store: Arc::clone(&self.store) };
        let silent = Arc::clone(&self.silent);
        let task = tokio::spawn(async move {
            let mut requests = select_all(subscriptions);
            let mut tick = tokio::time::interval(DELIVERY_INTERVAL);
            let mut heartbeats = tokio::time::interval(HEARTBEAT_INTERVAL);
            loop {
                tokio::select! {
                    Some(request) = requests.next() => {
                        if !silent.load(SeqCst) {
                            server.serve(request).await;
                        }
                    }
                    _ = tick.tick() => {}
                    _ = heartbeats.tick() => server.send_heartbeats(),
                }
                server.deliver().await;
            }
        });
        self.running = Some(Running { client, task });
    }

    /// Kills the server: it sends nothing more.
    pub(crate) async fn kill(&mut self) {
        if let Some(Running { client, task }) = self.running.take() {
            task.abort();
            let _ = task.await;
            // Afterwards there are no subscriptions any more.
            client.drain().await.unwrap();
        }
    }

    /// Makes the server receive everything and send nothing, or continue as before.
    pub(crate) fn set_silent(&self, silent: bool) {
        self.silent.store(silent, SeqCst);
    }

    /// Makes the server refuse the next `messages` messages for `channel`.
    pub(crate) fn refuse(&self, channel: &str, messages: usize) {
        self.store().remaining_refusals.insert(channel.to_owned(), messages);
    }

    /// Makes the server deliver no messages of channels whose names begin with `channels`.
    pub(crate) fn withhold_channels(&self, channels: &str) {
        self.store().withheld_channels = Some(channels.to_owned());
    }

    /// Makes the server store messages for `channel` immediately, and acknowledge them after `delay`.
    pub(crate) fn delay_publish_acks(&self, channel: &str, delay: Duration) {
        self.store().delays.insert(channel.to_owned(), delay);
    }

    /// Makes the server ignore acknowledgements of `channel`, or heed them again.
    pub(crate) fn lose_acks(&self, channel: &str, lose: bool) {
        self.store().lost_acks = lose.then(|| channel.to_owned());
    }

    /// Makes the server forget the client `id` and refuse it, until another one is named.
    pub(crate) fn reject_client(&self, id: &str) {
        let mut store = self.store();
        store.close(id);
        store.rejected_client = id.to_owned();
    }

    /// Number of messages that will still be refused.
    pub(crate) fn remaining_refusals(&self, channel: &str) -> usize {
        self.store().remaining_refusals.get(channel).copied().unwrap_or_default()
    }

    /// Loses all stored messages, as a server with a memory store does.
    pub(crate) fn lose_state(&self) {
        *self.store() = Store::default();
    }

    /// Stores a message as another client would.
    pub(crate) fn store_message(&self, channel: &str, data: impl Into<Bytes>) {
        self.store().append(channel, data.into());
    }

    /// All messages that were ever stored in `channel`.
    pub(crate) fn messages(&self, channel: &str) -> Vec<Value> {
        let store = self.store();
        let messages = store.channels.get(channel).into_iter().flatten();
        messages.map(|(data, _)| serde_json::from_slice(data).unwrap()).collect()
    }

    /// Number of messages that were ever stored in `channel`.
    pub(crate) fn message_count(&self, channel: &str) -> usize {
        self.store().channels.get(channel).map_or(0, Vec::len)
    }

    /// Number of deliveries of `channel` to workers, and number of unacknowledged messages.
    pub(crate) fn deliveries_and_pending(&self, channel: &str) -> (usize, usize) {
        let store = self.store();
        let group = store.groups.get(&format!("faas:{channel}"));
        group.map_or((0, 0), |group| (group.deliveries, group.pending.len()))
    }

    /// The registered client ids.
    pub(crate) fn client_ids(&self) -> Vec<String> {
        self.store().clients.keys().cloned().collect()
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap()
    }
}

impl Drop for FakeStan {
    fn drop(&mut self) {
        if let Some(running) = &self.running {
            running.task.abort();
        }
    }
}

#[derive(Clone)]
struct Server {
    client: Client,
    store: Arc<Mutex<Store>>,
}

impl Server {
    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap()
    }

    async fn send(&self, subject: impl Into<String>, message: &impl Message) {
        self.client.publish(subject.into(), message.encode_to_vec().into()).await.unwrap();
    }

    async fn serve(&self, request: NatsMessage) {
        let NatsMessage { subject, payload, reply, .. } = request;
        let reply = reply.map(|reply| reply.to_string()).unwrap_or_default();
        let subject = subject.strip_prefix("_STAN.").unwrap_or(&subject);
        match subject.split('.').next().unwrap() {
            "discover" if subject.ends_with(".pings") => {
                let ping = Ping::decode(payload).unwrap();
                let known = self.store().clients.values().any(|c| c.connection == ping.connection);
                let error =
                    if known { "" } else { "client has been replaced or is no longer registered" };
                self.send(reply, &Complaint { error: error.to_owned() }).await;
            }
            "discover" => {
                // Checking whether the id is free may take a while.
                let server = self.clone();
                tokio::spawn(async move {
                    server.register(ConnectRequest::decode(payload).unwrap(), reply).await;
                });
            }
            "pub" => self.publish(PubMsg::decode(payload).unwrap(), reply).await,
            "sub" => {
                let request = SubscriptionRequest::decode(payload).unwrap();
                let response = match self.store().subscribe(request) {
                    Some(ack_inbox) => SubscriptionResponse { ack_inbox, error: String::new() },
                    None => SubscriptionResponse {
                        ack_inbox: String::new(),
                        error: "stan: too many channels".to_owned(),
                    },
                };
                self.send(reply, &response).await;
            }
            "close" => {
                let closed = self.store().close(&CloseRequest::decode(payload).unwrap().client_id);
                let error = if closed { "" } else { "unknown client" };
                self.send(reply, &Complaint { error: error.to_owned() }).await;
            }
            "_ACKS" => self.store().acknowledge(subject, &Ack::decode(payload).unwrap()),
            other => panic!("{other}"),
        }
    }

    async fn register(&self, request: ConnectRequest, reply: String) {
        let refused =
            |error: &str| ConnectResponse { error: error.to_owned(), ..Default::default() };
        assert!(!request.client_id.is_empty() && !request.heartbeat_inbox.is_empty());
        assert_eq!(request.protocol, 1);
        if self.store().rejected_client == request.client_id {
            return self.send(reply, &refused("stan: not now")).await;
        }
        let known = self.store().clients.get(&request.client_id).cloned();
        if let Some(known) = known {
            if self.is_alive(&known.heartbeat_inbox).await {
                return self.send(reply, &refused("stan: clientID already registered")).await;
            }
            self.store().close(&request.client_id);
        }
        let client = store::Client {
            connection: request.connection,
            heartbeat_inbox: request.heartbeat_inbox,
            missed: 0,
        };
        self.store().clients.insert(request.client_id, client);
        let subject = |what: &str| format!("_STAN.{what}.{CLUSTER}");
        let response = ConnectResponse {
            pub_prefix: subject("pub"),
            sub_requests: subject("sub"),
            unsub_requests: subject("unsub"),
            close_requests: subject("close"),
            error: String::new(),
            sub_close_requests: subject("subclose"),
            ping_requests: subject("discover") + ".pings",
            // The server may shorten the interval.
            ping_interval: request.ping_interval.min(1),
            ping_max_out: request.ping_max_out.min(2),
            protocol: 1,
        };
        self.send(reply, &response).await;
    }

    async fn publish(&self, message: PubMsg, reply: String) {
        let known = self.store().clients.get(&message.client_id).cloned();
        let known = known.is_some_and(|client| client.connection == message.connection);
        let refused = self.store().refuses(&message.subject);
        let error = match (known, refused) {
            (false, _) => "stan: invalid publish request",
            (true, true) => "stan: too many messages",
            (true, false) => "",
        };
        if error.is_empty() {
            self.store().append(&message.subject, message.data);
        }
        let ack = PubAck { guid: message.guid, error: error.to_owned() };
        let delay = self.store().delays.get(&message.subject).copied();
        let Some(delay) = delay else { return self.send(reply, &ack).await };
        let server = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            server.send(reply, &ack).await;
        });
    }

    async fn is_alive(&self, inbox: &str) -> bool {
        let heartbeat = self.client.request(inbox.to_owned(), Bytes::new());
        matches!(tokio::time::timeout(HEARTBEAT_TIMEOUT, heartbeat).await, Ok(Ok(_)))
    }

    /// Sends every client a heartbeat, and closes those that have missed too many.
    fn send_heartbeats(&self) {
        let clients: Vec<_> =
            self.store().clients.iter().map(|(id, client)| (id.clone(), client.clone())).collect();
        for (id, client) in clients {
            let server = self.clone();
            tokio::spawn(async move {
                let lives = server.is_alive(&client.heartbeat_inbox).await;
                let mut store = server.store();
                let Some(known) = store.clients.get_mut(&id) else { return };
                if known.connection != client.connection {
                    return;
                }
                known.missed = if lives { 0 } else { known.missed + 1 };
                if known.missed >= MAX_MISSED_HEARTBEATS {
                    store.close(&id);
                }
            });
        }
    }

    async fn deliver(&self) {
        let sent = self.store().deliver();
        for (inbox, message) in sent {
            self.client.publish(inbox, message).await.unwrap();
        }
    }
}
