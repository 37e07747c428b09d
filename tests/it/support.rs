//! What the tests are built from: the gateway's own binary as a child process, a provider and callers over real
//! sockets. Nothing here waits for ever, and nothing sleeps in hope: see [`eventually`].

pub(crate) mod disk;
pub(crate) mod fake_stan;
pub(crate) mod gateway;
pub(crate) mod jetstream_batch;
pub(crate) mod jetstream_queue;
pub(crate) mod metrics;
pub(crate) mod nats;
pub(crate) mod nats_streaming;
pub(crate) mod provider;
pub(crate) mod queue;
pub(crate) mod replicas;
pub(crate) mod stan_queue;
pub(crate) mod up;
pub(crate) mod webhook;
pub(crate) mod wire;
pub(crate) mod workspace;

use std::time::{Duration, Instant};

/// The most time anything may take. Far more than it does, so that a busy machine fails no test.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// Waits until `holds`, and fails with `what` if it never does.
#[track_caller]
pub(crate) fn eventually(
    what: &str,
    mut holds: impl AsyncFnMut() -> bool,
) -> impl Future<Output = ()> {
    let place = std::panic::Location::caller();
    async move {
        let start = Instant::now();
        while !holds().await {
            assert!(start.elapsed() < DEADLINE, "never: {what} ({place})");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// What `future` results in; fails with `what` if it takes longer than [`DEADLINE`].
#[track_caller]
pub(crate) fn within<F: Future>(what: &str, future: F) -> impl Future<Output = F::Output> {
    let place = std::panic::Location::caller();
    async move {
        match tokio::time::timeout(DEADLINE, future).await {
            Ok(output) => output,
            Err(_) => panic!("took too long: {what} ({place})"),
        }
    }
}
