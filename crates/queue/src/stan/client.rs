//! A client of a NATS Streaming cluster. It registers under its id, answers the server's heartbeats, and registers
//! again when the server does not know it any more.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use async_nats::Subscriber;
use bytes::Bytes;
use futures_util::StreamExt as _;
use tokio::sync::{Notify, Semaphore, watch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::stan::nats::{NatsConnection, NatsError};
use crate::stan::proto::{
    Close, Closed, ConnectRequest, ConnectResponse, ID_IN_USE, PROTOCOL_VERSION, Ping, Pong,
    Publish, Published,
};
use gateway_base::backoff::Backoff;

/// Timeout of the registration. If the id is in use, the server first waits for a response of the client that has it.
const REGISTER_TIMEOUT: Duration = Duration::from_secs(5);
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// Timeout of a publish, after which the call counts as not enqueued.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(5);
/// Timeout of a publish that no client waits for. It is long because the message must not be published again while the
/// server may still store it: it would be stored twice.
const BACKGROUND_PUBLISH_TIMEOUT: Duration = Duration::from_secs(60);
/// Time to wait for a connection and a session before a publish fails.
const SESSION_TIMEOUT: Duration = Duration::from_millis(800);
/// Delay before the second attempt to register.
const MIN_REGISTER_DELAY: Duration = Duration::from_millis(100);
/// A session that lasts this long counts as stable.
const STABLE_SESSION_AFTER: Duration = Duration::from_secs(1);
/// Maximum number of concurrent publishes.
const MAX_UNCONFIRMED_PUBLISHES: usize = 1024;
/// Ping settings that the client announces: seconds between pings, and unanswered pings after which the server counts
/// as lost.
pub(super) const PING_INTERVAL_SECONDS: i32 = 5;
pub(super) const PING_MAX_OUT: i32 = 3;
/// Actual interval of the pings, by which an unresponsive server is noticed.
const PROBE_INTERVAL: Duration = Duration::from_millis(500);
/// Time since the last contact after which the server counts as unresponsive. Its session remains.
const UNRESPONSIVE_AFTER: Duration = Duration::from_millis(1500);
/// Time to wait for an unresponsive server before a publish fails: it may only be slow.
const RESPONSIVE_TIMEOUT: Duration = Duration::from_secs(3);
/// Minimum interval between two updates of the last contact.
const CONTACT_RESOLUTION: Duration = Duration::from_millis(50);

/// A client and its session.
pub(super) struct Client {
    nats: NatsConnection,
    cluster: String,
    id: String,
    /// Delays between attempts to register.
    register_backoff: Backoff,
    session: watch::Sender<Option<Arc<Session>>>,
    /// Notified after a failure that may be due to a lost session, to ping the server early.
    ping_requested: Notify,
    unconfirmed: Semaphore,
    /// Time of the last contact with the server.
    last_contact: watch::Sender<Instant>,
}

/// A registration: the connection id, and the subjects for requests to the server.
#[derive(Debug)]
pub(super) struct Session {
    connection: Bytes,
    pub(super) server: ConnectResponse,
}

/// Ends the current session when it is dropped.
struct SessionGuard<'a>(&'a watch::Sender<Option<Arc<Session>>>);

impl Drop for SessionGuard<'_> {
    fn drop(&mut self) {
        self.0.send_replace(None);
    }
}

impl Client {
    pub(super) fn new(
        nats: NatsConnection,
        cluster: &str,
        id: String,
        max_register_delay: Duration,
    ) -> Self {
        Self {
            nats,
            cluster: cluster.to_owned(),
            id,
            register_backoff: Backoff::new(MIN_REGISTER_DELAY, max_register_delay),
            session: watch::Sender::new(None),
            ping_requested: Notify::new(),
            unconfirmed: Semaphore::new(MAX_UNCONFIRMED_PUBLISHES),
            last_contact: watch::Sender::new(Instant::now()),
        }
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// Returns whether the client is registered and the server responds.
    pub(super) fn is_usable(&self) -> bool {
        self.session.borrow().is_some() && is_recent(&self.last_contact.borrow())
    }

    /// Records that the server has responded.
    fn record_contact(&self) {
        let now = Instant::now();
        self.last_contact.send_if_modified(|last_contact| {
            let is_due = now.duration_since(*last_contact) >= CONTACT_RESOLUTION;
            if is_due {
                *last_contact = now;
            }
            is_due
        });
    }

    /// Keeps the client registered until `stopping` is cancelled. Runs `work` in each session; when `work` returns,
    /// the session is given up.
    pub(super) async fn run<W>(
        &self,
        stopping: &CancellationToken,
        work: impl Fn(Arc<Session>) -> W,
    ) where
        W: Future<Output = NatsError>,
    {
        let (mut delay, mut last_logged, mut was_stable) = (MIN_REGISTER_DELAY, None, true);
        while !stopping.is_cancelled() {
            let error = tokio::select! {
                // The server drops an interrupted registration by itself.
                () = stopping.cancelled() => return,
                registered = self.register() => match registered {
                    Ok((session, heartbeats)) => {
                        if was_stable {
                            tracing::info!(client = self.id, "Registered with NATS Streaming");
                        }
                        let started = Instant::now();
                        let error = self.run_session(session, heartbeats, stopping, &work).await;
                        // A session that ends immediately is logged once, and the backoff goes on.
                        was_stable = started.elapsed() >= STABLE_SESSION_AFTER;
                        if was_stable {
                            (delay, last_logged) = (MIN_REGISTER_DELAY, None);
                        }
                        error
                    }
                    Err(error) => Some(error),
                }
            };
            let Some(error) = error else { return };
            if last_logged.as_ref() != Some(&error) {
                self.log_error(&error);
                last_logged = Some(error);
            }
            tokio::select! {
                () = stopping.cancelled() => {}
                () = tokio::time::sleep(delay) => {}
            }
            delay = self.register_backoff.next(delay);
        }
    }

    fn log_error(&self, error: &NatsError) {
        let client = &self.id;
        match error {
            NatsError::Rejected(text) if text == ID_IN_USE => tracing::warn!(
                client,
                "NATS Streaming has another client with this id: waiting for it to disconnect"
            ),
            error => {
                tracing::warn!(client, error = %error, "NATS Streaming is unavailable: {error}")
            }
        }
    }

    async fn register(&self) -> Result<(Session, Subscriber), NatsError> {
        self.nats.wait_connected(REGISTER_TIMEOUT).await?;
        let connection = Bytes::from(unique_name());
        let heartbeat_inbox = self.nats.inbox();
        let heartbeats = self.nats.subscribe(heartbeat_inbox.clone()).await?;
        let request = ConnectRequest {
            client_id: self.id.clone(),
            heartbeat_inbox,
            protocol: PROTOCOL_VERSION,
            connection: connection.clone(),
            ping_interval: PING_INTERVAL_SECONDS,
            ping_max_out: PING_MAX_OUT,
        };
        let subject = discover_subject(&self.cluster);
        let server: ConnectResponse =
            self.nats.request(&subject, &request, REGISTER_TIMEOUT).await?;
        if !server.error.is_empty() {
            return Err(NatsError::Rejected(server.error));
        }
        Ok((Session { connection, server }, heartbeats))
    }

    /// Runs a session. Returns the error that ended it, or `None` after a requested stop.
    async fn run_session<W>(
        &self,
        session: Session,
        heartbeats: Subscriber,
        stopping: &CancellationToken,
        work: impl Fn(Arc<Session>) -> W,
    ) -> Option<NatsError>
    where
        W: Future<Output = NatsError>,
    {
        let session = Arc::new(session);
        self.record_contact();
        self.session.send_replace(Some(Arc::clone(&session)));
        // Dropping this future also ends the session.
        let guard = SessionGuard(&self.session);
        // Cancel-safe: no branch holds anything that could be lost.
        let error = tokio::select! {
            () = stopping.cancelled() => None,
            error = self.answer_heartbeats(heartbeats) => Some(error),
            error = self.ping(&session) => Some(error),
            error = work(Arc::clone(&session)) => Some(error),
        };
        drop(guard);
        if error.is_none() {
            let close = Close { client_id: self.id.clone() };
            let closed: Result<Closed, _> =
                self.nats.request(&session.server.close, &close, CLOSE_TIMEOUT).await;
            tracing::debug!(client = self.id, ?closed, "Closed the NATS Streaming session");
        }
        error
    }

    /// Answers the server's heartbeats.
    async fn answer_heartbeats(&self, mut heartbeats: Subscriber) -> NatsError {
        while let Some(heartbeat) = heartbeats.next().await {
            self.record_contact();
            if let Some(reply) = heartbeat.reply {
                // The server repeats a heartbeat whose response is lost.
                let _ = self.nats.send(reply.to_string(), Bytes::new()).await;
            }
        }
        NatsError::Unreachable
    }

    /// Pings the server until it rejects this client or too many pings are unanswered. Returns the error.
    async fn ping(&self, session: &Session) -> NatsError {
        let interval = match session.server.ping_interval {
            seconds @ 1..=60 => Duration::from_secs(seconds.unsigned_abs().into()),
            _ => Duration::from_secs(PING_INTERVAL_SECONDS.unsigned_abs().into()),
        };
        let max_unanswered = session.server.ping_max_out.clamp(1, 100);
        let ping = Ping { connection: session.connection.clone() };
        let mut connections = self.nats.connection_count();
        let mut unanswered = 0;
        loop {
            tokio::select! {
                () = tokio::time::sleep(PROBE_INTERVAL) => {}
                () = self.ping_requested.notified() => {}
                Ok(()) = connections.changed() => {}
            }
            match self.nats.request::<Pong>(&session.server.ping, &ping, interval).await {
                Ok(pong) if pong.error.is_empty() => {
                    self.record_contact();
                    unanswered = 0;
                }
                Ok(pong) => return NatsError::Rejected(pong.error),
                Err(NatsError::NoResponders) => return NatsError::NoResponders,
                Err(error) => {
                    unanswered += 1;
                    if unanswered >= max_unanswered {
                        return error;
                    }
                }
            }
        }
    }

    /// Publishes `data` to `channel`. Returns when the server has stored it.
    ///
    /// # Errors
    /// `Unconfirmed` and `UnexpectedResponse` when the server may have stored it; after the other errors it is not
    /// stored.
    pub(super) async fn publish(&self, channel: &str, data: Bytes) -> Result<(), NatsError> {
        self.publish_with_timeout(PUBLISH_TIMEOUT, channel, data).await
    }

    /// Like [`Self::publish`], with a long timeout.
    pub(super) async fn publish_in_background(
        &self,
        channel: &str,
        data: Bytes,
    ) -> Result<(), NatsError> {
        self.publish_with_timeout(BACKGROUND_PUBLISH_TIMEOUT, channel, data).await
    }

    async fn publish_with_timeout(
        &self,
        timeout: Duration,
        channel: &str,
        data: Bytes,
    ) -> Result<(), NatsError> {
        let sent = AtomicBool::new(false);
        let stored = self.store(timeout, channel, data, &sent);
        let stored =
            tokio::time::timeout(timeout, stored).await.unwrap_or(Err(NatsError::Unreachable));
        let stored = match stored {
            // The server may have received the message, or receive it later.
            Err(NatsError::Unreachable) if sent.load(Relaxed) => Err(NatsError::Unconfirmed),
            stored => stored,
        };
        if !matches!(stored, Ok(()) | Err(NatsError::UnexpectedResponse | NatsError::TooLarge)) {
            self.ping_requested.notify_one();
        }
        stored
    }

    /// Waits until the server is responsive. It could store a message that is sent before long after the publisher has
    /// given up.
    async fn wait_responsive(&self) -> Result<(), NatsError> {
        let mut last_contact = self.last_contact.subscribe();
        let responsive =
            tokio::time::timeout(RESPONSIVE_TIMEOUT, last_contact.wait_for(is_recent)).await;
        // The sender is never dropped before the client.
        responsive
            .map_err(|_| NatsError::Unreachable)?
            .map(drop)
            .map_err(|_| NatsError::Unreachable)
    }

    async fn store(
        &self,
        timeout: Duration,
        channel: &str,
        data: Bytes,
        sent: &AtomicBool,
    ) -> Result<(), NatsError> {
        // The semaphore is never closed.
        let _permit = self.unconfirmed.acquire().await.map_err(|_| NatsError::Unreachable)?;
        self.nats.wait_connected(SESSION_TIMEOUT).await?;
        let mut sessions = self.session.subscribe();
        let session =
            tokio::time::timeout(SESSION_TIMEOUT, sessions.wait_for(Option::is_some)).await;
        session.map_err(|_| NatsError::Unreachable)?.map_err(|_| NatsError::Unreachable)?;
        self.wait_responsive().await?;
        // The session may have been replaced meanwhile.
        let session = sessions.borrow_and_update().clone().ok_or(NatsError::Unreachable)?;
        let message = Publish {
            client_id: self.id.clone(),
            guid: unique_name(),
            channel: channel.to_owned(),
            data,
            connection: session.connection.clone(),
        };
        let subject = format!("{}.{channel}", session.server.publish_prefix);
        let mut connections = self.nats.connection_count();
        connections.mark_unchanged();
        sent.store(true, Relaxed);
        let published = tokio::select! {
            published = self.nats.request::<Published>(&subject, &message, timeout) => published?,
            () = wait_lost(sessions, &session, connections) => return Err(NatsError::Unreachable),
        };
        self.record_contact();
        match published {
            Published { error, .. } if !error.is_empty() => Err(NatsError::Rejected(error)),
            Published { guid, .. } if guid != message.guid => Err(NatsError::UnexpectedResponse),
            Published { .. } => Ok(()),
        }
    }
}

/// Waits until no response can be expected any more: `session` has ended, or the connection, and thus the response,
/// was lost.
async fn wait_lost(
    mut sessions: watch::Receiver<Option<Arc<Session>>>,
    session: &Arc<Session>,
    mut connections: watch::Receiver<u64>,
) {
    let is_ended =
        |now: &Option<Arc<Session>>| !now.as_ref().is_some_and(|now| Arc::ptr_eq(now, session));
    let reconnected = async {
        // The sender is gone: there will be no further change.
        if connections.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(PUBLISH_TIMEOUT).await;
    };
    tokio::select! {
        _ = sessions.wait_for(is_ended) => {}
        () = reconnected => {}
    }
}

fn is_recent(last_contact: &Instant) -> bool {
    last_contact.elapsed() < UNRESPONSIVE_AFTER
}

/// Returns the subject for registrations with `cluster`.
pub(super) fn discover_subject(cluster: &str) -> String {
    format!("_STAN.discover.{cluster}")
}

/// Returns a unique name.
pub(super) fn unique_name() -> String {
    Uuid::new_v4().simple().to_string()
}
