//! HTTP/1.1 to upstreams.

pub(super) mod connection;
pub(super) mod request_writer;
pub(crate) mod wire;
