//! Errors of requests to the NATS server. They are distinguished by the server's error codes; its texts are only logged.
//! No I/O.
use std::sync::Arc;

use serde::Deserialize;

use crate::Error;

pub(super) const CONSUMER_NOT_FOUND: u64 = 10014;
pub(super) const MESSAGE_NOT_FOUND: u64 = 10037;
pub(super) const STREAM_NOT_FOUND: u64 = 10059;
/// The expected last sequence was wrong.
const WRONG_SEQUENCE: u64 = 10071;
/// The stream has not stored a message: it is full, or its storage failed.
pub(super) const STORE_FAILED: u64 = 10077;
/// The message exceeds the `max_msg_size` of the stream.
const MESSAGE_TOO_LARGE: u64 = 10054;
const HEADERS_TOO_LARGE: u64 = 10097;
/// The cluster has no leader or too few servers, or a stream is missing, which is then created.
pub(super) const UNAVAILABLE_CODES: [u64; 4] = [10004, 10008, 10009, STREAM_NOT_FOUND];
/// Limits of the account, insufficient resources, memory or storage of the server, or a failure to store.
const NO_SPACE_CODES: [u64; 5] = [10002, 10023, 10028, 10047, STORE_FAILED];

/// Failure of a request to the NATS server.
#[derive(Clone, Debug, thiserror::Error)]
pub(super) enum NatsError {
    #[error("the NATS server does not respond")]
    Unavailable,
    #[error("the message exceeds the server's maximum size")]
    TooLarge,
    #[error("the stream has its maximum number of messages")]
    StreamFull,
    /// Error code and text of the server.
    #[error("the NATS server rejected the request: {1} ({0})")]
    Rejected(u64, String),
    /// A stream has settings that the queue cannot work with. The text names the setting and the remedy.
    #[error("{0}")]
    Incompatible(Arc<str>),
    #[error("unexpected response of the NATS server")]
    UnexpectedResponse,
    #[error("the record of a batch cannot be decoded")]
    UnreadableRecord,
}

impl NatsError {
    /// Returns whether the expected last sequence was wrong: another client has changed the subject.
    pub(super) fn is_conflict(&self) -> bool {
        matches!(self, Self::Rejected(WRONG_SEQUENCE, _))
    }
}

impl From<NatsError> for Error {
    fn from(error: NatsError) -> Self {
        match &error {
            // Incompatible streams are logged when they are found.
            NatsError::Unavailable | NatsError::Incompatible(_) => Self::Unreachable,
            NatsError::StreamFull => Self::Full,
            NatsError::Rejected(code, _) if UNAVAILABLE_CODES.contains(code) => Self::Unreachable,
            NatsError::Rejected(code, _) if NO_SPACE_CODES.contains(code) => Self::NoSpace,
            NatsError::TooLarge => Self::TooLarge(0),
            NatsError::Rejected(..)
            | NatsError::UnexpectedResponse
            | NatsError::UnreadableRecord => {
                tracing::error!(error = %error, "A request to the NATS server failed");
                Self::Failed
            }
        }
    }
}

impl From<ApiError> for NatsError {
    fn from(error: ApiError) -> Self {
        match error.err_code {
            MESSAGE_TOO_LARGE | HEADERS_TOO_LARGE => Self::TooLarge,
            code => Self::Rejected(code, error.description),
        }
    }
}

/// The error in a response of the server.
#[derive(Deserialize)]
pub(super) struct ErrorResponse {
    pub(super) error: Option<ApiError>,
}

#[derive(Deserialize)]
pub(super) struct ApiError {
    #[serde(default)]
    pub(super) err_code: u64,
    #[serde(default)]
    pub(super) description: String,
}
