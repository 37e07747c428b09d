//! What is known of one call, and how it is changed from outside.
//!
//! A call's message comes first: while it is there, the call is not over, unless a final state names this very message.

use async_nats::HeaderMap;
use async_nats::jetstream::message::StreamMessage;
use bytes::{Bytes, BytesMut};

use crate::function::Function;
use crate::queue::Changed;
use crate::queue::jetstream::Shared;
use crate::queue::jetstream::message::{Claim, End, Message, answer_head, json};
use crate::queue::jetstream::server::Fault;
use crate::queue::jetstream::subject::{ANSWERS, CALLS, CLAIMS, DEAD, ENDS, Named, named, token};
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
    /// What the one who makes it says of it.
    running: Option<Status>,
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
        Some(Self { named, sequence, message, running: None })
    }

    fn status(self) -> Option<Status> {
        self.running.or_else(|| self.message.status())
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
            if let Some(waiting) = &mut waiting
                && let Some((_, claim)) = self.claim(&names.by_id(CLAIMS, id)).await?
                && claim.sequence == waiting.sequence
            {
                waiting.running = claim.running;
            }
            let (dead, end) = (names.by_id(DEAD, id), names.by_id(ENDS, id));
            let (dead, end) =
                tokio::try_join!(server.last(&names.dead, &dead), server.last(&names.notes, &end))?;
            let dead = dead.and_then(Dead::new);
            let end = end.and_then(|end| serde_json::from_slice::<End>(&end.payload).ok());
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
            Found::Waiting(waiting) => waiting.status(),
            Found::Dead(Dead { status, .. }) | Found::Ended(status) => Some(status),
        }))
    }

    /// The claim with that subject, and its number.
    pub(super) async fn claim(&self, subject: &str) -> Result<Option<(u64, Claim)>, Fault> {
        let found = self.server.last(&self.names.claims, subject).await?;
        Ok(found
            .and_then(|found| Some((found.sequence, serde_json::from_slice(&found.payload).ok()?))))
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
        let end = end.and_then(|end| serde_json::from_slice::<End>(&end.payload).ok());
        Ok(dead == Some(sequence) || end.is_some_and(|end| end.sequence == sequence))
    }

    pub(super) async fn answer(&self, id: &str) -> Result<Option<Answer>, Fault> {
        let part = |number: usize| self.names.part(ANSWERS, &token(id), number);
        let first = self.server.last(&self.names.notes, &part(0)).await?;
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
        let Waiting { named: Named { function, id }, sequence, message, .. } = waiting;
        let subject = self.names.call(CLAIMS, function, id);
        // From here on nobody takes it. One who has taken it has a claim of his own.
        let claim = json(&Claim { sequence: *sequence, running: None });
        let put = self.server.put(subject.clone(), HeaderMap::new(), claim.into(), Some(0)).await;
        let ours = match put {
            Ok(stored) => stored.sequence,
            Err(fault) if fault.is_conflict() => {
                let Some((number, claim)) = self.claim(&subject).await? else { return Ok(None) };
                if claim.sequence == *sequence && claim.running.is_some() {
                    return Ok(Some(Changed::No(State::Running)));
                }
                if claim.sequence != *sequence {
                    // Of an attempt that is over.
                    self.server.delete(&self.names.claims, number).await?;
                }
                return Ok(None);
            }
            Err(fault) => return Err(fault),
        };
        let changed = self.take_out(waiting, note).await;
        // It goes by itself otherwise.
        let _ = self.server.delete(&self.names.claims, ours).await;
        if matches!(changed, Ok(Some(Changed::Yes))) {
            self.forget_parts(message.parts().as_ref()).await;
        }
        changed
    }

    /// Takes out a call that is ours.
    async fn take_out(&self, waiting: &Waiting, note: bool) -> Result<Option<Changed>, Fault> {
        let Waiting { named: Named { function, id }, sequence, message, .. } = waiting;
        // Before it was ours, it may have been made.
        let subject = self.names.call(CALLS, function, id);
        let still = self.server.last(&self.names.calls, &subject).await?;
        if still.is_none_or(|still| still.sequence != *sequence)
            || self.is_over(function, id, *sequence).await?
        {
            return Ok(None);
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
        let end: Bytes = json(&End { sequence, status }).into();
        self.server.put(subject, HeaderMap::new(), end, None).await.map(drop)
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
                let status = waiting.status();
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
