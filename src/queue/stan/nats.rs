//! The connection to the NATS server that NATS Streaming sits on. Nothing here waits for longer than it is told to.

use std::time::Duration;

use async_nats::connection::State as Connection;
use async_nats::{Client, Event, Request, RequestErrorKind, Subscriber};
use bytes::Bytes;
use prost::Message;
use tokio::sync::watch;

use crate::queue::jetstream::Options;

/// What is sent without an answer is on its way within this time, or not at all.
const SENDING: Duration = Duration::from_secs(1);
/// Between looks at the connection that nobody announces.
const LOOK: Duration = Duration::from_millis(50);
/// Messages of a subscription that wait to be read. The server sends no more than was asked for.
const UNREAD: usize = 16 * 1024;

/// What goes wrong between us and the server.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Fault {
    #[error("it does not answer")]
    Away,
    /// It was sent something, and has not answered: it may have it or not.
    #[error("it has not confirmed what it was sent")]
    Unconfirmed,
    #[error("there is none")]
    Nobody,
    #[error("it takes no message of that size")]
    TooLarge,
    #[error("it refuses: {0}")]
    Refused(String),
    #[error("its answer is not understood")]
    Odd,
}

/// The connection. It comes back by itself whenever it is lost. Cheap to clone.
#[derive(Clone)]
pub(super) struct Nats {
    client: Client,
    /// How often there has been a connection.
    connections: watch::Receiver<u64>,
}

impl Nats {
    /// Begins to connect; that this succeeds is not waited for.
    pub(super) async fn open(options: &Options) -> anyhow::Result<Self> {
        use anyhow::Context as _;
        let (connected, connections) = watch::channel(0);
        let connect = options.connect_options().await?.subscription_capacity(UNREAD);
        let connect = connect.event_callback(move |event| {
            match event {
                Event::Connected => {
                    connected.send_modify(|number| *number += 1);
                    tracing::info!("NATS is there");
                }
                Event::Disconnected => tracing::warn!("NATS is away"),
                event => tracing::debug!(%event, "Word from NATS"),
            }
            std::future::ready(())
        });
        let client = connect.connect(options.servers.as_slice()).await;
        let client = client.context("cannot make a connection to NATS")?;
        Ok(Self { client, connections })
    }

    pub(super) fn is_connected(&self) -> bool {
        self.client.connection_state() == Connection::Connected && *self.connections.borrow() > 0
    }

    /// Waits until there is a connection, but no longer than `patience`.
    pub(super) async fn connected(&self, patience: Duration) -> Result<(), Fault> {
        let mut connections = self.connections.clone();
        let there = async {
            while !self.is_connected() {
                // Running out is the time to look again.
                let _ = tokio::time::timeout(LOOK, connections.changed()).await;
            }
        };
        tokio::time::timeout(patience, there).await.map_err(|_| Fault::Away)
    }

    /// How often there has been a connection; changes when there is a new one.
    pub(super) fn connections(&self) -> watch::Receiver<u64> {
        self.connections.clone()
    }

    pub(super) fn max_payload(&self) -> usize {
        self.client.max_payload()
    }

    /// A subject that nobody else knows.
    pub(super) fn inbox(&self) -> String {
        self.client.new_inbox()
    }

    pub(super) async fn subscribe(&self, subject: String) -> Result<Subscriber, Fault> {
        let subscribed = tokio::time::timeout(SENDING, self.client.subscribe(subject)).await;
        subscribed.map_err(|_| Fault::Away)?.map_err(|_| Fault::Odd)
    }

    /// Sends `message` and forgets it.
    pub(super) async fn send(&self, subject: String, message: Bytes) -> Result<(), Fault> {
        let sent = tokio::time::timeout(SENDING, self.client.publish(subject, message)).await;
        sent.map_err(|_| Fault::Away)?.map_err(|_| Fault::Odd)
    }

    /// The answer to `message`, as it came.
    pub(super) async fn ask(
        &self,
        subject: String,
        message: Bytes,
        deadline: Duration,
    ) -> Result<Bytes, Fault> {
        // The deadline is the only one: the client's own may be shorter.
        let request = Request::new().payload(message).timeout(None);
        let asked = self.client.send_request(subject, request);
        let asked = tokio::time::timeout(deadline, asked).await;
        match asked.map_err(|_| Fault::Away)? {
            Ok(answer) => Ok(answer.payload),
            Err(error) => Err(match error.kind() {
                RequestErrorKind::NoResponders => Fault::Nobody,
                RequestErrorKind::MaxPayloadExceeded => Fault::TooLarge,
                _ => Fault::Away,
            }),
        }
    }

    /// The answer to `message`.
    pub(super) async fn request<A: Message + Default>(
        &self,
        subject: &str,
        message: &impl Message,
        deadline: Duration,
    ) -> Result<A, Fault> {
        let answer = self.ask(subject.to_owned(), message.encode_to_vec().into(), deadline).await?;
        A::decode(answer).map_err(|_| Fault::Odd)
    }

    /// Waits until all that was sent is on its way.
    pub(super) async fn flush(&self) {
        let _ = tokio::time::timeout(SENDING, self.client.flush()).await;
    }
}
