//! Keeps a client to the addresses that it may connect to.
//!
//! A name says nothing about where it leads, and may lead elsewhere the next time. So it is resolved once for each
//! connection, and what was judged is what is connected to.

use std::io;
use std::net::{IpAddr, SocketAddr};

use tokio::net::{TcpStream, lookup_host};

use crate::config::base_url::BaseUrl;

/// None of an upstream's addresses may be connected to. Travels inside an `io::Error`.
#[derive(Debug, thiserror::Error)]
#[error("the address is not allowed")]
pub(super) struct Refused;

/// Says of a host and one of its addresses whether it may be connected to.
pub(super) struct Guard(Box<Judge>);

type Judge = dyn Fn(&str, IpAddr) -> bool + Send + Sync;

impl Guard {
    pub(super) fn new(allows: impl Fn(&str, IpAddr) -> bool + Send + Sync + 'static) -> Self {
        Self(Box::new(allows))
    }

    /// Connects to the first allowed address of `url` that takes the connection.
    ///
    /// # Errors
    /// One that holds [`Refused`] when there are addresses and none is allowed.
    pub(super) async fn connect(&self, url: &BaseUrl) -> io::Result<TcpStream> {
        let found = lookup_host((url.host(), url.port())).await?;
        let (allowed, refused): (Vec<SocketAddr>, Vec<_>) =
            found.partition(|address| (self.0)(url.host(), address.ip()));
        if allowed.is_empty() && !refused.is_empty() {
            return Err(io::Error::other(Refused));
        }
        TcpStream::connect(&*allowed).await
    }
}
