//! One client of a NATS Streaming cluster: registered under its id, alive as long as it answers the server's heartbeats,
//! and registered anew whenever the server does not know it any more.

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

use crate::queue::stan::nats::{Fault, Nats};
use crate::queue::stan::proto::{
    Close, Closed, ConnectRequest, ConnectResponse, PROTOCOL, Ping, Pong, Publish, Published,
};

/// A server that finds the id taken asks whoever has it before it answers, and gives him time.
const REGISTERING: Duration = Duration::from_secs(5);
const CLOSING: Duration = Duration::from_secs(1);
/// What was published is stored within this time, or the call is not taken in.
const STORING: Duration = Duration::from_secs(5);
/// For one that nobody waits for. It is not stored anew while the server may be at it: it would be there twice.
const STORING_AT_LENGTH: Duration = Duration::from_secs(60);
/// How long a call waits for a server that is away.
const PATIENCE: Duration = Duration::from_millis(800);
/// The pause before the second attempt to register; it doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// A session that has lasted for so long was no mere attempt.
const SETTLED: Duration = Duration::from_secs(1);
/// Messages on their way to be stored.
const MOST_UNSTORED: usize = 1024;
/// Seconds between two pings, and pings without an answer that mean that the server is gone.
pub(super) const PING_INTERVAL: i32 = 5;
pub(super) const PING_MAX_OUT: i32 = 3;
/// Between two pings at most: a server that stands still is noticed by them.
const PROBING: Duration = Duration::from_millis(500);
/// A server that has not been heard of for so long does not answer at this moment. Its session goes on.
const SILENCE: Duration = Duration::from_millis(1500);
/// How long a message waits for a server that does not answer at this moment: it may just be slow.
const WAKING: Duration = Duration::from_secs(3);
/// Signs of the server that follow each other so closely are not noted one by one.
const SIGNS: Duration = Duration::from_millis(50);
/// What the server says of an id that somebody has.
const TAKEN: &str = "already registered";

/// The client.
pub(super) struct Client {
    nats: Nats,
    cluster: String,
    id: String,
    /// The longest pause between attempts to register.
    longest_pause: Duration,
    session: watch::Sender<Option<Arc<Session>>>,
    /// Something failed that would not if the server knew us.
    suspect: Notify,
    unstored: Semaphore,
    /// When the server was heard of last.
    heard: watch::Sender<Instant>,
}

/// What the server knows us by, and where it wants to hear what.
#[derive(Debug)]
pub(super) struct Session {
    connection: Bytes,
    pub(super) server: ConnectResponse,
}

/// Ends the session that there is.
struct Over<'a>(&'a watch::Sender<Option<Arc<Session>>>);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.send_replace(None);
    }
}

impl Client {
    pub(super) fn new(nats: Nats, cluster: &str, id: String, longest_pause: Duration) -> Self {
        Self {
            nats,
            cluster: cluster.to_owned(),
            id,
            longest_pause,
            session: watch::Sender::new(None),
            suspect: Notify::new(),
            unstored: Semaphore::new(MOST_UNSTORED),
            heard: watch::Sender::new(Instant::now()),
        }
    }

    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// The client is registered, and the server answers.
    pub(super) fn is_usable(&self) -> bool {
        self.session.borrow().is_some() && is_recent(&self.heard.borrow())
    }

    fn hears(&self) {
        let now = Instant::now();
        self.heard.send_if_modified(|heard| {
            let is_news = now.duration_since(*heard) >= SIGNS;
            if is_news {
                *heard = now;
            }
            is_news
        });
    }

    /// Keeps the client registered until `stopping`. `work` is done in each session; one in which it ends is given up.
    pub(super) async fn run<W>(
        &self,
        stopping: &CancellationToken,
        work: impl Fn(Arc<Session>) -> W,
    ) where
        W: Future<Output = Fault>,
    {
        let (mut pause, mut told, mut settled) = (FIRST_PAUSE, None, true);
        while !stopping.is_cancelled() {
            let fault = tokio::select! {
                // A registration that is cut short is one that the server lets go of by itself.
                () = stopping.cancelled() => return,
                registered = self.register() => match registered {
                    Ok((session, heartbeats)) => {
                        if settled {
                            tracing::info!(client = self.id, "NATS Streaming is there");
                        }
                        let began = Instant::now();
                        let fault = self.keep(session, heartbeats, stopping, &work).await;
                        // One that ends at once is told of once, and not begun anew at once.
                        settled = began.elapsed() >= SETTLED;
                        if settled {
                            (pause, told) = (FIRST_PAUSE, None);
                        }
                        fault
                    }
                    Err(fault) => Some(fault),
                }
            };
            let Some(fault) = fault else { return };
            if told.as_ref() != Some(&fault) {
                self.tell(&fault);
                told = Some(fault);
            }
            tokio::select! {
                () = stopping.cancelled() => {}
                () = tokio::time::sleep(pause) => {}
            }
            pause = (pause * 2).min(self.longest_pause);
        }
    }

    fn tell(&self, fault: &Fault) {
        let client = &self.id;
        match fault {
            Fault::Refused(text) if text.contains(TAKEN) => tracing::warn!(
                client,
                "NATS Streaming has another client with this id: waiting until it is gone"
            ),
            fault => tracing::warn!(client, error = %fault, "NATS Streaming is away: {fault}"),
        }
    }

    async fn register(&self) -> Result<(Session, Subscriber), Fault> {
        self.nats.connected(REGISTERING).await?;
        let connection = Bytes::from(name());
        let heartbeat_inbox = self.nats.inbox();
        let heartbeats = self.nats.subscribe(heartbeat_inbox.clone()).await?;
        let request = ConnectRequest {
            client_id: self.id.clone(),
            heartbeat_inbox,
            protocol: PROTOCOL,
            connection: connection.clone(),
            ping_interval: PING_INTERVAL,
            ping_max_out: PING_MAX_OUT,
        };
        let subject = discover(&self.cluster);
        let server: ConnectResponse = self.nats.request(&subject, &request, REGISTERING).await?;
        if !server.error.is_empty() {
            return Err(Fault::Refused(server.error));
        }
        Ok((Session { connection, server }, heartbeats))
    }

    /// Keeps a session up; what ended it, or `None` if that was the stop.
    async fn keep<W>(
        &self,
        session: Session,
        heartbeats: Subscriber,
        stopping: &CancellationToken,
        work: impl Fn(Arc<Session>) -> W,
    ) -> Option<Fault>
    where
        W: Future<Output = Fault>,
    {
        let session = Arc::new(session);
        self.hears();
        self.session.send_replace(Some(Arc::clone(&session)));
        // However this ends, the client is not registered any more.
        let over = Over(&self.session);
        // None of them holds anything that would be lost.
        let fault = tokio::select! {
            () = stopping.cancelled() => None,
            fault = self.answer(heartbeats) => Some(fault),
            fault = self.ping(&session) => Some(fault),
            fault = work(Arc::clone(&session)) => Some(fault),
        };
        drop(over);
        if fault.is_none() {
            let close = Close { client_id: self.id.clone() };
            let closed: Result<Closed, _> =
                self.nats.request(&session.server.close, &close, CLOSING).await;
            tracing::debug!(client = self.id, ?closed, "Signed off from NATS Streaming");
        }
        fault
    }

    /// Says that we are alive whenever the server asks.
    async fn answer(&self, mut heartbeats: Subscriber) -> Fault {
        while let Some(heartbeat) = heartbeats.next().await {
            self.hears();
            if let Some(reply) = heartbeat.reply {
                // One that is lost is asked for again.
                let _ = self.nats.send(reply.to_string(), Bytes::new()).await;
            }
        }
        Fault::Away
    }

    /// Asks the server again and again whether it knows this client, until it does not, or has not answered for long.
    async fn ping(&self, session: &Session) -> Fault {
        let interval = match session.server.ping_interval {
            seconds @ 1..=60 => Duration::from_secs(seconds.unsigned_abs().into()),
            _ => Duration::from_secs(PING_INTERVAL.unsigned_abs().into()),
        };
        let most = session.server.ping_max_out.clamp(1, 100);
        let ping = Ping { connection: session.connection.clone() };
        let mut connections = self.nats.connections();
        let mut unanswered = 0;
        loop {
            tokio::select! {
                () = tokio::time::sleep(PROBING) => {}
                () = self.suspect.notified() => {}
                Ok(()) = connections.changed() => {}
            }
            match self.nats.request::<Pong>(&session.server.ping, &ping, interval).await {
                Ok(pong) if pong.error.is_empty() => {
                    self.hears();
                    unanswered = 0;
                }
                Ok(pong) => return Fault::Refused(pong.error),
                Err(Fault::Nobody) => return Fault::Nobody,
                Err(fault) => {
                    unanswered += 1;
                    if unanswered >= most {
                        return fault;
                    }
                }
            }
        }
    }

    /// Stores `data` in `channel`. Returns when it is there.
    pub(super) async fn publish(&self, channel: &str, data: Bytes) -> Result<(), Fault> {
        self.publish_within(STORING, channel, data).await
    }

    /// The same, with a server that takes its time.
    pub(super) async fn publish_patiently(&self, channel: &str, data: Bytes) -> Result<(), Fault> {
        self.publish_within(STORING_AT_LENGTH, channel, data).await
    }

    async fn publish_within(
        &self,
        patience: Duration,
        channel: &str,
        data: Bytes,
    ) -> Result<(), Fault> {
        let sent = AtomicBool::new(false);
        let stored = self.store(patience, channel, data, &sent);
        let stored = tokio::time::timeout(patience, stored).await.unwrap_or(Err(Fault::Away));
        let stored = match stored {
            // The server may have the message, or get it once it goes on.
            Err(Fault::Away) if sent.load(Relaxed) => Err(Fault::Unconfirmed),
            stored => stored,
        };
        if !matches!(stored, Ok(()) | Err(Fault::Odd | Fault::TooLarge)) {
            self.suspect.notify_one();
        }
        stored
    }

    /// Waits until the server answers. What it is sent before, it may store long after the caller has given up.
    async fn is_answering(&self) -> Result<(), Fault> {
        let mut heard = self.heard.subscribe();
        let answers = tokio::time::timeout(WAKING, heard.wait_for(is_recent)).await;
        // The sender lives as long as the client.
        answers.map_err(|_| Fault::Away)?.map(drop).map_err(|_| Fault::Away)
    }

    async fn store(
        &self,
        patience: Duration,
        channel: &str,
        data: Bytes,
        sent: &AtomicBool,
    ) -> Result<(), Fault> {
        // The semaphore is never closed.
        let _place = self.unstored.acquire().await.map_err(|_| Fault::Away)?;
        self.nats.connected(PATIENCE).await?;
        let mut sessions = self.session.subscribe();
        let session = tokio::time::timeout(PATIENCE, sessions.wait_for(Option::is_some)).await;
        session.map_err(|_| Fault::Away)?.map_err(|_| Fault::Away)?;
        self.is_answering().await?;
        // It may be another one by now.
        let session = sessions.borrow_and_update().clone().ok_or(Fault::Away)?;
        let message = Publish {
            client_id: self.id.clone(),
            guid: name(),
            channel: channel.to_owned(),
            data,
            connection: session.connection.clone(),
        };
        let subject = format!("{}.{channel}", session.server.publish_prefix);
        let mut connections = self.nats.connections();
        connections.mark_unchanged();
        sent.store(true, Relaxed);
        let published = tokio::select! {
            published = self.nats.request::<Published>(&subject, &message, patience) => published?,
            () = is_lost(sessions, &session, connections) => return Err(Fault::Away),
        };
        self.hears();
        match published {
            Published { error, .. } if !error.is_empty() => Err(Fault::Refused(error)),
            Published { guid, .. } if guid != message.guid => Err(Fault::Odd),
            Published { .. } => Ok(()),
        }
    }
}

/// Waits until no answer is to be expected any more in `session`: it is over, or the connection was lost, and the answer
/// with it.
async fn is_lost(
    mut sessions: watch::Receiver<Option<Arc<Session>>>,
    session: &Arc<Session>,
    mut connections: watch::Receiver<u64>,
) {
    let is_over =
        |now: &Option<Arc<Session>>| !now.as_ref().is_some_and(|now| Arc::ptr_eq(now, session));
    let reconnected = async {
        // One whose sender is gone changes no more.
        if connections.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(STORING).await;
    };
    tokio::select! {
        _ = sessions.wait_for(is_over) => {}
        () = reconnected => {}
    }
}

fn is_recent(heard: &Instant) -> bool {
    heard.elapsed() < SILENCE
}

/// Where a cluster is asked for.
pub(super) fn discover(cluster: &str) -> String {
    format!("_STAN.discover.{cluster}")
}

/// A name that nobody else has.
pub(super) fn name() -> String {
    Uuid::new_v4().simple().to_string()
}
