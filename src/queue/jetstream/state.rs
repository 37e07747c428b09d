//! What is known of one call, and how it is changed from outside.
//!
//! A call's message comes first: while it is there, the call is not over, unless a final state names this very message.

use std::time::{Duration, Instant};

use async_nats::HeaderMap;
use async_nats::jetstream::message::StreamMessage;
use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, TryStreamExt, stream};

use crate::function::Function;
use crate::queue::ChangeOutcome;
use crate::queue::call::UnixMillis;
use crate::queue::jetstream::bundle::{Place, Slot};
use crate::queue::jetstream::ids::Key;
use crate::queue::jetstream::message::{self, End, Message, answer_head, end_headers};
use crate::queue::jetstream::parts::LARGEST;
use crate::queue::jetstream::roll::HEEDED;
use crate::queue::jetstream::server::Fault;
use crate::queue::jetstream::subject::{self, ANSWERS, CALLS, DEAD, ENDS, Named, named, token};
use crate::queue::jetstream::together::Among;
use crate::queue::jetstream::unpack::Which;
use crate::queue::jetstream::{Shared, ids};
use crate::queue::now;
use crate::queue::status::{CallRecord, CallState, StoredResponse};

/// So many functions at most are looked at for one call.
const MANY: usize = 32;
/// So long the list of functions is good enough.
const FUNCTIONS: Duration = Duration::from_secs(1);
/// So long one waits for one's turn to search.
const TURN: Duration = Duration::from_secs(1);
/// So many calls can be searched without anybody noticing.
const FEW: u64 = 10_000;
/// So often one looks again when a call is on its way from one place to another.
const LOOKS: usize = 3;

/// Where a call is.
pub(super) enum Found {
    /// It is not over.
    Waiting(Waiting),
    Dead(Dead),
    Ended(Ended),
}

/// A call that is over.
pub(super) struct Ended {
    pub(super) end: End,
    /// That of its answer, if it is small.
    pub(super) body: Bytes,
    /// In which message it was, where that had others.
    pub(super) among: Option<(Which, Slot)>,
}

/// A call whose message is there.
pub(super) struct Waiting {
    pub(super) named: Named,
    pub(super) sequence: u64,
    pub(super) message: Message,
    /// Since when it is made.
    pub(super) since: Option<UnixMillis>,
    /// Which of the calls in its message it is, where that has others.
    pub(super) among: Option<(Which, Slot)>,
}

/// A call that failed for good.
pub(super) struct Dead {
    pub(super) status: CallRecord,
    pub(super) message: Message,
    pub(super) number: u64,
    /// The number of the message that it was.
    pub(super) was: u64,
}

impl Found {
    /// Its state, as far as its record tells it.
    pub(super) fn status(&self) -> Option<CallRecord> {
        match self {
            Self::Waiting(waiting) => waiting.status(None),
            Self::Dead(dead) => Some(dead.status.clone()),
            Self::Ended(ended) => Some(ended.end.status.clone()),
        }
    }
}

impl Waiting {
    /// `None` if the message is not that of one call.
    pub(super) fn new(found: StreamMessage) -> Option<Self> {
        if subject::key(&found.subject).is_some() {
            return None;
        }
        let message = Message::stored(found.headers, found.payload);
        let (named, sequence) = (named(&found.subject)?, found.sequence);
        Some(Self { named, sequence, message, since: None, among: None })
    }

    pub(super) fn slot(&self) -> Option<Slot> {
        self.among.as_ref().map(|(_, slot)| *slot)
    }

    pub(super) fn place(&self) -> Place {
        Place { sequence: self.sequence, slot: self.slot() }
    }

    /// Its state, if it is made since then.
    pub(super) fn status(&self, since: Option<UnixMillis>) -> Option<CallRecord> {
        match since {
            Some(since) => Some(self.message.running(&self.message.call().ok()?, since)),
            None => self.message.status(),
        }
    }
}

impl Dead {
    pub(super) fn new(found: StreamMessage) -> Option<Self> {
        let message = Message::stored(found.headers, found.payload);
        let (status, was) = (message.progress()?, message.was().unwrap_or(0));
        Some(Self { status, message, number: found.sequence, was })
    }
}

impl Shared {
    /// Where the call with `id` is.
    pub(super) async fn find(&self, id: &str) -> Result<Option<Found>, Fault> {
        let of_id = ids::may_be_of(id);
        let may_be = |function: &Function| of_id.as_ref().is_none_or(|may_be| may_be(function));
        let mut seen = Vec::new();
        // Others may have made a consumer since the functions were looked for.
        for age in [FUNCTIONS, Duration::ZERO] {
            let (functions, asked) = self.functions(age).await?;
            let new: Vec<_> = functions
                .into_iter()
                .filter(|function| may_be(function) && !seen.contains(function))
                .collect();
            if new.len() > MANY {
                return self.search(id).await;
            }
            let found = stream::iter(new.clone())
                .map(|function| async move { self.find_in(Some(&function), id).await })
                .buffer_unordered(MANY)
                .try_filter_map(|found| std::future::ready(Ok(found)));
            if let Some(found) = std::pin::pin!(found).try_next().await? {
                return Ok(Some(found));
            }
            if asked {
                break;
            }
            seen.extend(new);
        }
        // Its consumer may have been removed. Where there is little to look at, that is done.
        let few = self.server.messages(&self.names.calls).await? <= FEW
            && self.server.messages(&self.names.notes).await? <= FEW;
        if few { self.search(id).await } else { Ok(None) }
    }

    /// Where the call with `id` is, of which nothing else is known.
    async fn search(&self, id: &str) -> Result<Option<Found>, Fault> {
        let turn = tokio::time::timeout(TURN, self.searching.acquire()).await;
        let _turn = turn.map_err(|_| Fault::Away)?;
        self.find_in(None, id).await
    }

    /// Where the call of `function` with `id` is.
    pub(super) async fn find_in(
        &self,
        function: Option<&Function>,
        id: &str,
    ) -> Result<Option<Found>, Fault> {
        let Some(key) = Key::of(id) else { return self.find_alone(function, id).await };
        let moving = match Box::pin(self.find_among(function, key, id)).await? {
            Among::Found(found) => return Ok(Some(found)),
            Among::Gone => return Ok(None),
            Among::Moved(moving) => moving,
            Among::Nowhere => None,
        };
        let alone = self.find_alone(function, id).await?;
        Ok(alone.or(moving.map(Found::Waiting)))
    }

    /// The same of one whose message has no others. What is written last is read first, so that a call on its way from
    /// one place to another is seen at one of them. A server that was killed may have forgotten that a message was
    /// removed: the numbers tell what came after what.
    pub(super) async fn find_alone(
        &self,
        function: Option<&Function>,
        id: &str,
    ) -> Result<Option<Found>, Fault> {
        let (server, names) = (&self.server, &self.names);
        let subject = |root| match function {
            Some(function) => names.call(root, function, id),
            None => names.by_id(root, id),
        };
        // Once more, as it may have come back to where was looked first.
        for _ in 0..2 {
            let waiting = server.last(&names.calls, &subject(CALLS)).await?;
            let mut waiting = waiting.and_then(Waiting::new);
            if let Some(waiting) = &mut waiting {
                waiting.since = self.runs().await?.get(&waiting.place()).copied();
            }
            let (dead, end) = (subject(DEAD), subject(ENDS));
            let (dead, end) =
                tokio::try_join!(server.last(&names.dead, &dead), server.last(&names.notes, &end))?;
            let dead = dead.and_then(Dead::new);
            let end = end.and_then(|found| Some((message::end(&found.headers)?, found.payload)));
            let latest = [
                waiting.as_ref().map_or(0, |it| it.sequence),
                dead.as_ref().map_or(0, |it| it.was),
                end.as_ref().map_or(0, |(it, _)| it.sequence),
            ];
            let latest = latest.into_iter().max().unwrap_or(0);
            if let Some(dead) = dead.filter(|dead| dead.was == latest) {
                return Ok(Some(Found::Dead(dead)));
            }
            if let Some((end, body)) = end.filter(|(end, _)| end.sequence == latest) {
                let kept = self.is_kept(&end.status);
                return Ok(kept.then_some(Found::Ended(Ended { end, body, among: None })));
            }
            if let Some(waiting) = waiting {
                return Ok(Some(Found::Waiting(waiting)));
            }
        }
        Ok(None)
    }

    /// Whether a final state is still to be shown.
    pub(super) fn is_kept(&self, status: &CallRecord) -> bool {
        let kept = self.options.limits.result_ttl;
        status.finished_at.is_none_or(|at| at.saturating_add(kept) > now())
    }

    pub(super) async fn status(&self, id: &str) -> Result<Option<CallRecord>, Fault> {
        Ok(self.find(id).await?.and_then(|found| match found {
            Found::Waiting(waiting) => waiting.status(waiting.since),
            Found::Dead(Dead { status, .. })
            | Found::Ended(Ended { end: End { status, .. }, .. }) => Some(status),
        }))
    }

    /// Whether the call that the message `sequence` is has been settled for good.
    pub(super) async fn is_over(
        &self,
        function: &Function,
        id: &str,
        sequence: u64,
    ) -> Result<bool, Fault> {
        let (server, names) = (&self.server, &self.names);
        let (dead, end) = (names.call(DEAD, function, id), names.call(ENDS, function, id));
        let (dead, end) =
            tokio::try_join!(server.last(&names.dead, &dead), server.last(&names.notes, &end))?;
        let dead = dead.and_then(Dead::new).map(|dead| dead.was);
        let end = end.and_then(|end| message::end(&end.headers));
        Ok(dead == Some(sequence) || end.is_some_and(|end| end.sequence == sequence))
    }

    pub(super) async fn answer(&self, id: &str) -> Result<Option<StoredResponse>, Fault> {
        let part = |number: usize| self.names.part(ANSWERS, &token(id), number);
        let first = match self.find(id).await? {
            None | Some(Found::Waiting(_)) => return Ok(None),
            Some(Found::Ended(Ended { end: End { answer: Some(head), .. }, body, .. })) => {
                return Ok(Some(head.with(body)));
            }
            Some(_) => self.server.last(&self.names.notes, &part(0)).await?,
        };
        let Some(first) = first else { return Ok(None) };
        let Some(head) = answer_head(&first.headers) else { return Ok(None) };
        if head.parts <= 1 {
            return Ok(Some(head.with(first.payload)));
        }
        let mut body = BytesMut::from(&first.payload[..]);
        for number in 1..head.parts {
            let next = self.server.last(&self.names.notes, &part(number)).await?;
            let next = next.filter(|next| body.len() + next.payload.len() <= LARGEST);
            let Some(next) = next else { return Ok(None) };
            body.extend_from_slice(&next.payload);
        }
        Ok(Some(head.with(body.freeze())))
    }

    pub(super) async fn cancel(&self, id: &str) -> Result<ChangeOutcome, Fault> {
        let mut tried_again = false;
        for _ in 0..LOOKS {
            match self.find(id).await? {
                None => return Ok(ChangeOutcome::NotFound),
                Some(Found::Ended(Ended { end, .. }))
                    if tried_again && end.status.state == CallState::Cancelled =>
                {
                    return Ok(ChangeOutcome::Applied);
                }
                Some(Found::Ended(Ended { end, .. })) => {
                    return Ok(ChangeOutcome::WrongState(end.status.state));
                }
                Some(Found::Dead(dead)) => {
                    if self.drop_dead(id, dead, true).await? {
                        return Ok(ChangeOutcome::Applied);
                    }
                    tried_again = true;
                }
                // Whoever took it back did not come to the end of that.
                Some(Found::Waiting(waiting)) if waiting.message.is_taken_back() => {
                    self.finish_off(&waiting.named, &waiting.message, waiting.sequence).await?;
                    return Ok(ChangeOutcome::Applied);
                }
                Some(Found::Waiting(waiting)) => {
                    if let Some(changed) = self.withdraw(&waiting, true).await? {
                        return Ok(changed);
                    }
                }
            }
        }
        Ok(ChangeOutcome::WrongState(CallState::Running))
    }

    /// Takes a call out that waits, with a note of it or without; `None` if it has moved meanwhile.
    pub(super) async fn withdraw(
        &self,
        waiting: &Waiting,
        note: bool,
    ) -> Result<Option<ChangeOutcome>, Fault> {
        let (server, place) = (&self.server, waiting.place());
        let start = Instant::now();
        // From here on nobody begins it. One who had begun it before has it on his list.
        let mark = server.put(self.names.mark(place), HeaderMap::new(), Bytes::new(), Some(0));
        let mark = match mark.await {
            Ok(stored) => stored.sequence,
            // Somebody else takes it back, or has done so.
            Err(fault) if fault.is_conflict() => return Ok(None),
            Err(fault) => return Err(fault),
        };
        let changed = match self.runs().await {
            Ok(runs) if runs.contains_key(&place) => {
                Ok(Some(ChangeOutcome::WrongState(CallState::Running)))
            }
            Ok(_) => self.take_out(waiting, note, start).await,
            Err(fault) => Err(fault),
        };
        match changed {
            // The mark stays, for those who have been given the call but not begun it.
            Ok(Some(ChangeOutcome::Applied)) => {
                self.forget_parts(waiting.message.parts().as_ref()).await
            }
            // It goes by itself otherwise.
            Ok(_) => drop(server.delete(&self.names.claims, mark).await),
            // The call may be taken back all the same.
            Err(_) => {}
        }
        changed
    }

    /// Takes out a call that was marked after `start`.
    async fn take_out(
        &self,
        waiting: &Waiting,
        note: bool,
        start: Instant,
    ) -> Result<Option<ChangeOutcome>, Fault> {
        let Waiting { named: Named { function, id }, sequence, message, .. } = waiting;
        if let Some((which, slot)) = &waiting.among {
            let status = message.status().filter(|_| note).map(cancelled);
            let closed = self.close_among(which, *slot, status, start + HEEDED / 2).await?;
            return Ok(closed.then_some(ChangeOutcome::Applied));
        }
        // Before it was ours, it may have been made.
        let subject = self.names.call(CALLS, function, id);
        let still = self.server.last(&self.names.calls, &subject).await?;
        if still.is_none_or(|still| still.sequence != *sequence)
            || self.is_over(function, id, *sequence).await?
        {
            return Ok(None);
        }
        if start.elapsed() > HEEDED / 2 {
            // The mark could go before we are done.
            return Err(Fault::Away);
        }
        let status = match message.status() {
            Some(status) if note => status,
            _ => {
                self.server.delete(&self.names.calls, *sequence).await?;
                return Ok(Some(ChangeOutcome::Applied));
            }
        };
        // One step, behind which nobody makes the call, whatever becomes of us. The rest can be done by anybody.
        let headers = message.taken_back(&cancelled(status), *sequence);
        let put = self.server.put(subject, headers.clone(), Bytes::new(), Some(*sequence)).await;
        let stored = match put {
            Ok(stored) => stored.sequence,
            Err(fault) if fault.is_conflict() => return Ok(None),
            Err(fault) => return Err(fault),
        };
        let message = Message::stored(headers, Bytes::new());
        if let Err(error) = self.finish_off(&waiting.named, &message, stored).await {
            tracing::warn!(%error, call_id = id, "A call was cancelled, but is not gone yet");
        }
        Ok(Some(ChangeOutcome::Applied))
    }

    /// Removes the message of a call that was taken back, and notes its final state.
    pub(super) async fn finish_off(
        &self,
        named: &Named,
        message: &Message,
        sequence: u64,
    ) -> Result<(), Fault> {
        let Some(status) = message.progress() else { return Ok(()) };
        self.put_end(&named.function, status, sequence).await?;
        if let Ok(Some(key)) = message.call().map(|call| call.options.idempotency_key) {
            self.remember(&key, &named.function, &named.id).await?;
        }
        self.server.delete(&self.names.calls, sequence).await.map(drop)
    }

    async fn put_end(
        &self,
        function: &Function,
        status: CallRecord,
        sequence: u64,
    ) -> Result<(), Fault> {
        self.put_end_over(function, status, sequence, None).await
    }

    /// Stores a final state, with `last` only if the one before has that number.
    pub(super) async fn put_end_over(
        &self,
        function: &Function,
        status: CallRecord,
        sequence: u64,
        last: Option<u64>,
    ) -> Result<(), Fault> {
        let subject = self.names.call(ENDS, function, &status.id);
        let headers = end_headers(&End { sequence, status, answer: None });
        self.server.put(subject, headers, Bytes::new(), last).await.map(drop)
    }

    /// The number of the last part of the answer that is kept of a call, if one is kept beside its final state.
    pub(super) async fn answer_at(&self, id: &str) -> Result<Option<u64>, Fault> {
        let first = self.names.part(ANSWERS, &token(id), 0);
        Ok(self.server.last(&self.names.notes, &first).await?.map(|found| found.sequence))
    }

    /// Removes an answer, and none that came after it.
    pub(super) async fn forget_answer(&self, id: &str, answer: Option<u64>) -> Result<(), Fault> {
        // To purge, the server looks at every subject.
        let Some(answer) = answer else { return Ok(()) };
        let parts = self.names.part(ANSWERS, &token(id), "*");
        self.server.purge(&self.names.notes, &parts, answer).await
    }
}

pub(super) fn cancelled(status: CallRecord) -> CallRecord {
    CallRecord {
        state: CallState::Cancelled,
        finished_at: Some(now()),
        next_attempt_at: None,
        dead_letter: false,
        ..status
    }
}
