//! Messages that cannot be decoded: damaged ones, those of other programs, and those of newer gateways.
//!
//! Such a message becomes a dead letter with the reason, and keeps its headers and payload. The dead letter is stored
//! before the message is acknowledged. A message of a newer version is first left for a newer gateway: during a
//! rolling upgrade, old and new gateways receive from the same queue.
use std::sync::Arc;
use std::time::Duration;

use async_nats::Subject;
use async_nats::jetstream::AckKind;

use crate::call::UnixMillis;
use crate::jetstream::Shared;
use crate::jetstream::ack::send_ack;
use crate::jetstream::error::NatsError;
use crate::jetstream::location::DeadLetter;
use crate::jetstream::wire::message::Message;
use crate::jetstream::wire::subjects::{self, CallSubject, DEAD_LETTERS, Subjects};
use crate::now;
use crate::status::{CallRecord, CallState};
use gateway_base::function::Function;

/// Redelivery delay of a message that this gateway cannot handle now.
const REDELIVERY_DELAY: Duration = Duration::from_secs(60);
/// Number of deliveries of a message of a newer version, about one per [`REDELIVERY_DELAY`], before it becomes a dead
/// letter.
const MAX_NEWER_VERSION_DELIVERIES: u32 = 60;

/// A delivered message that cannot be decoded.
pub(super) struct RawMessage {
    pub(super) message: Message,
    pub(super) subject: Subject,
    pub(super) function: Function,
    pub(super) sequence: u64,
    /// Number of deliveries so far, to any process.
    pub(super) deliveries: u32,
    pub(super) stored_at: UnixMillis,
}

/// Why a message cannot be decoded.
pub(super) struct Reason {
    pub(super) text: String,
    /// A newer gateway may be able to decode the message.
    pub(super) newer: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Disposition {
    Redeliver,
    DeadLetter,
}

/// Decides what happens to a message that cannot be decoded.
fn disposition(newer: bool, deliveries: u32) -> Disposition {
    match newer {
        true if deliveries < MAX_NEWER_VERSION_DELIVERIES => Disposition::Redeliver,
        _ => Disposition::DeadLetter,
    }
}

impl RawMessage {
    /// Stores the message as a dead letter and acknowledges it, or leaves it for a newer gateway.
    pub(super) async fn reject(self, shared: &Arc<Shared>, reply: &str, reason: &Reason) {
        let Self { subject, function, sequence, deliveries, .. } = &self;
        let subject = subject.as_str();
        let ack = match disposition(reason.newer, *deliveries) {
            Disposition::Redeliver => {
                tracing::warn!(
                    sequence, subject, %function, deliveries, reason = reason.text,
                    "A queued message is left for a newer gateway"
                );
                AckKind::Nak(Some(REDELIVERY_DELAY))
            }
            Disposition::DeadLetter => match self.store_dead_letter(shared, &reason.text).await {
                Ok(()) => {
                    tracing::error!(
                        sequence, subject, %function, reason = reason.text,
                        "A queued message cannot be decoded and is a dead letter now"
                    );
                    AckKind::Ack
                }
                Err(error) => {
                    tracing::error!(
                        sequence, subject, %function, reason = reason.text, %error,
                        "A queued message cannot be decoded, nor stored as a dead letter yet"
                    );
                    AckKind::Nak(Some(REDELIVERY_DELAY))
                }
            },
        };
        send_ack(&shared.api, reply, ack).await;
        shared.call_available.notify_one();
    }

    /// Stores the dead letter, unless an earlier delivery has done so.
    async fn store_dead_letter(&self, shared: &Shared, reason: &str) -> Result<(), NatsError> {
        let (api, subjects) = (&shared.api, &shared.subjects);
        match api.get(&subjects.calls, self.sequence).await {
            // It was cancelled, or an earlier delivery was acknowledged.
            Ok(None) => return Ok(()),
            // Its headers may be unreadable, too.
            Ok(Some(_)) | Err(NatsError::UnexpectedResponse) => {}
            Err(error) => return Err(error),
        }
        for (id, subject) in self.letter_names(subjects) {
            let headers = self.message.undecodable_letter(
                &self.letter_record(id, reason),
                self.sequence,
                &self.subject,
            );
            let existing = api.get_last(&subjects.dead_letters, &subject).await?;
            let existing = existing.map(|found| (found.sequence, DeadLetter::new(found)));
            let replaces = match &existing {
                None => 0,
                Some((_, Some(letter))) if letter.previous_seq == self.sequence => return Ok(()),
                // The message is the redriven dead letter.
                Some((number, _)) if self.message.dead_letter_seq() == Some(*number) => *number,
                // The dead letter of another message with the same id.
                Some(_) => continue,
            };
            // A conflict means that another process does the same. The next delivery finds its dead letter.
            return api
                .publish(subject, headers, self.message.body.clone(), Some(replaces))
                .await
                .map(drop);
        }
        Err(NatsError::UnexpectedResponse)
    }

    /// Returns the ids and subjects that the dead letter may have: the id of the call or the key of the batch; if that
    /// is in use, the sequence.
    fn letter_names(&self, subjects: &Subjects) -> Vec<(String, String)> {
        let function = &self.function;
        let named = match subjects::batch_key(&self.subject) {
            Some(key) => Some((key.token(), subjects.batch(DEAD_LETTERS, function, key))),
            None => subjects::parse(&self.subject).map(|CallSubject { id, .. }| {
                let subject = subjects.call(DEAD_LETTERS, function, &id);
                (id, subject)
            }),
        };
        let id = subjects::letter_id(self.sequence);
        let by_sequence = subjects.letter(Some(function), &id).map(|subject| (id, subject));
        named.into_iter().chain(by_sequence).collect()
    }

    fn letter_record(&self, id: String, reason: &str) -> CallRecord {
        let before = self.message.stored_status();
        CallRecord {
            id,
            function: self.function.to_string(),
            state: CallState::Failed,
            attempts: before.map_or(0, |record| record.attempts),
            reason: Some(reason.to_owned()),
            submitted_at: self.stored_at,
            finished_at: Some(now()),
            // Unknown, so that knowing the id authorizes nothing.
            chosen_id: true,
            dead_letter: true,
            ..CallRecord::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_messages_of_newer_versions_are_redelivered() {
        for (newer, deliveries, expect) in [
            (false, 1, Disposition::DeadLetter),
            (true, 1, Disposition::Redeliver),
            (true, MAX_NEWER_VERSION_DELIVERIES - 1, Disposition::Redeliver),
            (true, MAX_NEWER_VERSION_DELIVERIES, Disposition::DeadLetter),
            (true, u32::MAX, Disposition::DeadLetter),
        ] {
            assert_eq!(disposition(newer, deliveries), expect, "{newer} {deliveries}");
        }
    }
}
