//! What is known of one call, and how it is changed from outside.
//!
//! A call's message comes first: while it is there, the call is not over, unless a final state names this very message.

use std::time::Instant;

use async_nats::HeaderMap;
use async_nats::jetstream::message::StreamMessage;
use bytes::{Bytes, BytesMut};

use crate::function::Function;
use crate::queue::Changed;
use crate::queue::call::Millis;
use crate::queue::jetstream::Shared;
use crate::queue::jetstream::message::{self, End, Message, answer_head, end_headers};
use crate::queue::jetstream::roll::HEEDED;
use crate::queue::jetstream::server::Fault;
use crate::queue::jetstream::subject::{ANSWERS, CALLS, DEAD, ENDS, Named, named, token};
use crate::queue::now;
use crate::queue::status::{Answer, State, Status};

/// So often one looks again when a call is on its way from one place to another.
const LOOKS: usize = 3;

/// Where a call is.
pub(super) enum Found {
    /// It is not over.
    Waiting(Waiting),
    Dead(Dead),
    Ended(Status),
}

/// A call whose message is there.
pub(super) struct Waiting {
    pub(super) named: Named,
    pub(super) sequence: u64,
    pub(super) message: Message,
    /// Since when it is made.
    since: Option<Millis>,
}

/// A call that failed for good.
pub(super) struct Dead {
    pub(super) status: Status,
    pub(super) message: Message,
    pub(super) number: u64,
    /// The number of the message that it was.
    pub(super) was: u64,
}

impl Waiting {
    pub(super) fn new(found: StreamMessage) -> Option<Self> {
        let message = Message::stored(found.headers, found.payload);
        let (named, sequence) = (named(&found.subject)?, found.sequence);
        Some(Self { named, sequence, message, since: None })
    }

    /// Its state, if it is made since then.
    pub(super) fn status(&self, since: Option<Millis>) -> Option<Status> {
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
    /// Where the call with `id` is. What is written last is read first, so that a call on its way from one place to
    /// another is seen at one of them. A server that was killed may have forgotten that a message was removed: the
    /// numbers tell what came after what.
    pub(super) async fn find(&self, id: &str) -> Result<Option<Found>, Fault> {
        let (server, names) = (&self.server, &self.names);
        for _ in 0..LOOKS {
            let waiting = server.last(&names.calls, &names.by_id(CALLS, id)).await?;
            let mut waiting = waiting.and_then(Waiting::new);
            if let Some(waiting) = &mut waiting {
                waiting.since = self.runs().await?.get(&waiting.sequence).copied();
            }
            let (dead, end) = (names.by_id(DEAD, id), names.by_id(ENDS, id));
            let (dead, end) =
                tokio::try_join!(server.last(&names.dead, &dead), server.last(&names.notes, &end))?;
            let dead = dead.and_then(Dead::new);
            let end = end.and_then(|end| message::end(&end.headers));
            let latest = [
                waiting.as_ref().map_or(0, |it| it.sequence),
                dead.as_ref().map_or(0, |it| it.was),
                end.as_ref().map_or(0, |it| it.sequence),
            ];
            let latest = latest.into_iter().max().unwrap_or(0);
            if let Some(dead) = dead.filter(|dead| dead.was == latest) {
                return Ok(Some(Found::Dead(dead)));
            }
            if let Some(end) = end.filter(|end| end.sequence == latest) {
                return Ok(Some(Found::Ended(end.status)));
            }
            if let Some(waiting) = waiting {
                return Ok(Some(Found::Waiting(waiting)));
            }
        }
        Ok(None)
    }

    pub(super) async fn status(&self, id: &str) -> Result<Option<Status>, Fault> {
        Ok(self.find(id).await?.and_then(|found| match found {
            Found::Waiting(waiting) => waiting.status(waiting.since),
            Found::Dead(Dead { status, .. }) | Found::Ended(status) => Some(status),
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

    pub(super) async fn answer(&self, id: &str) -> Result<Option<Answer>, Fault> {
        let part = |number: usize| self.names.part(ANSWERS, &token(id), number);
        let (server, notes) = (&self.server, &self.names.notes);
        let (end, first) = (self.names.by_id(ENDS, id), part(0));
        let (end, first) = tokio::try_join!(server.last(notes, &end), server.last(notes, &first))?;
        if let Some(found) = end
            && let Some(head) = message::end(&found.headers).and_then(|end| end.answer)
        {
            return Ok(Some(head.with(found.payload)));
        }
        let Some(first) = first else { return Ok(None) };
        let Some(head) = answer_head(&first.headers) else { return Ok(None) };
        if head.parts <= 1 {
            return Ok(Some(head.with(first.payload)));
        }
        let mut body = BytesMut::from(&first.payload[..]);
        for number in 1..head.parts {
            let next = self.server.last(&self.names.notes, &part(number)).await?;
            let Some(next) = next else { return Ok(None) };
            body.extend_from_slice(&next.payload);
        }
        Ok(Some(head.with(body.freeze())))
    }

    pub(super) async fn cancel(&self, id: &str) -> Result<Changed, Fault> {
        for _ in 0..LOOKS {
            match self.find(id).await? {
                None => return Ok(Changed::Unknown),
                Some(Found::Ended(status)) => return Ok(Changed::No(status.state)),
                Some(Found::Dead(Dead { status, message, number, was })) => {
                    let Some(function) = Function::parse(&status.function, "") else { break };
                    self.put_end(&function, cancelled(status), was).await?;
                    self.server.delete(&self.names.dead, number).await?;
                    self.forget_answer(id).await?;
                    self.forget_parts(message.parts().as_ref()).await;
                    return Ok(Changed::Yes);
                }
                Some(Found::Waiting(waiting)) => {
                    if let Some(changed) = self.withdraw(&waiting, true).await? {
                        return Ok(changed);
                    }
                }
            }
        }
        Ok(Changed::No(State::Running))
    }

    /// Takes a call out that waits, with a note of it or without; `None` if it has moved meanwhile.
    pub(super) async fn withdraw(
        &self,
        waiting: &Waiting,
        note: bool,
    ) -> Result<Option<Changed>, Fault> {
        let (server, sequence) = (&self.server, waiting.sequence);
        let start = Instant::now();
        // From here on nobody begins it. One who had begun it before has it on his list.
        let mark = server.put(self.names.mark(sequence), HeaderMap::new(), Bytes::new(), Some(0));
        let mark = match mark.await {
            Ok(stored) => stored.sequence,
            // Somebody else takes it back, or has done so.
            Err(fault) if fault.is_conflict() => return Ok(None),
            Err(fault) => return Err(fault),
        };
        let changed = match self.runs().await {
            Ok(runs) if runs.contains_key(&sequence) => Ok(Some(Changed::No(State::Running))),
            Ok(_) => self.take_out(waiting, note, start).await,
            Err(fault) => Err(fault),
        };
        if matches!(changed, Ok(Some(Changed::Yes))) {
            // The mark stays, for those who have been given the call but not begun it.
            self.forget_parts(waiting.message.parts().as_ref()).await;
        } else {
            // It goes by itself otherwise.
            let _ = server.delete(&self.names.claims, mark).await;
        }
        changed
    }

    /// Takes out a call that was marked after `start`.
    async fn take_out(
        &self,
        waiting: &Waiting,
        note: bool,
        start: Instant,
    ) -> Result<Option<Changed>, Fault> {
        let Waiting { named: Named { function, id }, sequence, message, .. } = waiting;
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
        if note && let Some(status) = message.status() {
            self.put_end(function, cancelled(status), *sequence).await?;
        }
        if let Ok(Some(key)) = message.call().map(|call| call.options.idempotency_key) {
            self.remember(&key, id).await?;
        }
        self.server.delete(&self.names.calls, *sequence).await?;
        Ok(Some(Changed::Yes))
    }

    async fn put_end(
        &self,
        function: &Function,
        status: Status,
        sequence: u64,
    ) -> Result<(), Fault> {
        let subject = self.names.call(ENDS, function, &status.id);
        let headers = end_headers(&End { sequence, status, answer: None });
        self.server.put(subject, headers, Bytes::new(), None).await.map(drop)
    }

    pub(super) async fn forget_answer(&self, id: &str) -> Result<(), Fault> {
        let subject = self.names.part(ANSWERS, &token(id), "*");
        self.server.purge(&self.names.notes, &subject).await
    }

    pub(super) async fn revive(&self, id: &str) -> Result<Changed, Fault> {
        let Dead { status, message, number, was } = match self.find(id).await? {
            None => return Ok(Changed::Unknown),
            Some(Found::Ended(status)) => return Ok(Changed::No(status.state)),
            Some(Found::Waiting(waiting)) => {
                let status = waiting.status(waiting.since);
                return Ok(status.map_or(Changed::Unknown, |status| Changed::No(status.state)));
            }
            Some(Found::Dead(dead)) => dead,
        };
        let Some(function) = Function::parse(&status.function, "") else {
            return Ok(Changed::Unknown);
        };
        self.consumer(&function).await?;
        // The message that it was may be there still: who settled it did not come so far, or the server forgot.
        self.server.delete(&self.names.calls, was).await?;
        let subject = self.names.call(CALLS, &function, id);
        let put = self.server.put(subject, message.fresh(), message.body.clone(), Some(0)).await;
        match put {
            Ok(_) => {}
            // Somebody else was faster.
            Err(fault) if fault.is_conflict() => return Ok(Changed::No(State::Queued)),
            Err(fault) => return Err(fault),
        }
        self.forget_answer(id).await?;
        self.server.delete(&self.names.dead, number).await?;
        Ok(Changed::Yes)
    }
}

fn cancelled(status: Status) -> Status {
    Status {
        state: State::Cancelled,
        finished_at: Some(now()),
        next_attempt_at: None,
        dead: false,
        ..status
    }
}
