//! All integration tests, one binary: the real gateway, real sockets, real processes.

mod conformance;
mod house;
