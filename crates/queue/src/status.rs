//! The record of a queued call: state, attempts, response. No I/O.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::call::{DecodeError, QueuedCall, UnixMillis};

/// What is known about a call. It is stored as JSON.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CallState {
    /// Waits to be executed, possibly until a given time.
    #[default]
    Queued,
    Running,
    /// An attempt failed. The call will be retried.
    Retrying,
    Succeeded,
    /// Failed or expired. The call is not retried automatically.
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
    /// Number of executions.
    #[serde(default)]
    pub attempts: u32,
    /// HTTP status of the last response.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// Reason why there is no response, or a remark about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    pub submitted_at: UnixMillis,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<UnixMillis>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<UnixMillis>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_attempt_at: Option<UnixMillis>,
    /// The client chose the id, so that knowing the id does not authorize a request.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub chosen_id: bool,
    /// The call failed permanently and is kept as a dead letter. It can be redriven.
    #[serde(rename = "dead", default, skip_serializing_if = "std::ops::Not::not")]
    pub dead_letter: bool,
    /// Digest of the call, which distinguishes calls with the same id. Missing in records of older gateways.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

/// The stored response of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredResponse {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Bytes,
    /// The body exceeded the limit and was cut off.
    pub truncated: bool,
}

/// Outcome of a delivery.
#[derive(Clone, Debug)]
pub enum Settlement {
    /// The call is finished. Its record and response are kept for a limited time.
    Finished {
        state: CallState,
        status: Option<u16>,
        reason: Option<String>,
        response: Option<StoredResponse>,
        /// `false` if the delivery ended without an execution. It does not count as an attempt.
        executed: bool,
    },
    /// The call is retried at the time `at` or later.
    Retry { at: UnixMillis, status: Option<u16>, reason: Option<String> },
    /// The call failed permanently. It is kept as a dead letter until it is redriven or deleted.
    DeadLetter { status: Option<u16>, reason: Option<String>, response: Option<StoredResponse> },
}

impl Settlement {
    /// Returns the settlement without its response, which is too large to be stored. The reason says so.
    #[must_use]
    pub fn without_response(self) -> Self {
        const TOO_LARGE: &str = "the response is too large for the queue to store";
        let add_remark =
            |reason: Option<String>| {
                Some(reason.map_or_else(
                    || TOO_LARGE.to_owned(),
                    |reason| format!("{reason}; {TOO_LARGE}"),
                ))
            };
        match self {
            Self::Finished { state, status, reason, executed: made, response: Some(_) } => {
                Self::Finished {
                    state,
                    status,
                    reason: add_remark(reason),
                    executed: made,
                    response: None,
                }
            }
            Self::DeadLetter { status, reason, response: Some(_) } => {
                Self::DeadLetter { status, reason: add_remark(reason), response: None }
            }
            other => other,
        }
    }

    /// Length of the response body in bytes; 0 without a response.
    pub fn response_length(&self) -> usize {
        match self {
            Self::Finished { response, .. } | Self::DeadLetter { response, .. } => {
                response.as_ref().map_or(0, |response| response.body.len())
            }
            Self::Retry { .. } => 0,
        }
    }

    /// Returns whether the settlement has a response.
    pub fn has_response(&self) -> bool {
        match self {
            Self::Finished { response, .. } | Self::DeadLetter { response, .. } => {
                response.is_some()
            }
            Self::Retry { .. } => false,
        }
    }

    /// The resulting state, and the HTTP status of the response.
    pub fn outcome(&self) -> (CallState, Option<u16>) {
        match self {
            Self::Finished { state, status, .. } => (*state, *status),
            Self::Retry { status, .. } => (CallState::Retrying, *status),
            Self::DeadLetter { status, .. } => (CallState::Failed, *status),
        }
    }
}

impl CallRecord {
    /// The record of a call that has not been executed.
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

    /// Returns whether a call with the same id is a duplicate of this one. An unknown digest matches every digest.
    pub fn is_same_call(&self, function: &str, digest: Option<&str>) -> bool {
        let digests = self.digest.as_deref().zip(digest);
        self.function == function && digests.is_none_or(|(first, second)| first == second)
    }

    /// The record of an encoded call that has not been executed.
    ///
    /// # Errors
    ///
    /// When `stored` is not a call.
    pub fn from_stored(stored: &[u8]) -> Result<Self, DecodeError> {
        Ok(Self::queued(&QueuedCall::decode_without_body(stored)?))
    }

    /// Returns the record of a running call after its settlement at `now`.
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
    fn an_expired_call_keeps_its_attempts_and_status() {
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
    fn a_response_that_is_too_large_is_dropped_with_a_reason() {
        let body = Bytes::from_static(b"large");
        let response =
            Some(StoredResponse { status: 500, headers: Vec::new(), body, truncated: false });
        let dead =
            Settlement::DeadLetter { status: Some(500), reason: Some("a".to_owned()), response };
        assert!(dead.has_response());
        let settled = CallRecord::default().settled(&dead.clone().without_response(), 1);
        assert!(!dead.without_response().has_response());
        let reason = settled.reason.unwrap();
        assert_eq!(reason, "a; the response is too large for the queue to store");
    }

    #[test]
    fn a_call_without_digest_matches_every_digest() {
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
