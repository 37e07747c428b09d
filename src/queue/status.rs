//! What became of a queued call. No I/O.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::queue::call::{Call, Millis, Unreadable};

/// Where a call is on its way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
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

impl State {
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

/// The state of a call.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub id: String,
    /// `NAME.NAMESPACE`
    pub function: String,
    pub state: State,
    /// How often it has been made.
    #[serde(default)]
    pub attempts: u32,
    /// What the function said last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// Why there is none, or what else is to be said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    pub submitted_at: Millis,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Millis>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<Millis>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_attempt_at: Option<Millis>,
    /// The caller chose the id, so that knowing it proves nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub chosen_id: bool,
    /// It failed for good and is kept: it can be tried again on request.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dead: bool,
    /// Tells the call from others under the same id; not known of calls that an older gateway took in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

/// The stored answer of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
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
        state: State,
        status: Option<u16>,
        reason: Option<String>,
        answer: Option<Answer>,
        /// `false`: it was over before this attempt, which does not count.
        made: bool,
    },
    /// It is tried again, not before `at`.
    Retry { at: Millis, status: Option<u16>, reason: Option<String> },
    /// It has failed for good, and is kept until somebody decides.
    Dead { status: Option<u16>, reason: Option<String>, answer: Option<Answer> },
}

impl Settlement {
    /// The same without the answer, which is too large to be kept.
    #[must_use]
    pub fn without_answer(self) -> Self {
        const TOO_LARGE: &str = "the answer is too large for the queue to keep";
        let note = |reason: Option<String>| {
            Some(reason.map_or_else(|| TOO_LARGE.to_owned(), |it| format!("{it}; {TOO_LARGE}")))
        };
        match self {
            Self::Finished { state, status, reason, made, answer: Some(_) } => {
                Self::Finished { state, status, reason: note(reason), made, answer: None }
            }
            Self::Dead { status, reason, answer: Some(_) } => {
                Self::Dead { status, reason: note(reason), answer: None }
            }
            other => other,
        }
    }

    /// How long the body of the answer is that it holds.
    pub fn body_length(&self) -> usize {
        match self {
            Self::Finished { answer, .. } | Self::Dead { answer, .. } => {
                answer.as_ref().map_or(0, |answer| answer.body.len())
            }
            Self::Retry { .. } => 0,
        }
    }

    /// Whether it holds an answer.
    pub fn has_answer(&self) -> bool {
        match self {
            Self::Finished { answer, .. } | Self::Dead { answer, .. } => answer.is_some(),
            Self::Retry { .. } => false,
        }
    }

    /// The state that it leads to, and the function's answer.
    pub fn outcome(&self) -> (State, Option<u16>) {
        match self {
            Self::Finished { state, status, .. } => (*state, *status),
            Self::Retry { status, .. } => (State::Retrying, *status),
            Self::Dead { status, .. } => (State::Failed, *status),
        }
    }
}

impl Status {
    /// The status of a call that has not been made yet.
    pub fn queued(call: &Call) -> Self {
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
    pub fn is_repeated_by(&self, function: &str, digest: Option<&str>) -> bool {
        let known = self.digest.as_deref().zip(digest);
        self.function == function && known.is_none_or(|(first, second)| first == second)
    }

    /// The status of a stored call that has not been made yet.
    ///
    /// # Errors
    /// When `stored` holds no call.
    pub fn of_stored(stored: &[u8]) -> Result<Self, Unreadable> {
        Ok(Self::queued(&Call::decode_head(stored)?))
    }

    /// What the status of a running call becomes when it is settled at `now`.
    #[must_use]
    pub fn settled(mut self, settlement: &Settlement, now: Millis) -> Self {
        match settlement {
            Settlement::Finished { state, status, reason, made, .. } => {
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
                (self.state, self.next_attempt_at) = (State::Retrying, Some(*at));
                (self.status, self.reason) = (*status, reason.clone());
            }
            Settlement::Dead { status, reason, .. } => {
                (self.state, self.finished_at, self.dead) = (State::Failed, Some(now), true);
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
            state: State::Failed,
            status: None,
            reason: Some("late".to_owned()),
            answer: None,
            made: false,
        };
        for (attempts, status, started_at) in [(1, None, None), (3, Some(503), Some(5))] {
            let running = Status { attempts, status, started_at: Some(5), ..Status::default() };
            let settled = running.settled(&settlement, 9);
            assert_eq!((settled.state, settled.finished_at), (State::Failed, Some(9)));
            assert_eq!((settled.attempts, settled.status), (attempts - 1, status));
            assert_eq!(settled.started_at, started_at);
        }
    }

    #[test]
    fn an_answer_that_is_too_large_is_left_out_and_missed() {
        let body = Bytes::from_static(b"large");
        let answer = Some(Answer { status: 500, headers: Vec::new(), body, truncated: false });
        let dead = Settlement::Dead { status: Some(500), reason: Some("a".to_owned()), answer };
        assert!(dead.has_answer());
        let settled = Status::default().settled(&dead.clone().without_answer(), 1);
        assert!(!dead.without_answer().has_answer());
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
            let status = Status { function: "a.fn".to_owned(), digest, ..Status::default() };
            assert_eq!(status.is_repeated_by(function, second), repeated, "{function} {first:?}");
        }
    }
}
