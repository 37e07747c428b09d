//! Shared parts of the tests: the gateway's binary as a child process, a provider and clients over real sockets. Every
//! wait has a deadline, and no test relies on a fixed sleep: see [`eventually`].

pub(crate) mod connection;
pub(crate) mod disk;
pub(crate) mod fake_stan;
pub(crate) mod gateway;
pub(crate) mod jetstream_batch;
pub(crate) mod jetstream_queue;
pub(crate) mod jetstream_users;
pub(crate) mod metrics;
pub(crate) mod nats;
pub(crate) mod nats_streaming;
pub(crate) mod provider;
pub(crate) mod queue;
pub(crate) mod scalable_function;
pub(crate) mod stan_queue;
pub(crate) mod up;
pub(crate) mod webhook;
pub(crate) mod workspace;

use std::io::Write as _;
use std::time::{Duration, Instant};

/// Maximum time of any step. Far more than any step takes, so that a busy machine fails no test.
pub(crate) const DEADLINE: Duration = Duration::from_secs(20);

/// Polls until `holds` returns true. Fails with `what` after [`DEADLINE`].
#[track_caller]
pub(crate) fn eventually(
    what: &str,
    mut holds: impl AsyncFnMut() -> bool,
) -> impl Future<Output = ()> {
    let location = std::panic::Location::caller();
    async move {
        let start = Instant::now();
        while !holds().await {
            assert!(start.elapsed() < DEADLINE, "never: {what} ({location})");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Returns the output of `future`. Fails with `what` if it takes longer than [`DEADLINE`].
#[track_caller]
pub(crate) fn within<F: Future>(what: &str, future: F) -> impl Future<Output = F::Output> {
    let location = std::panic::Location::caller();
    async move {
        match tokio::time::timeout(DEADLINE, future).await {
            Ok(output) => output,
            Err(_) => panic!("took too long: {what} ({location})"),
        }
    }
}

/// Reports that the current test cannot run on this machine, for the table of `make test`.
pub(crate) fn report_skipped(reason: &str) {
    let thread = std::thread::current();
    report(&format!("SKIPPED: {}: {reason}", thread.name().unwrap_or("a test")));
}

/// Writes a line that `tests/summary.py` reads. It bypasses the output capture of the test harness, which drops what
/// passing tests print.
pub(crate) fn report(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}
