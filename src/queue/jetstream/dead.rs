//! Calls that failed for good: they are dropped, or tried again.

use crate::function::Function;
use crate::queue::ChangeOutcome;
use crate::queue::jetstream::Shared;
use crate::queue::jetstream::server::Fault;
use crate::queue::jetstream::state::{Dead, Ended, Found, cancelled};
use crate::queue::jetstream::subject::{CALLS, ENDS};
use crate::queue::status::CallState;

impl Shared {
    /// Drops a dead call, with a note of it or without; `false` if somebody else has dropped it or tries it again.
    pub(super) async fn drop_dead(&self, id: &str, dead: Dead, note: bool) -> Result<bool, Fault> {
        let Dead { status, message, number, was } = dead;
        let Some(function) = Function::parse(&status.function, "") else { return Ok(false) };
        let (server, names) = (&self.server, &self.names);
        let (answer, ends) = (self.answer_at(id).await?, names.call(ENDS, &function, id));
        let end = server.last(&names.notes, &ends).await?.map_or(0, |end| end.sequence);
        if server.at(&names.dead, number).await?.is_none() {
            return Ok(false);
        }
        if note {
            let end = self.put_end_over(&function, cancelled(status), was, Some(end)).await;
            match end {
                Ok(()) => {}
                // It was tried again, and is over.
                Err(fault) if fault.is_conflict() => return Ok(false),
                Err(fault) => return Err(fault),
            }
        }
        // The message that it was may be there still: who settled it did not come so far, or the server forgot.
        self.remove_what_was(was).await?;
        // One who tries it again needs its body.
        if !server.delete(&names.dead, number).await? {
            return Ok(false);
        }
        // One who tries it again stores it before he removes the dead one, and takes it back if that was done by others.
        if server.last(&names.calls, &names.call(CALLS, &function, id)).await?.is_some() {
            return Ok(false);
        }
        if !note && end > 0 {
            server.delete(&names.notes, end).await?;
        }
        self.forget_answer(id, answer).await?;
        self.forget_parts(message.parts().as_ref()).await;
        Ok(true)
    }

    pub(super) async fn revive(&self, id: &str) -> Result<ChangeOutcome, Fault> {
        let Dead { status, message, number, was } = match self.find(id).await? {
            None => return Ok(ChangeOutcome::NotFound),
            Some(Found::Ended(Ended { end, .. })) => {
                return Ok(ChangeOutcome::WrongState(end.status.state));
            }
            Some(Found::Waiting(waiting)) => {
                let status = waiting.status(waiting.since);
                return Ok(status.map_or(ChangeOutcome::NotFound, |status| {
                    ChangeOutcome::WrongState(status.state)
                }));
            }
            Some(Found::Dead(dead)) => dead,
        };
        let Some(function) = Function::parse(&status.function, "") else {
            return Ok(ChangeOutcome::NotFound);
        };
        self.consumer(&function).await?;
        // The message that it was may be there still: who settled it did not come so far, or the server forgot.
        self.remove_what_was(was).await?;
        let subject = self.names.call(CALLS, &function, id);
        let answer = self.answer_at(id).await?;
        if self.server.at(&self.names.dead, number).await?.is_none() {
            // Somebody else was faster, and it may be over again.
            let status = self.status(id).await?;
            return Ok(status.map_or(ChangeOutcome::NotFound, |status| {
                ChangeOutcome::WrongState(status.state)
            }));
        }
        let (headers, body) = (message.revived(number), message.body.clone());
        let stored = match self.server.put(subject, headers, body, Some(0)).await {
            Ok(stored) => stored.sequence,
            // Somebody else was faster.
            Err(fault) if fault.is_conflict() => {
                return Ok(ChangeOutcome::WrongState(CallState::Queued));
            }
            Err(fault) => return Err(fault),
        };
        // It is tried again, whatever becomes of the rest. When it is over, what says that it is dead goes at the latest.
        let rest = async {
            self.forget_answer(id, answer).await?;
            self.server.delete(&self.names.dead, number).await
        };
        match rest.await {
            Ok(true) => {}
            // It was dropped meanwhile, perhaps with its body, or is over already.
            Ok(false) => {
                if self.server.delete(&self.names.calls, stored).await? {
                    self.forget_parts(message.parts().as_ref()).await;
                    return Ok(ChangeOutcome::WrongState(CallState::Cancelled));
                }
            }
            Err(error) => {
                tracing::warn!(%error, call_id = id, "A dead call is tried again, but counts as dead for now");
            }
        }
        Ok(ChangeOutcome::Applied)
    }

    /// Removes the message that a dead call was, if it had one of its own.
    async fn remove_what_was(&self, was: u64) -> Result<(), Fault> {
        match was {
            0 => Ok(()),
            was => self.server.delete(&self.names.calls, was).await.map(drop),
        }
    }
}
