//! HTTP/1.1 messages to and from upstreams. No I/O.
//!
//! hyper serves the clients. Towards upstreams, an exchange needs few features of hyper's client, and the others cost a
//! third of an exchange (docs/PERFORMANCE.md). As in hyper, httparse parses heads and chunk sizes.

use crate::client::codings::CodingError;

pub(in crate::client) mod body_decoder;
pub(super) mod interim;
pub(in crate::client) mod request;
pub(in crate::client) mod response;
mod space_before_colon;

/// Why a message of an upstream is not valid HTTP, or cannot be forwarded safely.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    #[error("invalid head: {0}")]
    Head(#[from] httparse::Error),
    #[error("a head of more than 1 MiB")]
    TooLarge,
    #[error("invalid status")]
    Status,
    #[error("invalid header")]
    Header,
    #[error("invalid Content-Length")]
    ContentLength,
    #[error("invalid Transfer-Encoding: {0}")]
    TransferEncoding(#[from] CodingError),
    #[error("Transfer-Encoding in HTTP/1.0")]
    CodingInHttp10,
    #[error("invalid chunk")]
    Chunk,
    #[error("invalid trailers")]
    Trailers,
}

impl ParseError {
    /// Returns whether the message exceeds a limit, and may be valid otherwise.
    pub(super) fn is_too_large(self) -> bool {
        matches!(self, Self::TooLarge | Self::Head(httparse::Error::TooManyHeaders))
    }
}
