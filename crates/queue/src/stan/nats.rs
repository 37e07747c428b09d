//! The connection to the NATS server below NATS Streaming. All operations have timeouts.

use std::time::Duration;

use async_nats::connection::State as Connection;
use async_nats::{Client, Event, Request, RequestErrorKind, Subscriber};
use bytes::Bytes;
use prost::Message;
use tokio::sync::watch;

use crate::jetstream::Options;

/// Timeout of sending a message that has no response.
const SEND_TIMEOUT: Duration = Duration::from_secs(1);
/// Interval of polling the connection state, of which not every change is announced.
const STATE_POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Maximum number of unread messages of a subscription. The server never sends more than was requested.
const SUBSCRIPTION_CAPACITY: usize = 16 * 1024;

/// An error of the NATS server or of the connection to it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NatsError {
    #[error("the server does not respond")]
    Unreachable,
    /// The request was sent, but not answered: the server may have processed it.
    #[error("the server has not confirmed the request")]
    Unconfirmed,
    #[error("no server is listening")]
    NoResponders,
    #[error("the message is too large for the server")]
    TooLarge,
    #[error("the server rejected the request: {0}")]
    Rejected(String),
    #[error("the server's response is invalid")]
    UnexpectedResponse,
}

/// The connection, which reconnects automatically. Cheap to clone.
#[derive(Clone)]
pub(super) struct NatsConnection {
    client: Client,
    /// Number of connections so far.
    connection_count: watch::Receiver<u64>,
}

impl NatsConnection {
    /// Starts to connect, without waiting for the connection.
    ///
    /// # Errors
    /// When the options are invalid.
    pub(super) async fn open(options: &Options) -> anyhow::Result<Self> {
        use anyhow::Context as _;
        let (connected, connection_count) = watch::channel(0);
        let connect = options.connect_options().await?.subscription_capacity(SUBSCRIPTION_CAPACITY);
        let connect = connect.event_callback(move |event| {
            match event {
                Event::Connected => {
                    connected.send_modify(|number| *number += 1);
                    tracing::info!("Connected to the NATS server");
                }
                Event::Disconnected => tracing::warn!("Disconnected from the NATS server"),
                event => tracing::debug!(%event, "Event of the NATS client"),
            }
            std::future::ready(())
        });
        let client = connect.connect(options.servers.as_slice()).await;
        let client = client.context("cannot connect to NATS")?;
        Ok(Self { client, connection_count })
    }

    pub(super) fn is_connected(&self) -> bool {
        self.client.connection_state() == Connection::Connected
            && *self.connection_count.borrow() > 0
    }

    /// Waits until there is a connection, for at most `timeout`.
    pub(super) async fn wait_connected(&self, timeout: Duration) -> Result<(), NatsError> {
        let mut connection_count = self.connection_count.clone();
        let connected = async {
            while !self.is_connected() {
                // After the timeout the state is checked again.
                let _ = tokio::time::timeout(STATE_POLL_INTERVAL, connection_count.changed()).await;
            }
        };
        tokio::time::timeout(timeout, connected).await.map_err(|_| NatsError::Unreachable)
    }

    /// Returns a receiver of the number of connections, which changes with each new one.
    pub(super) fn connection_count(&self) -> watch::Receiver<u64> {
        self.connection_count.clone()
    }

    pub(super) fn max_payload(&self) -> usize {
        self.client.max_payload()
    }

    /// Returns a unique subject for responses.
    pub(super) fn inbox(&self) -> String {
        self.client.new_inbox()
    }

    pub(super) async fn subscribe(&self, subject: String) -> Result<Subscriber, NatsError> {
        let subscribed = tokio::time::timeout(SEND_TIMEOUT, self.client.subscribe(subject)).await;
        subscribed.map_err(|_| NatsError::Unreachable)?.map_err(|_| NatsError::UnexpectedResponse)
    }

    /// Sends `message` without waiting for a response.
    pub(super) async fn send(&self, subject: String, message: Bytes) -> Result<(), NatsError> {
        let sent = tokio::time::timeout(SEND_TIMEOUT, self.client.publish(subject, message)).await;
        sent.map_err(|_| NatsError::Unreachable)?.map_err(|_| NatsError::UnexpectedResponse)
    }

    /// Sends `message` and returns the response's payload.
    pub(super) async fn request_raw(
        &self,
        subject: String,
        message: Bytes,
        deadline: Duration,
    ) -> Result<Bytes, NatsError> {
        // The client's own timeout may be shorter than `deadline`.
        let request = Request::new().payload(message).timeout(None);
        let response = self.client.send_request(subject, request);
        let response = tokio::time::timeout(deadline, response).await;
        match response.map_err(|_| NatsError::Unreachable)? {
            Ok(response) => Ok(response.payload),
            Err(error) => Err(match error.kind() {
                RequestErrorKind::NoResponders => NatsError::NoResponders,
                RequestErrorKind::MaxPayloadExceeded => NatsError::TooLarge,
                _ => NatsError::Unreachable,
            }),
        }
    }

    /// Sends `message` and returns the decoded response.
    pub(super) async fn request<A: Message + Default>(
        &self,
        subject: &str,
        message: &impl Message,
        deadline: Duration,
    ) -> Result<A, NatsError> {
        let response =
            self.request_raw(subject.to_owned(), message.encode_to_vec().into(), deadline).await?;
        A::decode(response).map_err(|_| NatsError::UnexpectedResponse)
    }

    /// Waits until all messages have been sent.
    pub(super) async fn flush(&self) {
        let _ = tokio::time::timeout(SEND_TIMEOUT, self.client.flush()).await;
    }
}
