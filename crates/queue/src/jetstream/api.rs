//! Client of the JetStream API: the connection and its requests. Each request fails with [`NatsError::Unavailable`]
//! after a short timeout ([`CONNECT_TIMEOUT`], [`REQUEST_TIMEOUT`]).

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use anyhow::Context as _;
use async_nats::connection::State as Connection;
use async_nats::jetstream::context::ContextBuilder;
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::RawMessage;
use async_nats::{Client, Event, HeaderMap, Request, RequestErrorKind, jetstream};
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::json;
use tokio::sync::watch;

use crate::jetstream::error::{
    ErrorResponse, MESSAGE_NOT_FOUND, NatsError, STORE_FAILED, STREAM_NOT_FOUND, UNAVAILABLE_CODES,
};
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

/// Response to a publish.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(super) struct PubAck {
    #[serde(rename = "seq")]
    pub(super) sequence: u64,
    /// The server has seen the same message id before, at `sequence`.
    #[serde(default)]
    pub(super) duplicate: bool,
}

#[derive(Deserialize)]
pub(super) struct ConsumerState {
    pub(super) name: String,
    /// Messages that were never delivered.
    #[serde(default, rename = "num_pending")]
    pub(super) pending: u64,
    /// Messages that were delivered, but not acknowledged.
    #[serde(default, rename = "num_ack_pending")]
    pub(super) ack_pending: u64,
    /// All messages up to this sequence are acknowledged.
    #[serde(rename = "ack_floor", deserialize_with = "stream_sequence")]
    pub(super) ack_floor: u64,
    /// All messages up to this sequence were delivered.
    #[serde(deserialize_with = "stream_sequence")]
    pub(super) delivered: u64,
}

/// Reads the stream sequence of a consumer position.
fn stream_sequence<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    #[derive(Deserialize)]
    struct Position {
        stream_seq: u64,
    }
    Ok(Position::deserialize(deserializer)?.stream_seq)
}

/// Limits of a stream, and how much of them is used.
#[derive(Deserialize)]
struct StreamUsage {
    config: StreamLimits,
    state: StreamSize,
}

#[derive(Deserialize)]
struct StreamLimits {
    /// Not positive for no limit.
    #[serde(default)]
    max_msgs: i64,
}

#[derive(Deserialize)]
struct StreamSize {
    messages: u64,
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

    /// Publishes a message. With `last`, only if the last message of the subject has that sequence.
    pub(super) async fn publish(
        &self,
        subject: String,
        mut headers: HeaderMap,
        body: Bytes,
        last: Option<u64>,
    ) -> Result<PubAck, NatsError> {
        if let Some(last) = last {
            headers.insert("Nats-Expected-Last-Subject-Sequence", last.to_string());
        }
        let response = self.request(subject, Some(headers), body).await?;
        match self.parse_response(&response) {
            Err(NatsError::Rejected(STORE_FAILED, text)) => {
                Err(Box::pin(self.explain_store_failure(&response, text)).await)
            }
            parsed => parsed,
        }
    }

    /// Returns why the server has not stored a message. It reports [`STORE_FAILED`] for all reasons, so the stream is
    /// queried.
    async fn explain_store_failure(&self, response: &[u8], text: String) -> NatsError {
        #[derive(Deserialize)]
        struct Rejection {
            stream: String,
        }
        let rejected = NatsError::Rejected(STORE_FAILED, text);
        let Ok(Rejection { stream }) = serde_json::from_slice(response) else { return rejected };
        match self.stream_usage(&stream).await {
            Ok(StreamUsage { config, state })
                if u64::try_from(config.max_msgs)
                    .is_ok_and(|max| max > 0 && state.messages >= max) =>
            {
                NatsError::StreamFull
            }
            _ => rejected,
        }
    }

    /// Returns the last message of `stream` on `subject`, which may contain wildcards.
    pub(super) async fn get_last(
        &self,
        stream: &str,
        subject: &str,
    ) -> Result<Option<StreamMessage>, NatsError> {
        self.request_message(stream, json!({ "last_by_subj": subject })).await
    }

    pub(super) async fn get(
        &self,
        stream: &str,
        number: u64,
    ) -> Result<Option<StreamMessage>, NatsError> {
        self.request_message(stream, json!({ "seq": number })).await
    }

    async fn request_message(
        &self,
        stream: &str,
        request: serde_json::Value,
    ) -> Result<Option<StreamMessage>, NatsError> {
        #[derive(Deserialize)]
        struct Got {
            message: RawMessage,
        }
        match self.call_api::<Got>(&format!("STREAM.MSG.GET.{stream}"), &request).await {
            Ok(got) => got.message.try_into().map(Some).map_err(|_| NatsError::UnexpectedResponse),
            Err(NatsError::Rejected(MESSAGE_NOT_FOUND, _)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes a message. Returns whether it existed; a message that is already gone is no error.
    pub(super) async fn delete(&self, stream: &str, number: u64) -> Result<bool, NatsError> {
        let request = json!({ "seq": number, "no_erase": true });
        let endpoint = format!("STREAM.MSG.DELETE.{stream}");
        match self.call_api::<serde_json::Value>(&endpoint, &request).await {
            Ok(_) => Ok(true),
            // The error code for an unknown sequence differs between server versions.
            Err(NatsError::Rejected(code, text)) => match self.get(stream, number).await? {
                Some(_) => Err(NatsError::Rejected(code, text)),
                None => Ok(false),
            },
            Err(error) => Err(error),
        }
    }

    /// Removes all messages on `subject` (which may contain wildcards), up to and including the sequence `last`.
    pub(super) async fn purge(
        &self,
        stream: &str,
        subject: &str,
        last: u64,
    ) -> Result<(), NatsError> {
        let request = json!({ "filter": subject, "seq": last.saturating_add(1) });
        self.call_api::<serde_json::Value>(&format!("STREAM.PURGE.{stream}"), &request)
            .await
            .map(drop)
    }

    /// Returns the first message of `stream` on `subject`, at or after the sequence `from`.
    pub(super) async fn get_next(
        &self,
        stream: &str,
        subject: &str,
        from: u64,
    ) -> Result<Option<StreamMessage>, NatsError> {
        self.request_message(stream, json!({ "seq": from, "next_by_subj": subject })).await
    }

    pub(super) async fn message_count(&self, stream: &str) -> Result<u64, NatsError> {
        Ok(self.stream_usage(stream).await?.state.messages)
    }

    async fn stream_usage(&self, stream: &str) -> Result<StreamUsage, NatsError> {
        self.call_api(&format!("STREAM.INFO.{stream}"), &json!({})).await
    }

    /// Returns the subjects of `stream` that match `filter`. Stops after the page that reaches `max` subjects.
    pub(super) async fn subjects(
        &self,
        stream: &str,
        filter: &str,
        max: usize,
    ) -> Result<Vec<String>, NatsError> {
        #[derive(Deserialize)]
        struct Page {
            #[serde(default)]
            total: usize,
            state: Listed,
        }
        #[derive(Deserialize)]
        struct Listed {
            subjects: Option<HashMap<String, u64>>,
        }
        let mut subjects = Vec::new();
        loop {
            let request = json!({ "subjects_filter": filter, "offset": subjects.len() });
            let page: Page = self.call_api(&format!("STREAM.INFO.{stream}"), &request).await?;
            let found = page.state.subjects.unwrap_or_default();
            let empty = found.is_empty();
            subjects.extend(found.into_keys());
            if empty || subjects.len() >= page.total.min(max) {
                return Ok(subjects);
            }
        }
    }

    /// Returns the state of a consumer. The server scans every message for this.
    pub(super) async fn consumer_state(
        &self,
        stream: &str,
        name: &str,
    ) -> Result<ConsumerState, NatsError> {
        self.call_api(&format!("CONSUMER.INFO.{stream}.{name}"), &json!({})).await
    }

    pub(super) async fn consumer_names(&self, stream: &str) -> Result<Vec<String>, NatsError> {
        #[derive(Deserialize)]
        struct Page {
            #[serde(default)]
            total: usize,
            consumers: Option<Vec<String>>,
        }
        let mut names = Vec::new();
        loop {
            let request = json!({ "offset": names.len() });
            let page: Page = self.call_api(&format!("CONSUMER.NAMES.{stream}"), &request).await?;
            let found = page.consumers.unwrap_or_default();
            let empty = found.is_empty();
            names.extend(found);
            if empty || names.len() >= page.total {
                return Ok(names);
            }
        }
    }

    /// Returns the states of all consumers of `stream`. The server scans every message for each of them.
    pub(super) async fn consumers(&self, stream: &str) -> Result<Vec<ConsumerState>, NatsError> {
        #[derive(Deserialize)]
        struct Page {
            #[serde(default)]
            total: usize,
            consumers: Option<Vec<ConsumerState>>,
        }
        let mut consumers = Vec::new();
        loop {
            let request = json!({ "offset": consumers.len() });
            let page: Page = self.call_api(&format!("CONSUMER.LIST.{stream}"), &request).await?;
            let found = page.consumers.unwrap_or_default();
            let empty = found.is_empty();
            consumers.extend(found);
            if empty || consumers.len() >= page.total {
                return Ok(consumers);
            }
        }
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
