//! All integration tests in one binary: the real gateway, real sockets, real processes.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![expect(clippy::disallowed_methods, reason = "tests spawn what they drop")]

mod support;

mod conformance;
mod hostile;
mod process_provider;
mod source_rules;

mod api;
mod auth;
mod auth_subrequest;
mod autoscale;
mod body_memory;
mod callback;
mod callback_from_worker;
mod callback_to_function;
mod client_compatibility;
mod cold_start;
mod cold_start_retries;
mod connection_overload;
mod connection_pool;
mod credential_rotation;
mod cross_site_requests;
mod disconnects;
mod documentation;
mod early_responses;
mod function_metrics;
mod function_start_failures;
mod http_1_0;
mod interim_responses;
mod jetstream;
mod metrics_port;
mod process_cleanup;
mod protocol_upgrade;
mod queue_chaos;
mod queue_corruption;
mod queue_durability;
mod queue_file_size_limit;
mod queue_full_disk;
mod queue_limits;
mod queue_listing;
mod queue_memory;
mod queue_retry_policies;
mod queue_salvage;
mod queue_scheduling;
mod queued_call_access;
mod queued_calls;
mod replay_safety;
mod request_framing;
mod request_heads;
mod request_limits;
mod request_target;
mod resource_leaks;
mod response_heads;
mod shutdown;
mod sighup;
mod stack_file;
mod stan;
mod startup;
mod streaming;
mod timeouts;
mod traces;
mod trailers;
mod up;
mod upstream_aborts;
mod upstream_connect;
mod worker;
