//! All integration tests, one binary: the real gateway, real sockets, real processes.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![expect(clippy::disallowed_methods, reason = "tests spawn what they drop")]

mod support;

mod conformance;
mod hostile;
mod house;
mod process_provider;

mod api;
mod auth;
mod auth_question;
mod autoscale;
mod broken;
mod call_access;
mod callback;
mod callback_chain;
mod callback_own;
mod callback_page;
mod chaos;
mod cold_start;
mod connecting;
mod containment;
mod counting;
mod credentials;
mod crowded;
mod deadlines;
mod early;
mod hangup;
mod http_1_0;
mod interim;
mod leaving;
mod limits;
mod memory;
mod metrics_port;
mod pool;
mod queue;
mod queue_chaos;
mod queue_damage;
mod queue_disk;
mod queue_full;
mod queue_jetstream;
mod queue_jetstream_process;
mod queue_limits;
mod queue_listing;
mod queue_loss;
mod queue_memory;
mod queue_odd;
mod queue_policies;
mod queue_salvage;
mod queue_stan;
mod queue_stan_messages;
mod queue_stan_once;
mod queue_together;
mod real_clients;
mod repeats;
mod request_framing;
mod request_heads;
mod request_target;
mod response_heads;
mod stack_file;
mod start;
mod start_failures;
mod stop;
mod streams;
mod traces;
mod trailers;
mod up;
mod upgrade;
mod worker;
