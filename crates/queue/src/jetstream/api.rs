//! Client of the JetStream API: the connection and its requests. Each request fails with [`NatsError::Unavailable`]
//! after a short timeout ([`CONNECT_TIMEOUT`], [`REQUEST_TIMEOUT`]).

pub(super) mod consumers;
pub(super) mod messages;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Duration;

use anyhow::Context as _;
use async_nats::connection::State as Connection;
use async_nats::jetstream::context::ContextBuilder;
use async_nats::{Client, Event, HeaderMap, Request, RequestErrorKind, jetstream};
use bytes::Bytes;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use crate::jetstream::error::{ErrorResponse, NatsError, STREAM_NOT_FOUND, UNAVAILABLE_CODES};
use crate::jetstream::options::{MIN_VERSION, Options};
use crate::jetstream::wire::subjects::Subjects;

/// Time to wait for a connection, and for a response.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(800);
const REQUEST_TIMEOUT: Duration = Duration::from_millis(1000);
/// Interval between polls of the connection state, whose changes are not always announced.
const CONNECTION_POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Connection number that means "not connected"; numbers of connections start at 1.
const NO_CONNECTION: u64 = 0;

/// Connection to the NATS server. It reconnects automatically.
pub(super) struct JetStreamApi {
    pub(super) client: Client,
    pub(super) context: jetstream::Context,
    /// Number of connections so far.
    connections: watch::Receiver<u64>,
    /// Number of the connection on which all streams were found.
    initialized_on: AtomicU64,
    /// Sequence of the last call that the server had when it was started.
    last_before_restart: AtomicU64,
    /// The last request succeeded. A connected server may still not process requests.
    responsive: AtomicBool,
}

impl JetStreamApi {
    /// Starts to connect on the current runtime, and returns immediately.
    pub(super) async fn open(options: &Options) -> anyhow::Result<Self> {
        let (connected, connections) = watch::channel(NO_CONNECTION);
        let connect = options.connect_options().await?.event_callback(move |event| {
            match event {
                Event::Connected => {
                    connected.send_modify(|number| *number += 1);
                    tracing::info!("Connected to the NATS server");
                }
                Event::Disconnected => tracing::warn!("Disconnected from the NATS server"),
                event => tracing::debug!(%event, "Event of the NATS connection"),
            }
            std::future::ready(())
        });
        let client = connect.connect(options.servers.as_slice()).await;
        let client = client.context("cannot create the connection to NATS")?;
        let context = ContextBuilder::new().timeout(REQUEST_TIMEOUT).build(client.clone());
        Ok(Self {
            client,
            context,
            connections,
            initialized_on: AtomicU64::new(NO_CONNECTION),
            last_before_restart: AtomicU64::new(0),
            responsive: AtomicBool::new(true),
        })
    }

    pub(super) fn is_connected(&self) -> bool {
        self.client.connection_state() == Connection::Connected
    }

    /// Returns whether the server is connected, all streams exist, and requests are processed.
    pub(super) fn is_usable(&self) -> bool {
        self.current_connection().is_some_and(|number| self.is_initialized(number))
            && self.responsive.load(Relaxed)
    }

    /// Checks whether the server processes requests. After a failure, it must also accept a publish.
    pub(super) async fn probe(&self, subjects: &Subjects) -> Result<(), NatsError> {
        if self.responsive.load(Relaxed) {
            return self.message_count(&subjects.calls).await.map(drop);
        }
        self.publish(subjects.probe(), HeaderMap::new(), Bytes::new(), None).await.map(drop)
    }

    pub(super) fn reconnects(&self) -> u64 {
        self.connections.borrow().saturating_sub(1)
    }

    /// Returns the number of the current connection, or `None` while disconnected.
    pub(super) fn current_connection(&self) -> Option<u64> {
        let number = *self.connections.borrow();
        (number != NO_CONNECTION && self.is_connected()).then_some(number)
    }

    /// Waits for a connection and returns its number. A new connection may lead to another server that has no streams.
    pub(super) async fn wait_connected(&self) -> Result<u64, NatsError> {
        if let Some(number) = self.current_connection() {
            return Ok(number);
        }
        let mut connections = self.connections.clone();
        let connected = async {
            loop {
                // After the timeout, the state is polled again.
                let _ = tokio::time::timeout(CONNECTION_POLL_INTERVAL, connections.changed()).await;
                if let Some(number) = self.current_connection() {
                    return number;
                }
            }
        };
        Box::pin(tokio::time::timeout(CONNECT_TIMEOUT, connected))
            .await
            .map_err(|_| NatsError::Unavailable)
    }

    pub(super) fn is_initialized(&self, connection: u64) -> bool {
        self.initialized_on.load(Relaxed) == connection
    }

    /// Returns whether the call `sequence` was stored before the server was started. A server that was killed may have
    /// lost the information that the call is finished.
    pub(super) fn predates_restart(&self, sequence: u64) -> bool {
        sequence <= self.last_before_restart.load(Relaxed)
    }

    /// Records that all streams exist. `found` is the sequence of the last call at the start of the server.
    pub(super) fn mark_initialized(&self, connection: u64, found: u64) {
        self.last_before_restart.store(found, Relaxed);
        if !self.client.is_server_compatible(MIN_VERSION.0, MIN_VERSION.1, MIN_VERSION.2) {
            let version = self.client.server_info().version;
            tracing::warn!(version, "The version of the NATS server is not supported");
        }
        self.initialized_on.store(connection, Relaxed);
    }

    /// Forces a check of the streams before the next use: a stream is missing.
    fn reset_initialized(&self) {
        self.initialized_on.store(NO_CONNECTION, Relaxed);
    }

    /// Returns whether a body fits into one message, next to `headers` bytes of headers.
    pub(super) fn fits_in_payload(&self, headers: usize, body: usize) -> bool {
        // Headers that the server adds, and those that later updates of the call add.
        const SPARE: usize = 4096;
        headers.saturating_add(body).saturating_add(SPARE) <= self.client.max_payload()
    }

    pub(super) async fn call_api<T: DeserializeOwned>(
        &self,
        endpoint: &str,
        request: &serde_json::Value,
    ) -> Result<T, NatsError> {
        let payload = request.to_string().into();
        let response = self.request(format!("$JS.API.{endpoint}"), None, payload).await?;
        self.parse_response(&response)
    }

    /// Parses a response of the server.
    ///
    /// # Errors
    /// [`NatsError::Rejected`] if the response is an error.
    fn parse_response<T: DeserializeOwned>(&self, response: &[u8]) -> Result<T, NatsError> {
        // Few responses are errors; this avoids parsing each response twice.
        if memchr::memmem::find(response, b"\"error\"").is_some() {
            let body: ErrorResponse =
                serde_json::from_slice(response).map_err(|_| NatsError::UnexpectedResponse)?;
            if let Some(reason) = body.error {
                if UNAVAILABLE_CODES.contains(&reason.err_code) {
                    self.responsive.store(false, Relaxed);
                }
                if reason.err_code == STREAM_NOT_FOUND {
                    self.reset_initialized();
                }
                return Err(reason.into());
            }
        }
        serde_json::from_slice(response).map_err(|_| NatsError::UnexpectedResponse)
    }

    async fn request(
        &self,
        subject: String,
        headers: Option<HeaderMap>,
        payload: Bytes,
    ) -> Result<Bytes, NatsError> {
        let response = self.request_once(subject, headers, payload).await;
        self.responsive.store(!matches!(response, Err(NatsError::Unavailable)), Relaxed);
        response
    }

    async fn request_once(
        &self,
        subject: String,
        headers: Option<HeaderMap>,
        payload: Bytes,
    ) -> Result<Bytes, NatsError> {
        // While disconnected, the client would buffer the request, and send it after its caller has given up.
        self.wait_connected().await?;
        let mut request = Request::new().payload(payload).timeout(None);
        if let Some(headers) = headers {
            request = request.headers(headers);
        }
        // Boxed: this future is large, and every caller would contain it.
        let response = Box::pin(self.client.send_request(subject, request));
        let response = tokio::time::timeout(REQUEST_TIMEOUT, response).await;
        match response {
            Err(_) => Err(NatsError::Unavailable),
            Ok(Ok(response)) => Ok(response.payload),
            Ok(Err(error)) => match error.kind() {
                RequestErrorKind::MaxPayloadExceeded => Err(NatsError::TooLarge),
                RequestErrorKind::InvalidSubject => Err(NatsError::UnexpectedResponse),
                RequestErrorKind::NoResponders => {
                    self.reset_initialized();
                    Err(NatsError::Unavailable)
                }
                _ => Err(NatsError::Unavailable),
            },
        }
    }
}
