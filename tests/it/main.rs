//! All integration tests, in one binary: real sockets, real processes.

mod process_provider;
