//! Credentials for one request to the provider, which is sent with each of the known credentials until the provider
//! accepts one.
//!
//! A 401 or 403 means that the request was not executed, so it may be sent again whatever its method is.

use std::sync::Arc;
use std::time::Instant;

use http::{HeaderValue, StatusCode};

use crate::credentials::Credentials;
use crate::credentials::credential_set::BasicCredentials;

/// Returns whether `status` means that the provider rejected the credentials.
pub fn is_refusal(status: StatusCode) -> bool {
    matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
}

/// The credentials to try, one after the other.
pub struct CredentialAttempts {
    credentials: Option<Arc<Credentials>>,
    candidates: Vec<Arc<BasicCredentials>>,
    current: usize,
}

impl CredentialAttempts {
    /// Attempts with `credentials`, or a single attempt without any.
    pub fn new(credentials: Option<&Arc<Credentials>>) -> Self {
        let candidates =
            credentials.map(|credentials| credentials.set.load().candidates(Instant::now()));
        Self {
            credentials: credentials.cloned(),
            candidates: candidates.unwrap_or_default(),
            current: 0,
        }
    }

    /// Returns the value of `Authorization` for this attempt; `None` without credentials.
    pub fn header(&self) -> Option<HeaderValue> {
        self.candidates.get(self.current).map(|pair| pair.header().clone())
    }

    /// Returns whether there are more credentials to try.
    pub fn has_next(&self) -> bool {
        self.current + 1 < self.candidates.len()
    }

    /// Records the status of the response. Returns whether the request is to be sent again, with the next credentials.
    pub fn advance(&mut self, status: StatusCode) -> bool {
        if is_refusal(status) {
            let retry = self.has_next();
            self.current += usize::from(retry);
            return retry;
        }
        if let (true, Some(credentials), Some(pair)) =
            (status.is_success(), &self.credentials, self.candidates.get(self.current))
        {
            credentials.record_accepted(pair);
        }
        false
    }
}
