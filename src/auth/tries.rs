//! Credentials for one request to the provider, which is sent with each of the known credentials until the provider
//! accepts one.
//!
//! A 401 or 403 means that the request was not executed, so it may be sent again whatever its method is.

use std::sync::Arc;
use std::time::Instant;

use http::{HeaderValue, StatusCode};

use crate::auth::Credentials;
use crate::auth::pairs::Pair;

/// Returns whether `status` means that the provider rejected the credentials.
pub fn is_refusal(status: StatusCode) -> bool {
    matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
}

/// The credentials to try, one after the other.
pub struct Tries {
    credentials: Option<Arc<Credentials>>,
    pairs: Vec<Arc<Pair>>,
    at: usize,
}

impl Tries {
    /// Attempts with `credentials`, or a single attempt without any.
    pub fn of(credentials: Option<&Arc<Credentials>>) -> Self {
        let pairs = credentials.map(|it| it.pairs.load().offered(Instant::now()));
        Self { credentials: credentials.cloned(), pairs: pairs.unwrap_or_default(), at: 0 }
    }

    /// Returns the value of `Authorization` for this attempt; `None` without credentials.
    pub fn header(&self) -> Option<HeaderValue> {
        self.pairs.get(self.at).map(|pair| pair.header().clone())
    }

    /// Returns whether there are more credentials to try.
    pub fn has_next(&self) -> bool {
        self.at + 1 < self.pairs.len()
    }

    /// Records the status of the response. Returns whether the request is to be sent again, with the next credentials.
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
