//! What became of a queued call. No I/O.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::queue::call::{DecodeError, QueuedCall, UnixMillis};

/// Where a call is on its way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CallState {
    /// Waits for its turn, or for its time.
    #[default]
    Queued,
    Running,
    /// Has failed and will be tried again.
    Retrying,
    Succeeded,
    /// Will not be tried again by itself.
    Failed,
    Cancelled,
}

impl CallState {
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

/// The state of a call.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallRecord {
    pub id: String,
    /// `NAME.NAMESPACE`
    pub function: String,
    pub state: CallState,
    /// How often it has been made.
    #[serde(default)]
    pub attempts: u32,
    /// What the function said last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// Why there is none, or what else is to be said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    pub submitted_at: UnixMillis,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<UnixMillis>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<UnixMillis>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_attempt_at: Option<UnixMillis>,
    /// The caller chose the id, so that knowing it proves nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub chosen_id: bool,
    /// It failed for good and is kept: it can be tried again on request.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dead_letter: bool,
    /// Tells the call from others under the same id; not known of calls that an older gateway took in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

/// The stored answer of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredResponse {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Bytes,
    /// The body was larger than is kept.
    pub truncated: bool,
}

/// How a call that was taken goes on.
#[derive(Clone, Debug)]
pub enum Settlement {
    /// It is over. Its state, and its answer if there is one, can be asked for a while.
    Finished {
        state: CallState,
        status: Option<u16>,
        reason: Option<String>,
        response: Option<StoredResponse>,
        /// `false`: it was over before this attempt, which does not count.
        executed: bool,
    },
    /// It is tried again, not before `at`.
    Retry { at: UnixMillis, status: Option<u16>, reason: Option<String> },
    /// It has failed for good, and is kept until somebody decides.
    DeadLetter { status: Option<u16>, reason: Option<String>, response: Option<StoredResponse> },
}

impl Settlement {
    /// The same without the answer, which is too large to be kept.
    #[must_use]
    pub fn without_response(self) -> Self {
        const TOO_LARGE: &str = "the answer is too large for the queue to keep";
        let note = |reason: Option<String>| {
            Some(reason.map_or_else(|| TOO_LARGE.to_owned(), |it| format!("{it}; {TOO_LARGE}")))
        };
        match self {
            Self::Finished { state, status, reason, executed: made, response: Some(_) } => {
                Self::Finished {
                    state,
                    status,
                    reason: note(reason),
                    executed: made,
                    response: None,
                }
            }
            Self::DeadLetter { status, reason, response: Some(_) } => {
                Self::DeadLetter { status, reason: note(reason), response: None }
            }
            other => other,
        }
    }

    /// How long the body of the answer is that it holds.
    pub fn response_length(&self) -> usize {
        match self {
            Self::Finished { response: answer, .. } | Self::DeadLetter { response: answer, .. } => {
                answer.as_ref().map_or(0, |answer| answer.body.len())
            }
            Self::Retry { .. } => 0,
        }
    }

    /// Whether it holds an answer.
    pub fn has_response(&self) -> bool {
        match self {
            Self::Finished { response: answer, .. } | Self::DeadLetter { response: answer, .. } => {
                answer.is_some()
            }
            Self::Retry { .. } => false,
        }
    }

    /// The state that it leads to, and the function's answer.
    pub fn outcome(&self) -> (CallState, Option<u16>) {
        match self {
            Self::Finished { state, status, .. } => (*state, *status),
            Self::Retry { status, .. } => (CallState::Retrying, *status),
            Self::DeadLetter { status, .. } => (CallState::Failed, *status),
        }
    }
}

impl CallRecord {
    /// The status of a call that has not been made yet.
    pub fn queued(call: &QueuedCall) -> Self {
        Self {
            id: call.id.clone(),
            function: call.function.to_string(),
            submitted_at: call.options.submitted_at,
            next_attempt_at: call.options.not_before,
            chosen_id: call.options.chosen_id,
            digest: call.options.digest.clone(),
            ..Self::default()
        }
    }

    /// Whether a call under the same id is this one once more, and not another.
    pub fn is_same_call(&self, function: &str, digest: Option<&str>) -> bool {
        let known = self.digest.as_deref().zip(digest);
        self.function == function && known.is_none_or(|(first, second)| first == second)
    }

    /// The status of a stored call that has not been made yet.
    ///
    /// # Errors
    /// When `stored` holds no call.
    pub fn from_stored(stored: &[u8]) -> Result<Self, DecodeError> {
        Ok(Self::queued(&QueuedCall::decode_without_body(stored)?))
    }

    /// What the status of a running call becomes when it is settled at `now`.
    #[must_use]
    pub fn settled(mut self, settlement: &Settlement, now: UnixMillis) -> Self {
        match settlement {
            Settlement::Finished { state, status, reason, executed: made, .. } => {
                (self.state, self.finished_at) = (*state, Some(now));
                self.reason.clone_from(reason);
                if *made {
                    self.status = *status;
                } else {
                    self.attempts = self.attempts.saturating_sub(1);
                    self.started_at = self.started_at.filter(|_| self.attempts > 0);
                }
            }
            Settlement::Retry { at, status, reason } => {
                (self.state, self.next_attempt_at) = (CallState::Retrying, Some(*at));
                (self.status, self.reason) = (*status, reason.clone());
            }
            Settlement::DeadLetter { status, reason, .. } => {
                (self.state, self.finished_at, self.dead_letter) =
                    (CallState::Failed, Some(now), true);
                (self.status, self.reason) = (*status, reason.clone());
            }
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_expires_keeps_what_is_known_of_its_attempts() {
        let settlement = Settlement::Finished {
            state: CallState::Failed,
            status: None,
            reason: Some("late".to_owned()),
            response: None,
            executed: false,
        };
        for (attempts, status, started_at) in [(1, None, None), (3, Some(503), Some(5))] {
            let running =
                CallRecord { attempts, status, started_at: Some(5), ..CallRecord::default() };
            let settled = running.settled(&settlement, 9);
            assert_eq!((settled.state, settled.finished_at), (CallState::Failed, Some(9)));
            assert_eq!((settled.attempts, settled.status), (attempts - 1, status));
            assert_eq!(settled.started_at, started_at);
        }
    }

    #[test]
    fn an_answer_that_is_too_large_is_left_out_and_missed() {
        let body = Bytes::from_static(b"large");
        let answer =
            Some(StoredResponse { status: 500, headers: Vec::new(), body, truncated: false });
        let dead = Settlement::DeadLetter {
            status: Some(500),
            reason: Some("a".to_owned()),
            response: answer,
        };
        assert!(dead.has_response());
        let settled = CallRecord::default().settled(&dead.clone().without_response(), 1);
        assert!(!dead.without_response().has_response());
        let reason = settled.reason.unwrap();
        assert_eq!(reason, "a; the answer is too large for the queue to keep");
    }

    #[test]
    fn a_call_of_which_too_little_is_known_is_taken_for_the_same() {
        let (one, two) = (Some("1"), Some("2"));
        for (function, first, second, repeated) in [
            ("a.fn", one, one, true),
            ("a.fn", one, two, false),
            ("a.fn", None, one, true),
            ("a.fn", one, None, true),
            ("b.fn", one, one, false),
            ("b.fn", None, None, false),
        ] {
            let digest = first.map(str::to_owned);
            let status =
                CallRecord { function: "a.fn".to_owned(), digest, ..CallRecord::default() };
            assert_eq!(status.is_same_call(function, second), repeated, "{function} {first:?}");
        }
    }
}
