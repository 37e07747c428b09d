//! A call that was taken: it is claimed, kept from others while it runs, and settled.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering::Relaxed};
use std::time::{Duration, Instant};

use async_nats::HeaderMap;
use bytes::Bytes;

use crate::queue::jetstream::bundle::{Closed, Slot};
use crate::queue::jetstream::message::{AnswerHead, End, Message, answer_headers, end_headers};
use crate::queue::jetstream::pull::{Arrived, Origin, PAUSE};
use crate::queue::jetstream::roll::Roll;
use crate::queue::jetstream::server::Fault;
use crate::queue::jetstream::subject::{ANSWERS, CALLS, DEAD, ENDS, Named, token};
use crate::queue::jetstream::unpack::Bundle;
use crate::queue::jetstream::{Shared, parts};
use crate::queue::now;
use crate::queue::status::{CallRecord, Settlement, StoredResponse};
use crate::queue::{Delivery, Error, LeaseHandle};

/// One who takes a call back is done with that within this time, or has died over it.
const TAKEN_BACK: Duration = Duration::from_secs(1);
/// A body that is not there may be so for a moment only: so often it is looked for.
const LOOKS: u32 = 6;
/// The pause before a call is made again that made its worker panic; it doubles with each time.
const AFTER_PANIC: Duration = Duration::from_secs(1);
/// So often it doubles.
const DOUBLINGS: u32 = 10;
/// An answer whose body is no larger is stored with the final state.
const SMALL: usize = 4096;

/// How far a call has come: it was picked, but nobody has taken it.
const BEGUN: u8 = 0;
/// It has a place among those that are made.
const PLACED: u8 = 1;
/// It has been made.
const LEFT: u8 = 2;

/// A call that was picked, and then taken. It is given back when this is dropped unsettled.
pub(in crate::queue) struct Lease {
    shared: Arc<Shared>,
    pub(super) line: usize,
    pub(super) arrived: Arc<Arrived>,
    /// What it is known by among those that we have.
    hold: u64,
    stage: AtomicU8,
    settled: AtomicBool,
    /// Its body is not there any more.
    body_missing: bool,
    /// When it is given back: not before so long.
    delay: Option<Duration>,
}

impl Lease {
    pub(super) fn new(shared: &Arc<Shared>, line: usize, arrived: Arrived) -> Self {
        let arrived = Arc::new(arrived);
        let hold = shared.roll.hold(&arrived);
        Roll::keep(shared);
        let (stage, settled) = (AtomicU8::new(BEGUN), AtomicBool::new(false));
        let (shared, delay) = (Arc::clone(shared), Some(PAUSE));
        Self { shared, line, arrived, hold, stage, settled, body_missing: false, delay }
    }

    /// Somebody takes it, and there is a place for it.
    pub(super) fn placed(&self) {
        self.stage.store(PLACED, Relaxed);
    }

    /// Its place is free.
    pub(in crate::queue) fn release_slot(&self) {
        let left = self.stage.compare_exchange(PLACED, LEFT, Relaxed, Relaxed);
        if left.is_ok() {
            self.shared.lines().leaves(self.line);
            self.shared.ready.notify_one();
        }
    }

    /// The call, once it is claimed; `None` if it is not to be made, or not now.
    pub(super) async fn begin(mut self) -> Result<Option<Delivery>, Fault> {
        let shared = Arc::clone(&self.shared);
        // It was settled, but whoever did so died before its message was gone, or the server did.
        let suspect = self.arrived.came_before() || shared.server.was_found(self.arrived.sequence);
        if suspect && Box::pin(self.is_over()).await? {
            if let Origin::Among(bundle, slot) = &self.arrived.origin {
                bundle.close(&shared, *slot, Closed::Moved, true).await?;
            }
            self.done().await;
            return Ok(None);
        }
        if self.arrived.message.is_taken_back() {
            let Arrived { call, message, sequence, .. } = &*self.arrived;
            let named = Named { function: call.function.clone(), id: call.id.clone() };
            Box::pin(shared.finish_off(&named, message, *sequence)).await?;
            self.done().await;
            return Ok(None);
        }
        let mut call = self.arrived.call.clone();
        if let Some(parts) = self.arrived.message.parts() {
            let body = Box::pin(parts::load(&shared.server, &shared.names, &parts)).await?;
            if let Some(body) = body {
                shared.looks.forget(&call.id);
                call.body = body;
            } else if self.is_lost().await? {
                self.body_missing = true;
            } else {
                return Ok(None);
            }
        }
        if !shared.roll.claim(&shared, self.hold).await? {
            self.delay = Some(TAKEN_BACK);
            return Ok(None);
        }
        self.delay = None;
        let attempts = self.arrived.message.progress().map_or(0, |status| status.attempts);
        Ok(Some(Delivery {
            call,
            attempts,
            body_missing: self.body_missing,
            handle: LeaseHandle::JetStream(Box::new(self)),
        }))
    }

    /// Whether the call's body, which is not there, was looked for often enough. If not, it is looked for again later.
    async fn is_lost(&mut self) -> Result<bool, Fault> {
        let Arrived { call, .. } = &*self.arrived;
        let (call_id, function, looks) =
            (&call.id, &call.function, self.shared.looks.count(&call.id));
        if looks < LOOKS {
            tracing::warn!(call_id, %function, looks, "The body of a queued call is not there");
            self.delay = Some(self.shared.options.lease / 3);
            return Ok(false);
        }
        // Whoever has made it meanwhile has removed the body.
        if Box::pin(self.is_over()).await? {
            self.done().await;
            return Ok(false);
        }
        tracing::error!(call_id, %function, "The body of a queued call is lost");
        Ok(true)
    }

    fn subject(&self, root: &str) -> String {
        let call = &self.arrived.call;
        self.shared.names.call(root, &call.function, &call.id)
    }

    /// Whether the message's call has a final state, or a message of its own where this one has several.
    async fn is_over(&self) -> Result<bool, Fault> {
        let call = &self.arrived.call;
        match &self.arrived.origin {
            Origin::Alone(_) => {
                self.shared.is_over(&call.function, &call.id, self.arrived.sequence).await
            }
            Origin::Among(..) => self.shared.has_trace(call).await,
        }
    }

    /// The call's status while it is made.
    fn status(&self) -> CallRecord {
        let since = self.shared.roll.since(self.hold).unwrap_or_else(now);
        let status = self.arrived.message.running(&self.arrived.call, since);
        // One that is lost is not made once more.
        CallRecord { attempts: status.attempts - u32::from(self.body_missing), ..status }
    }

    /// Settles the call. While the server is away this waits as long as the call is ours: a settlement that is lost
    /// has the call made again.
    pub(super) async fn settle(&self, settlement: &Settlement) -> Result<(), Error> {
        if self.settled.load(Relaxed) {
            return Err(Error::Gone);
        }
        let status = self.status().settled(settlement, now());
        let patience = self.arrived.lease.max(Duration::from_secs(5));
        let start = Instant::now();
        loop {
            match Box::pin(self.store(&status, settlement)).await {
                Ok(()) => return Ok(()),
                Err(fault) => {
                    let error = Error::from(fault);
                    if error != Error::Unreachable || start.elapsed() > patience {
                        return Err(error);
                    }
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    /// Each step may be done twice; none but the last makes the call's message go.
    async fn store(&self, status: &CallRecord, settlement: &Settlement) -> Result<(), Fault> {
        let (shared, arrived) = (&self.shared, &self.arrived);
        shared.ready().await?;
        let (server, sequence, message) = (&shared.server, arrived.sequence, &arrived.message);
        if let Origin::Among(bundle, slot) = &arrived.origin {
            let slot = *slot;
            return self.store_among(bundle, slot, status, settlement).await;
        }
        match settlement {
            Settlement::Finished { response: answer, .. } => {
                self.end(status, answer.as_ref()).await?
            }
            Settlement::DeadLetter { response: answer, .. } => {
                Box::pin(shared.store_answer(&arrived.call.id, answer.as_ref())).await?;
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
            let call = &arrived.call;
            Box::pin(shared.remember(key, &call.function, &call.id)).await?;
        }
        self.done().await;
        if matches!(settlement, Settlement::Finished { .. })
            && let Some(parts) = message.parts()
        {
            Box::pin(shared.forget_parts(Some(&parts))).await;
        }
        Ok(())
    }

    /// The same for a call whose message has others.
    async fn store_among(
        &self,
        bundle: &Arc<Bundle>,
        slot: Slot,
        status: &CallRecord,
        settlement: &Settlement,
    ) -> Result<(), Fault> {
        let (shared, Arrived { call, sequence, .. }) = (&self.shared, &*self.arrived);
        match settlement {
            Settlement::Finished { response: answer, .. } => {
                let answer = answer.as_ref();
                if !answer.is_none_or(Closed::holds) {
                    shared.store_answer(&call.id, answer).await?;
                }
                let closed = Closed::ended(*sequence, status.clone(), answer);
                // Whoever has noted something else has made it as well.
                bundle.close(shared, slot, closed, false).await?;
            }
            Settlement::Retry { .. } => {
                let headers = Message::new(call).progressed(status, *sequence);
                bundle.move_out(shared, call, slot, headers).await?;
            }
            Settlement::DeadLetter { response: answer, .. } => {
                shared.store_answer(&call.id, answer.as_ref()).await?;
                if bundle.close(shared, slot, Closed::Moved, true).await? {
                    // It was no message of its own that could be there still.
                    let headers = Message::new(call).progressed(status, 0);
                    shared.server.put(self.subject(DEAD), headers, call.body.clone(), None).await?;
                    bundle.placed(shared, slot);
                }
            }
        }
        self.done().await;
        Ok(())
    }

    /// Stores the final state, with the answer in it if that is small.
    async fn end(&self, status: &CallRecord, answer: Option<&StoredResponse>) -> Result<(), Fault> {
        let (shared, arrived) = (&self.shared, &self.arrived);
        let small = answer.filter(|answer| answer.body.len() <= SMALL);
        if small.is_none() {
            Box::pin(shared.store_answer(&arrived.call.id, answer)).await?;
        }
        let end = End {
            sequence: arrived.sequence,
            status: status.clone(),
            answer: small.map(|answer| AnswerHead::of(answer, 0)),
        };
        let body = small.map_or_else(Bytes::new, |answer| answer.body.clone());
        let subject = self.subject(ENDS);
        shared.server.put(subject, end_headers(&end), body, None).await?;
        match arrived.message.dead_before() {
            Some(number) => {
                Box::pin(shared.server.delete(&shared.names.dead, number)).await.map(drop)
            }
            None => Ok(()),
        }
    }

    /// Has the message removed. Whoever is given it again, should this be lost, sees that it is over.
    async fn done(&self) {
        self.settled.store(true, Relaxed);
        self.shared.roll.release(&self.shared, self.hold, true);
        self.arrived.over(&self.shared).await;
    }
}

impl Shared {
    /// Stores `response`, or forgets the one that was there.
    pub(super) async fn store_answer(
        &self,
        id: &str,
        answer: Option<&StoredResponse>,
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
        let settled = self.settled.load(Relaxed);
        self.shared.roll.release(&self.shared, self.hold, settled);
        if self.stage.load(Relaxed) == BEGUN {
            self.shared.lines().unpick(self.line);
            self.shared.ready.notify_one();
        }
        self.release_slot();
        if settled {
            return;
        }
        let (shared, arrived) = (Arc::clone(&self.shared), Arc::clone(&self.arrived));
        let delay = match std::thread::panicking() {
            true => Some(
                AFTER_PANIC * (1 << (shared.panics.count(&arrived.call.id) - 1).min(DOUBLINGS)),
            ),
            false => self.delay,
        };
        self.shared.tasks.spawn_to_completion(async move { arrived.not_now(&shared, delay).await });
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Lease").field(&self.arrived.sequence).finish()
    }
}
