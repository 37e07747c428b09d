//! Keeps a client to the addresses that it may connect to.
//!
//! A name says nothing about where it leads, and may lead elsewhere the next time. So it is resolved once for each
//! connection, and what was judged is what is connected to.

use std::net::SocketAddr;

use futures_util::future::BoxFuture;

/// Why none of an upstream's addresses may be connected to. Travels inside an `io::Error`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("the address is not allowed")]
    NotAllowed,
    #[error("the address is this gateway's own")]
    Own,
}

/// Decides where a client may connect to.
pub trait Guard: Send + Sync {
    /// Those of `addresses` that may be connected to, at least one. `host` is the upstream's, as its URL has it, and
    /// resolves to all of them.
    ///
    /// # Errors
    /// When there are none.
    fn admit<'a>(
        &'a self,
        host: &'a str,
        addresses: Vec<SocketAddr>,
    ) -> BoxFuture<'a, Result<Vec<SocketAddr>, Refused>>;
}
