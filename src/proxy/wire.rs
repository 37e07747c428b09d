//! HTTP/1.1 as an upstream hears and says it. No I/O.
//!
//! hyper serves the callers. On this side a call needs little of what its client does, and what it does besides was a
//! third of the cost of a call (docs/PERFORMANCE.md). Heads and chunk sizes are parsed by httparse, as hyper does.

use crate::proxy::codings::CodingError;

pub(super) mod answer;
pub(super) mod decoder;
pub(super) mod interim;
pub(super) mod request;
mod spaces;

/// Why what an upstream says is not HTTP, or not such that it could be passed on safely.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("invalid head: {0}")]
    Head(#[from] httparse::Error),
    #[error("a head of more than 1 MiB")]
    TooLarge,
    #[error("invalid status")]
    Status,
    #[error("invalid header")]
    Header,
    #[error("invalid Content-Length")]
    Length,
    #[error("invalid Transfer-Encoding: {0}")]
    TransferEncoding(#[from] CodingError),
    #[error("Transfer-Encoding in HTTP/1.0")]
    VersionWithCoding,
    #[error("invalid chunk")]
    Chunk,
    #[error("invalid trailers")]
    Trailers,
}

impl Malformed {
    /// Whether it may be HTTP, but more of it than is taken.
    pub(super) fn is_too_large(self) -> bool {
        matches!(self, Self::TooLarge | Self::Head(httparse::Error::TooManyHeaders))
    }
}
