//! A call that was taken: it is claimed, kept from others while it runs, and settled.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use async_nats::HeaderMap;
use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use crate::queue::jetstream::message::{Claim, End, answer_headers, json};
use crate::queue::jetstream::pull::Arrived;
use crate::queue::jetstream::server::Fault;
use crate::queue::jetstream::subject::{ANSWERS, CALLS, CLAIMS, DEAD, ENDS, token};
use crate::queue::jetstream::{Shared, parts};
use crate::queue::now;
use crate::queue::status::{Answer, Settlement, State, Status};
use crate::queue::{Delivery, Error, Handle};

/// Between attempts to settle while the server is away.
const PAUSE: Duration = Duration::from_millis(200);
/// One who takes a call back is done with that within this time, or has died over it.
const TAKEN_BACK: Duration = Duration::from_secs(1);
/// A body that is not there may be so for a moment only.
const NO_BODY: Duration = Duration::from_secs(60);
/// So often a claim is tried anew when others change it at the same time.
const TRIES: usize = 5;
/// No claim has this number.
const NONE: u64 = 0;

/// A call that was taken. It is given back when this is dropped unsettled.
pub(in crate::queue) struct Lease {
    shared: Arc<Shared>,
    line: usize,
    arrived: Arc<Arrived>,
    status: Status,
    /// The number of our claim.
    claim: Arc<AtomicU64>,
    /// Ends the task that keeps the call ours.
    stop: CancellationToken,
    settled: AtomicBool,
    /// When it is given back: not before so long.
    delay: Option<Duration>,
}

/// What came of the attempt to claim a call.
enum Claimed {
    Yes,
    /// It is over, though its message is still there.
    Over,
    /// Somebody is taking it back.
    NotNow,
}

impl Lease {
    pub(super) fn new(shared: &Arc<Shared>, line: usize, arrived: Arrived) -> Self {
        let noted = arrived.message.progress();
        let status = Status {
            state: State::Running,
            attempts: noted.map_or(0, |status| status.attempts) + 1,
            started_at: Some(now()),
            ..Status::queued(&arrived.call)
        };
        Self {
            shared: Arc::clone(shared),
            line,
            arrived: Arc::new(arrived),
            status,
            claim: Arc::new(AtomicU64::new(NONE)),
            stop: CancellationToken::new(),
            settled: AtomicBool::new(false),
            delay: None,
        }
    }

    /// The call, once it is claimed; `None` if it is not to be made, or not now.
    pub(super) async fn begin(mut self) -> Result<Option<Delivery>, Fault> {
        self.keep();
        let shared = Arc::clone(&self.shared);
        // It was settled, but whoever did so died before its message was gone, or the server did.
        let suspect = self.arrived.again || shared.server.was_found(self.arrived.sequence);
        if suspect && self.is_over().await? {
            self.done().await?;
            return Ok(None);
        }
        let mut call = self.arrived.call.clone();
        if let Some(parts) = self.arrived.message.parts() {
            let Some(body) = parts::load(&shared.server, &shared.names, &parts).await? else {
                tracing::error!(call.id, "The body of a queued call is not there");
                self.delay = Some(NO_BODY);
                return Ok(None);
            };
            call.body = body;
        }
        match self.claim().await? {
            Claimed::Yes => {
                let attempts = self.status.attempts - 1;
                Ok(Some(Delivery { call, attempts, handle: Handle::JetStream(Box::new(self)) }))
            }
            Claimed::Over => {
                self.done().await?;
                Ok(None)
            }
            Claimed::NotNow => {
                self.delay = Some(TAKEN_BACK);
                Ok(None)
            }
        }
    }

    fn subject(&self, root: &str) -> String {
        let call = &self.arrived.call;
        self.shared.names.call(root, &call.function, &call.id)
    }

    /// Whether the message's call has a final state.
    async fn is_over(&self) -> Result<bool, Fault> {
        let call = &self.arrived.call;
        self.shared.is_over(&call.function, &call.id, self.arrived.sequence).await
    }

    /// Says that we make the call. The server took it from whoever had it before.
    async fn claim(&self) -> Result<Claimed, Fault> {
        let server = &self.shared.server;
        let mut last = 0;
        for _ in 0..TRIES {
            let (subject, body) = (self.subject(CLAIMS), self.claim_body());
            match server.put(subject, HeaderMap::new(), body, Some(last)).await {
                Ok(stored) => {
                    self.claim.store(stored.sequence, Relaxed);
                    return Ok(Claimed::Yes);
                }
                Err(fault) if fault.is_conflict() => {}
                Err(fault) => return Err(fault),
            }
            if self.is_over().await? {
                return Ok(Claimed::Over);
            }
            let found = self.shared.claim(&self.subject(CLAIMS)).await?;
            last = match found {
                Some((_, claim)) if claim.running.is_none() => return Ok(Claimed::NotNow),
                Some((number, _)) => number,
                None => 0,
            };
        }
        Ok(Claimed::NotNow)
    }

    fn claim_body(&self) -> Bytes {
        let running = Some(self.status.clone());
        json(&Claim { sequence: self.arrived.sequence, running }).into()
    }

    /// Keeps the call ours until this is settled or dropped.
    fn keep(&self) {
        let (shared, arrived) = (Arc::clone(&self.shared), Arc::clone(&self.arrived));
        let (claim, stop) = (Arc::clone(&self.claim), self.stop.clone());
        let (subject, body) = (self.subject(CLAIMS), self.claim_body());
        self.shared.tasks.spawn(async move {
            loop {
                arrived.still_busy(&shared.server).await;
                // Both branches are cancel-safe: neither holds anything.
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = tokio::time::sleep(arrived.lease / 3) => {}
                }
                let ours = claim.load(Relaxed);
                if ours == NONE {
                    continue;
                }
                // A claim of a call that runs is renewed before it grows too old; one that is gone is made again.
                for last in [ours, 0] {
                    let (subject, body) = (subject.clone(), body.clone());
                    match shared.server.put(subject, HeaderMap::new(), body, Some(last)).await {
                        Err(fault) if fault.is_conflict() => {}
                        Err(_) => break,
                        Ok(stored) => {
                            claim.store(stored.sequence, Relaxed);
                            break;
                        }
                    }
                }
            }
        });
    }

    /// Settles the call. While the server is away this waits as long as the call is ours: a settlement that is lost
    /// has the call made again.
    pub(super) async fn settle(&self, settlement: &Settlement) -> Result<(), Error> {
        if self.settled.load(Relaxed) {
            return Err(Error::Gone);
        }
        let status = self.status.clone().settled(settlement, now());
        let patience = self.arrived.lease.max(Duration::from_secs(5));
        let start = Instant::now();
        loop {
            match self.store(&status, settlement).await {
                Ok(()) => return Ok(()),
                Err(fault) => {
                    let error = Error::from(fault);
                    if error != Error::Away || start.elapsed() > patience {
                        return Err(error);
                    }
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    /// Each step may be done twice; none but the last makes the call's message go.
    async fn store(&self, status: &Status, settlement: &Settlement) -> Result<(), Fault> {
        let shared = Arc::clone(&self.shared);
        shared.ready().await?;
        let arrived = Arc::clone(&self.arrived);
        let (server, sequence, message) = (&shared.server, arrived.sequence, &arrived.message);
        match settlement {
            Settlement::Finished { answer, .. } => {
                shared.store_answer(&arrived.call.id, answer.as_ref()).await?;
                let end = json(&End { sequence, status: status.clone() });
                server.put(self.subject(ENDS), HeaderMap::new(), end.into(), None).await?;
            }
            Settlement::Dead { answer, .. } => {
                shared.store_answer(&arrived.call.id, answer.as_ref()).await?;
                let headers = message.progressed(status, sequence);
                server.put(self.subject(DEAD), headers, message.body.clone(), None).await?;
            }
            Settlement::Retry { .. } => {
                let headers = message.progressed(status, sequence);
                let (subject, body) = (self.subject(CALLS), message.body.clone());
                match server.put(subject, headers, body, Some(sequence)).await {
                    // Done before, or the call is somebody else's by now.
                    Err(fault) if !fault.is_conflict() => return Err(fault),
                    _ => {}
                }
            }
        }
        if !matches!(settlement, Settlement::Retry { .. })
            && let Some(key) = &arrived.call.options.idempotency_key
        {
            shared.remember(key, &arrived.call.id).await?;
        }
        self.done().await?;
        if matches!(settlement, Settlement::Finished { .. }) {
            shared.forget_parts(message.parts().as_ref()).await;
        }
        Ok(())
    }

    /// Removes the message, and what says that it is ours.
    async fn done(&self) -> Result<(), Fault> {
        let server = &self.shared.server;
        let acked = server.request(self.arrived.reply.clone(), None, Bytes::from_static(b"+ACK"));
        if acked.await.is_err() {
            // A consumer that is not there takes no word: the message goes without it.
            server.delete(&self.shared.names.calls, self.arrived.sequence).await?;
        }
        self.settled.store(true, Relaxed);
        self.stop.cancel();
        let claim = self.claim.load(Relaxed);
        if claim != NONE {
            // It goes by itself otherwise.
            let _ = server.delete(&self.shared.names.claims, claim).await;
        }
        Ok(())
    }
}

impl Shared {
    /// Stores `answer`, or forgets the one that was there.
    pub(super) async fn store_answer(
        &self,
        id: &str,
        answer: Option<&Answer>,
    ) -> Result<(), Fault> {
        let Some(answer) = answer else { return Ok(()) };
        let size = self.server.client.max_payload() / 2;
        let count = answer.body.len().div_ceil(size.max(1)).max(1);
        // The first part comes last: it says that the others are there.
        for number in (0..count).rev() {
            let piece =
                answer.body.len().min(number * size)..answer.body.len().min((number + 1) * size);
            let headers =
                if number == 0 { answer_headers(answer, count) } else { HeaderMap::new() };
            let subject = self.names.part(ANSWERS, &token(id), number);
            self.server.put(subject, headers, answer.body.slice(piece), None).await?;
        }
        Ok(())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.stop.cancel();
        self.shared.lines().ended(self.line);
        self.shared.ready.notify_one();
        if self.settled.load(Relaxed) {
            return;
        }
        let (shared, arrived) = (Arc::clone(&self.shared), Arc::clone(&self.arrived));
        let (claim, delay) = (self.claim.load(Relaxed), self.delay);
        self.shared.tasks.finish(async move {
            // First the claim: who takes the call next makes one of his own.
            if claim != NONE {
                let _ = shared.server.delete(&shared.names.claims, claim).await;
            }
            arrived.not_now(&shared.server, delay).await;
        });
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Lease").field(&self.arrived.sequence).finish()
    }
}
