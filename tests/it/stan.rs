//! The queue on NATS Streaming: with the real gateway and worker, and a fake NATS Streaming server on a real nats-server.

mod backend_choice;
mod deduplication;
mod durability;
mod go_compatibility;
mod go_messages;
mod limitations;
mod retries;
mod server_failures;
mod workers;
