//! One request to a provider, sent with each of the known credentials until the provider accepts one.
//!
//! A 401 or 403 says that nothing was done, so a request may be sent again whatever its method is.

use std::sync::Arc;
use std::time::Instant;

use http::{HeaderValue, StatusCode};

use crate::auth::Credentials;
use crate::auth::pairs::Pair;

/// Whether a provider that answers `status` has refused the credentials.
pub fn is_refusal(status: StatusCode) -> bool {
    matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
}

/// The credentials that one request is sent with, one after the other.
pub struct Tries {
    credentials: Option<Arc<Credentials>>,
    pairs: Vec<Arc<Pair>>,
    at: usize,
}

impl Tries {
    /// Tries of `credentials`, or a single one without any.
    pub fn of(credentials: Option<&Arc<Credentials>>) -> Self {
        let pairs = credentials.map(|it| it.pairs.load().offered(Instant::now()));
        Self { credentials: credentials.cloned(), pairs: pairs.unwrap_or_default(), at: 0 }
    }

    /// What `Authorization` says this time; `None`: there are no credentials.
    pub fn header(&self) -> Option<HeaderValue> {
        self.pairs.get(self.at).map(|pair| pair.header().clone())
    }

    /// Whether there are others to try after this one.
    pub fn has_next(&self) -> bool {
        self.at + 1 < self.pairs.len()
    }

    /// Notes the provider's answer. Whether the request is to be sent again, with the next credentials.
    pub fn again(&mut self, status: StatusCode) -> bool {
        if is_refusal(status) {
            let again = self.has_next();
            self.at += usize::from(again);
            return again;
        }
        if let (true, Some(credentials), Some(pair)) =
            (status.is_success(), &self.credentials, self.pairs.get(self.at))
        {
            credentials.note_accepted(pair);
        }
        false
    }
}
