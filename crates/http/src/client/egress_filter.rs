//! Restricts the addresses that a client may connect to.
//!
//! The addresses of a name may change at any time. A name is therefore resolved once for each connection, and the
//! client connects only to addresses that the filter has checked.

use std::net::SocketAddr;

use futures_util::future::BoxFuture;

/// Why no address of an upstream may be connected to. Carried inside an `io::Error`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressDenied {
    #[error("the address is not allowed")]
    NotAllowed,
    #[error("the address is this gateway's own")]
    OwnAddress,
}

/// Decides which addresses a client may connect to.
pub trait EgressFilter: Send + Sync {
    /// Returns those of `addresses` that may be connected to, at least one. `host` is the host of the upstream's URL;
    /// `addresses` are all its addresses.
    ///
    /// # Errors
    /// When no address may be connected to: the request is not sent.
    fn filter<'a>(
        &'a self,
        host: &'a str,
        addresses: Vec<SocketAddr>,
    ) -> BoxFuture<'a, Result<Vec<SocketAddr>, AddressDenied>>;
}
