//! The queue on JetStream: what it has in common with the embedded queue, and what happens when the server or one of its
//! clients fails.

mod authentication;
mod batch_formation;
mod batch_recovery;
mod batch_states;
mod dead_letters;
mod edge_cases;
mod foreign_messages;
mod idempotency;
mod large_bodies;
mod leases;
pub(crate) mod processes;
mod server_failures;
mod server_limits;
mod states;
mod stream_settings;
mod undecodable;
