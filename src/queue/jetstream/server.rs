//! The connection to the server, and what is asked of it. Nothing here waits for long: a server that is away is
//! [`Fault::Away`] within [`PATIENCE`].

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use anyhow::Context as _;
use async_nats::connection::State as Connection;
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::RawMessage;
use async_nats::{Client, Event, HeaderMap, Request, RequestErrorKind, jetstream};
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::json;
use tokio::sync::watch;

use crate::queue::Error;
use crate::queue::jetstream::options::{OLDEST, Options};
use crate::queue::jetstream::subject::Names;

/// How long one waits for the connection to come back, and how long for an answer.
const PATIENCE: Duration = Duration::from_millis(800);
const ANSWER: Duration = Duration::from_millis(1000);
/// Between looks at the connection that nobody announces.
const LOOK: Duration = Duration::from_millis(50);
/// Counted from this number, connections are never mistaken for none.
const NEVER: u64 = 0;

/// Numbers of errors, as the server knows them.
const NO_MESSAGE: u64 = 10037;
const WRONG_SEQUENCE: u64 = 10071;
const STORE_FAILED: u64 = 10077;
const NO_STREAM: u64 = 10059;
const LARGE_HEAD: u64 = 10097;
const NOT_NOW: [u64; 4] = [10008, 10009, 10004, NO_STREAM];
const NO_ROOM: [u64; 4] = [10023, 10028, 10047, 10077];

/// What goes wrong between us and the server.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum Fault {
    #[error("the server does not answer")]
    Away,
    #[error("the server takes no message of that size")]
    TooLarge,
    #[error("the server refuses: {1} ({0})")]
    Refused(u64, String),
    #[error("the server's answer is not understood")]
    Odd,
}

impl Fault {
    /// Somebody else has changed what was to be changed.
    pub(super) fn is_conflict(&self) -> bool {
        matches!(self, Self::Refused(WRONG_SEQUENCE, _))
    }
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        match &fault {
            Fault::Away => Self::Unreachable,
            Fault::Refused(code, _) if NOT_NOW.contains(code) => Self::Unreachable,
            Fault::Refused(STORE_FAILED, text) if text.contains("maximum messages") => Self::Full,
            Fault::Refused(code, _) if NO_ROOM.contains(code) => Self::NoSpace,
            Fault::TooLarge | Fault::Refused(LARGE_HEAD, _) => Self::TooLarge(0),
            Fault::Refused(..) | Fault::Odd => {
                tracing::error!(error = %fault, "The queue's server failed");
                Self::Failed
            }
        }
    }
}

/// The connection. It comes back by itself whenever it is lost.
pub(super) struct Server {
    pub(super) client: Client,
    pub(super) context: jetstream::Context,
    /// How often there has been a connection.
    connections: watch::Receiver<u64>,
    /// With which of them it was seen that all streams are there.
    prepared: AtomicU64,
    /// The number of the last call that the server had when it was started.
    found: AtomicU64,
    /// It did what it was asked last. One may be connected to a server that does not.
    serves: AtomicBool,
}

/// What was stored, and where.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(super) struct Stored {
    #[serde(rename = "seq")]
    pub(super) sequence: u64,
    /// A message with the same id was stored before, there.
    #[serde(default)]
    pub(super) duplicate: bool,
}

/// A consumer, and what it has before it.
#[derive(Deserialize)]
pub(super) struct Consumer {
    pub(super) name: String,
    /// Never given to anybody.
    #[serde(default, rename = "num_pending")]
    pub(super) pending: u64,
    /// Given to somebody, and not over.
    #[serde(default, rename = "num_ack_pending")]
    pub(super) given: u64,
    /// All up to this number are over.
    #[serde(rename = "ack_floor", deserialize_with = "number")]
    pub(super) floor: u64,
    /// All up to this number were given to somebody.
    #[serde(deserialize_with = "number")]
    pub(super) delivered: u64,
}

/// The number of a message, out of what the server says of a place in a stream.
fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    #[derive(Deserialize)]
    struct Place {
        stream_seq: u64,
    }
    Ok(Place::deserialize(deserializer)?.stream_seq)
}

#[derive(Deserialize)]
struct Refusal {
    error: Option<Reason>,
}

#[derive(Deserialize)]
struct Reason {
    #[serde(default)]
    err_code: u64,
    #[serde(default)]
    description: String,
}

impl Server {
    /// Begins to connect, on the current runtime; that this succeeds is not waited for.
    pub(super) async fn open(options: &Options) -> anyhow::Result<Self> {
        let (connected, connections) = watch::channel(NEVER);
        let connect = options.connect_options().await?.event_callback(move |event| {
            match event {
                Event::Connected => {
                    connected.send_modify(|number| *number += 1);
                    tracing::info!("The queue's server is there");
                }
                Event::Disconnected => tracing::warn!("The queue's server is away"),
                event => tracing::debug!(%event, "Word from the queue's server"),
            }
            std::future::ready(())
        });
        let client = connect.connect(options.servers.as_slice()).await;
        let client = client.context("cannot make a connection to the queue's server")?;
        let context =
            jetstream::context::ContextBuilder::new().timeout(ANSWER).build(client.clone());
        Ok(Self {
            client,
            context,
            connections,
            prepared: AtomicU64::new(NEVER),
            found: AtomicU64::new(0),
            serves: AtomicBool::new(true),
        })
    }

    pub(super) fn is_connected(&self) -> bool {
        self.client.connection_state() == Connection::Connected
    }

    /// Whether all is there, and the server does what it is asked.
    pub(super) fn is_of_use(&self) -> bool {
        self.connected().is_some_and(|it| self.is_prepared(it)) && self.serves.load(Relaxed)
    }

    /// Finds out whether the server does what it is asked. Where it did not, that is tried by storing something.
    pub(super) async fn look(&self, names: &Names) -> Result<(), Fault> {
        if self.serves.load(Relaxed) {
            return self.messages(&names.calls).await.map(drop);
        }
        self.put(names.look(), HeaderMap::new(), Bytes::new(), None).await.map(drop)
    }

    /// How often the connection has come back.
    pub(super) fn reconnects(&self) -> u64 {
        self.connections.borrow().saturating_sub(1)
    }

    /// The number of the connection that there is, if there is one.
    pub(super) fn connected(&self) -> Option<u64> {
        let number = *self.connections.borrow();
        (number != NEVER && self.is_connected()).then_some(number)
    }

    /// The number of the connection that there will be in a moment. A new one may find another server, with nothing on it.
    pub(super) async fn connection(&self) -> Result<u64, Fault> {
        if let Some(number) = self.connected() {
            return Ok(number);
        }
        let mut connections = self.connections.clone();
        let there = async {
            loop {
                // Running out is the time to look again.
                let _ = tokio::time::timeout(LOOK, connections.changed()).await;
                if let Some(number) = self.connected() {
                    return number;
                }
            }
        };
        Box::pin(tokio::time::timeout(PATIENCE, there)).await.map_err(|_| Fault::Away)
    }

    pub(super) fn is_prepared(&self, connection: u64) -> bool {
        self.prepared.load(Relaxed) == connection
    }

    /// Whether the call `sequence` was there before the server was started. One that was killed may have forgotten that
    /// it is over.
    pub(super) fn was_found(&self, sequence: u64) -> bool {
        sequence <= self.found.load(Relaxed)
    }

    /// All is there, and `found` is the number of the last call that the server had when it was started.
    pub(super) fn prepared(&self, connection: u64, found: u64) {
        self.found.store(found, Relaxed);
        if !self.client.is_server_compatible(OLDEST.0, OLDEST.1, OLDEST.2) {
            let version = self.client.server_info().version;
            tracing::warn!(version, "The queue's server is older than what this is made for");
        }
        self.prepared.store(connection, Relaxed);
    }

    /// Something that belongs to the queue is not there: it is looked for before the next use.
    fn look_again(&self) {
        self.prepared.store(NEVER, Relaxed);
    }

    /// Whether a body goes into one message beside `headers` bytes of headers.
    pub(super) fn fits(&self, headers: usize, body: usize) -> bool {
        // What the server adds, and what is noted of a call later.
        const SPARE: usize = 4096;
        headers.saturating_add(body).saturating_add(SPARE) <= self.client.max_payload()
    }

    /// Stores a message. With `last`, only if the last one of this subject has that number.
    pub(super) async fn put(
        &self,
        subject: String,
        mut headers: HeaderMap,
        body: Bytes,
        last: Option<u64>,
    ) -> Result<Stored, Fault> {
        if let Some(last) = last {
            headers.insert("Nats-Expected-Last-Subject-Sequence", last.to_string());
        }
        self.ask(subject, Some(headers), body).await
    }

    /// The last message of `stream` whose subject is or fits `subject`.
    pub(super) async fn last(
        &self,
        stream: &str,
        subject: &str,
    ) -> Result<Option<StreamMessage>, Fault> {
        self.get(stream, json!({ "last_by_subj": subject })).await
    }

    /// The message of `stream` with that number.
    pub(super) async fn at(
        &self,
        stream: &str,
        number: u64,
    ) -> Result<Option<StreamMessage>, Fault> {
        self.get(stream, json!({ "seq": number })).await
    }

    async fn get(
        &self,
        stream: &str,
        which: serde_json::Value,
    ) -> Result<Option<StreamMessage>, Fault> {
        #[derive(Deserialize)]
        struct Got {
            message: RawMessage,
        }
        match self.api::<Got>(&format!("STREAM.MSG.GET.{stream}"), &which).await {
            Ok(got) => got.message.try_into().map(Some).map_err(|_| Fault::Odd),
            Err(Fault::Refused(NO_MESSAGE, _)) => Ok(None),
            Err(fault) => Err(fault),
        }
    }

    /// Removes a message; whether it was there, for that it is gone already is as well.
    pub(super) async fn delete(&self, stream: &str, number: u64) -> Result<bool, Fault> {
        let which = json!({ "seq": number, "no_erase": true });
        let what = format!("STREAM.MSG.DELETE.{stream}");
        match self.api::<serde_json::Value>(&what, &which).await {
            Ok(_) => Ok(true),
            // The server's word for a number that it does not have differs with its version.
            Err(Fault::Refused(code, text)) => match self.at(stream, number).await? {
                Some(_) => Err(Fault::Refused(code, text)),
                None => Ok(false),
            },
            Err(fault) => Err(fault),
        }
    }

    /// Removes all messages whose subjects fit `subject`, up to the one with the number `last`.
    pub(super) async fn purge(&self, stream: &str, subject: &str, last: u64) -> Result<(), Fault> {
        let which = json!({ "filter": subject, "seq": last.saturating_add(1) });
        self.api::<serde_json::Value>(&format!("STREAM.PURGE.{stream}"), &which).await.map(drop)
    }

    /// The first message of `stream` whose subject fits `subject`, from the one with the number `from` on.
    pub(super) async fn next(
        &self,
        stream: &str,
        subject: &str,
        from: u64,
    ) -> Result<Option<StreamMessage>, Fault> {
        self.get(stream, json!({ "seq": from, "next_by_subj": subject })).await
    }

    /// How many messages `stream` has.
    pub(super) async fn messages(&self, stream: &str) -> Result<u64, Fault> {
        #[derive(Deserialize)]
        struct Info {
            state: State,
        }
        #[derive(Deserialize)]
        struct State {
            messages: u64,
        }
        let info: Info = self.api(&format!("STREAM.INFO.{stream}"), &json!({})).await?;
        Ok(info.state.messages)
    }

    /// The subjects in `stream` that fit `filter`; of more than `most` some only, but all of one answer.
    pub(super) async fn subjects(
        &self,
        stream: &str,
        filter: &str,
        most: usize,
    ) -> Result<Vec<String>, Fault> {
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
            let which = json!({ "subjects_filter": filter, "offset": subjects.len() });
            let page: Page = self.api(&format!("STREAM.INFO.{stream}"), &which).await?;
            let found = page.state.subjects.unwrap_or_default();
            let empty = found.is_empty();
            subjects.extend(found.into_keys());
            if empty || subjects.len() >= page.total.min(most) {
                return Ok(subjects);
            }
        }
    }

    /// What the consumer `name` knows. The server looks at every message for that.
    pub(super) async fn consumer(&self, stream: &str, name: &str) -> Result<Consumer, Fault> {
        self.api(&format!("CONSUMER.INFO.{stream}.{name}"), &json!({})).await
    }

    /// The names of the consumers of `stream`.
    pub(super) async fn names(&self, stream: &str) -> Result<Vec<String>, Fault> {
        #[derive(Deserialize)]
        struct Page {
            #[serde(default)]
            total: usize,
            consumers: Option<Vec<String>>,
        }
        let mut names = Vec::new();
        loop {
            let which = json!({ "offset": names.len() });
            let page: Page = self.api(&format!("CONSUMER.NAMES.{stream}"), &which).await?;
            let found = page.consumers.unwrap_or_default();
            let empty = found.is_empty();
            names.extend(found);
            if empty || names.len() >= page.total {
                return Ok(names);
            }
        }
    }

    /// The consumers of `stream`. The server looks at every message for each of them.
    pub(super) async fn consumers(&self, stream: &str) -> Result<Vec<Consumer>, Fault> {
        #[derive(Deserialize)]
        struct Page {
            #[serde(default)]
            total: usize,
            consumers: Option<Vec<Consumer>>,
        }
        let mut consumers = Vec::new();
        loop {
            let which = json!({ "offset": consumers.len() });
            let page: Page = self.api(&format!("CONSUMER.LIST.{stream}"), &which).await?;
            let found = page.consumers.unwrap_or_default();
            let empty = found.is_empty();
            consumers.extend(found);
            if empty || consumers.len() >= page.total {
                return Ok(consumers);
            }
        }
    }

    pub(super) async fn api<T: DeserializeOwned>(
        &self,
        what: &str,
        which: &serde_json::Value,
    ) -> Result<T, Fault> {
        self.ask(format!("$JS.API.{what}"), None, which.to_string().into()).await
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        subject: String,
        headers: Option<HeaderMap>,
        payload: Bytes,
    ) -> Result<T, Fault> {
        let answer = self.request(subject, headers, payload).await?;
        // Mostly it is no refusal, and that can be seen without parsing it for that alone.
        if memchr::memmem::find(&answer, b"\"error\"").is_some() {
            let refusal: Refusal = serde_json::from_slice(&answer).map_err(|_| Fault::Odd)?;
            if let Some(reason) = refusal.error {
                if NOT_NOW.contains(&reason.err_code) {
                    self.serves.store(false, Relaxed);
                }
                if reason.err_code == NO_STREAM {
                    self.look_again();
                }
                return Err(Fault::Refused(reason.err_code, reason.description));
            }
        }
        serde_json::from_slice(&answer).map_err(|_| Fault::Odd)
    }

    /// One question, one answer.
    pub(super) async fn request(
        &self,
        subject: String,
        headers: Option<HeaderMap>,
        payload: Bytes,
    ) -> Result<Bytes, Fault> {
        let answer = self.request_once(subject, headers, payload).await;
        self.serves.store(!matches!(answer, Err(Fault::Away)), Relaxed);
        answer
    }

    async fn request_once(
        &self,
        subject: String,
        headers: Option<HeaderMap>,
        payload: Bytes,
    ) -> Result<Bytes, Fault> {
        // What is sent while nobody listens would be sent later, when nobody waits for it any more.
        self.connection().await?;
        let mut request = Request::new().payload(payload).timeout(None);
        if let Some(headers) = headers {
            request = request.headers(headers);
        }
        // On the heap: it is large, and all that wait for it would be.
        let asked = Box::pin(self.client.send_request(subject, request));
        let asked = tokio::time::timeout(ANSWER, asked).await;
        match asked {
            Err(_) => Err(Fault::Away),
            Ok(Ok(answer)) => Ok(answer.payload),
            Ok(Err(error)) => match error.kind() {
                RequestErrorKind::MaxPayloadExceeded => Err(Fault::TooLarge),
                RequestErrorKind::InvalidSubject => Err(Fault::Odd),
                RequestErrorKind::NoResponders => {
                    self.look_again();
                    Err(Fault::Away)
                }
                _ => Err(Fault::Away),
            },
        }
    }
}
