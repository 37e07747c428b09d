//! One replica of a function in HTTP mode: a process that is started, watched, started again when it dies, and in the
//! end drained and stopped.

use std::net::SocketAddr;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{Request, StatusCode};
use tokio::io::AsyncRead;
use tokio::sync::{Notify, mpsc};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::provider::process::launcher::{ProcessTasks, TERMINATION_GRACE};
use crate::provider::process::logs::Logs;
use crate::provider::process::pool::Pool;
use crate::provider::process::process_group::ProcessGroup;
use crate::provider::process::replica_client::{self, ReplicaRequest};
use crate::provider::process::start_failure::FailedStarts;
use crate::provider::process::sync::lock_unpoisoned;
use crate::provider::types::StartFailure;

/// How long a replica may take until it can be called, before it is started anew.
const START_TIMEOUT: Duration = Duration::from_secs(300);
/// How often it is looked at until then: often at first, since callers may wait for it.
const MIN_PROBE_INTERVAL: Duration = Duration::from_millis(2);
const MAX_PROBE_INTERVAL: Duration = Duration::from_millis(50);
/// How long it may take to answer.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long calls in flight may go on in a replica that is no longer wanted.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(60);
/// A replica that has run for so long did not fail at its start.
const STABLE_AFTER: Duration = Duration::from_secs(60);
/// The pauses between starts.
const MIN_RESTART_DELAY: Duration = Duration::from_millis(100);
const MAX_RESTART_DELAY: Duration = Duration::from_secs(30);
/// How long what a dead process has written may take to be logged.
const LAST_OUTPUT_TIMEOUT: Duration = Duration::from_millis(250);

#[derive(Debug)]
pub(super) struct Replica {
    state: Mutex<ReplicaState>,
    /// Told whenever the last call in flight ends.
    idle: Notify,
    /// Notified when a connection was refused although the replica counts as ready.
    unreachable: Notify,
    /// Cancelled when it is no longer wanted.
    pub(super) retire: CancellationToken,
}

#[derive(Debug, Default)]
struct ReplicaState {
    /// Where it can be called, while it can be.
    ready: Option<SocketAddr>,
    in_flight: u64,
    failed_starts: FailedStarts,
}

/// A call in flight in a replica, until this is dropped.
#[derive(Debug)]
pub(super) struct ReplicaPermit {
    pub(super) address: SocketAddr,
    replica: Arc<Replica>,
}

/// Why a replica's process is no more.
enum RunEnd {
    Died {
        reason: String,
        /// How long it could be called.
        ready_for: Duration,
        last_output: String,
    },
    Retired,
}

impl RunEnd {
    /// The process could not even be started.
    fn not_started(reason: String) -> Self {
        Self::Died { reason, ready_for: Duration::ZERO, last_output: String::new() }
    }
}

/// What a process writes, on its way to the logs.
struct LoggedOutput {
    instance: Arc<str>,
    /// Closed when all of it has been logged.
    logged: mpsc::Receiver<()>,
}

impl Replica {
    pub(super) fn new() -> Self {
        let retire = CancellationToken::new();
        Self { state: Mutex::default(), idle: Notify::new(), unreachable: Notify::new(), retire }
    }

    /// Calls in flight; `None` if it is not ready.
    pub(super) fn load(&self) -> Option<u64> {
        let state = lock_unpoisoned(&self.state);
        state.ready.map(|_| state.in_flight)
    }

    /// Counts a call in; `None` if it is not ready.
    pub(super) fn acquire_permit(self: &Arc<Self>) -> Option<ReplicaPermit> {
        let mut state = lock_unpoisoned(&self.state);
        let address = state.ready?;
        state.in_flight += 1;
        Some(ReplicaPermit { address, replica: Arc::clone(self) })
    }

    /// How its starts fail, if they do so again and again.
    pub(super) fn start_failure(&self) -> Option<StartFailure> {
        lock_unpoisoned(&self.state).failed_starts.persistent().cloned()
    }

    /// Whether calls need not wait for it.
    pub(super) fn does_not_start(&self) -> bool {
        let state = lock_unpoisoned(&self.state);
        state.ready.is_none() && state.failed_starts.persistent().is_some()
    }

    /// No process accepts connections at `address`: no more calls go there until one does.
    pub(super) fn mark_unreachable_at(&self, address: SocketAddr) {
        let mut state = lock_unpoisoned(&self.state);
        if state.ready == Some(address) {
            state.ready = None;
            self.unreachable.notify_one();
        }
    }

    /// Keeps a process running until the replica is not wanted any more, or the provider stops.
    pub(super) async fn supervise(self: Arc<Self>, pool: Arc<Pool>) {
        let function = &pool.workload.function;
        let tasks = &pool.launcher.tasks;
        let mut failures = 0;
        loop {
            let began = Instant::now();
            let end = self.run_once(&pool).await;
            let RunEnd::Died { reason, ready_for, last_output } = end else {
                return self.set_ready(None, &pool);
            };
            lock_unpoisoned(&self.state).failed_starts.record_exit(
                ready_for,
                &reason,
                &last_output,
            );
            self.set_ready(None, &pool);
            failures = if began.elapsed() >= STABLE_AFTER { 1 } else { failures + 1 };
            let pause = restart_delay(failures);
            tracing::warn!(function = %function, reason, ?pause, "A replica of {function} died");
            let name = function.name.as_str().into();
            pool.workload
                .logs
                .write(&name, format!("Replica died: {reason}; next try in {pause:?}"));
            // All branches are cancel-safe.
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.retire.cancelled() => return,
                () = tasks.stopping.cancelled() => return,
            }
        }
    }

    /// One life of the process.
    async fn run_once(&self, pool: &Arc<Pool>) -> RunEnd {
        // Kept until the process is gone, so that no other replica gets the same.
        let port = match pool.launcher.reserve_port() {
            Ok(port) => port,
            Err(error) => return RunEnd::not_started(format!("no free port: {error}")),
        };
        let (mut group, output) = match start(pool, port.number) {
            Ok(started) => started,
            Err(error) => return RunEnd::not_started(format!("cannot be started: {error}")),
        };
        let mut ready_since = None;
        let tasks = &pool.launcher.tasks;
        // All branches are cancel-safe: the group is ended by whichever comes.
        let draining = tokio::select! {
            reason = self.wait_exit(&mut group, port.address(), pool, &mut ready_since) => {
                let ready_for = ready_since.map_or(Duration::ZERO, |at: Instant| at.elapsed());
                // Nobody is to be sent there any more, which its end must not hold up.
                self.set_ready(None, pool);
                group.kill_and_wait().await;
                let last_output = output.last_line(&pool.workload.logs).await;
                return RunEnd::Died { reason, ready_for, last_output };
            }
            () = self.retire.cancelled() => true,
            // Nobody calls any more.
            () = tasks.stopping.cancelled() => false,
        };
        self.set_ready(None, pool);
        if draining {
            self.drain(tasks).await;
        }
        group.terminate(TERMINATION_GRACE, &tasks.force_kill).await;
        RunEnd::Retired
    }

    /// Waits for the process to be ready, and then to die; says why it did. While it refuses connections it is not
    /// ready. `since` is when it was ready first.
    async fn wait_exit(
        &self,
        group: &mut ProcessGroup,
        address: SocketAddr,
        pool: &Arc<Pool>,
        ready_since: &mut Option<Instant>,
    ) -> String {
        let path = pool.ready_path();
        loop {
            // Both branches are cancel-safe: looking changes nothing.
            tokio::select! {
                status = group.wait_leader() => return exit_reason(status),
                ready = timeout(START_TIMEOUT, wait_ready(&pool.launcher.tasks, address, path)) => {
                    if ready.is_err() {
                        return format!("not ready within {START_TIMEOUT:?}");
                    }
                }
            }
            let began = *ready_since.get_or_insert_with(Instant::now);
            self.set_ready(Some(address), pool);
            // Both branches are cancel-safe.
            tokio::select! {
                status = group.wait_leader() => return exit_reason(status),
                () = self.unreachable.notified() => lock_unpoisoned(&self.state).failed_starts.record_ready(began.elapsed()),
            }
        }
    }

    /// Waits for the calls in flight, within bounds.
    async fn drain(&self, tasks: &ProcessTasks) {
        let idle = async {
            while lock_unpoisoned(&self.state).in_flight > 0 {
                self.idle.notified().await;
            }
        };
        // All branches are cancel-safe: the count is looked at again.
        tokio::select! {
            _ = timeout(DRAIN_TIMEOUT, idle) => {}
            () = tasks.stopping.cancelled() => {}
        }
    }

    fn set_ready(&self, ready: Option<SocketAddr>, pool: &Pool) {
        lock_unpoisoned(&self.state).ready = ready;
        pool.update_readiness();
    }
}

impl Drop for ReplicaPermit {
    fn drop(&mut self) {
        let mut state = lock_unpoisoned(&self.replica.state);
        state.in_flight -= 1;
        if state.in_flight == 0 {
            self.replica.idle.notify_one();
        }
    }
}

impl ReplicaPermit {
    /// Nobody accepts connections there.
    pub(super) fn mark_unreachable(&self) {
        self.replica.mark_unreachable_at(self.address);
    }
}

impl LoggedOutput {
    /// The last line that the process has written, which has ended.
    async fn last_line(mut self, logs: &Logs) -> String {
        // A process that has inherited its output may keep it open.
        let _ = timeout(LAST_OUTPUT_TIMEOUT, self.logged.recv()).await;
        logs.last_line_of(&self.instance)
    }
}

/// Starts the process, with its output going to the logs.
fn start(pool: &Pool, port: u16) -> std::io::Result<(ProcessGroup, LoggedOutput)> {
    let workload = &pool.workload;
    let mut command = pool.launcher.command(workload);
    let port = port.to_string();
    command.env("PORT", &port).env("port", &port);
    let mut group = ProcessGroup::start(&mut command, &workload.activity, &pool.launcher.orphans)?;
    let instance: Arc<str> = format!("{}-{}", workload.function.name, group.id()).into();
    let tasks = &pool.launcher.tasks;
    let (logs, force_kill) = (&workload.logs, &tasks.force_kill);
    // Nothing is sent: what is waited for is that both have been dropped.
    let (logging, logged) = mpsc::channel(1);
    if let Some(stdout) = group.stdout() {
        let writing =
            log_output(Arc::clone(logs), Arc::clone(&instance), stdout, force_kill.clone());
        tasks.spawn(run_logger(writing, logging.clone()));
    }
    if let Some(stderr) = group.stderr() {
        let writing =
            log_output(Arc::clone(logs), Arc::clone(&instance), stderr, force_kill.clone());
        tasks.spawn(run_logger(writing, logging));
    }
    Ok((group, LoggedOutput { instance, logged }))
}

async fn run_logger(writing: impl Future<Output = ()>, _logging: mpsc::Sender<()>) {
    writing.await;
}

/// Logs what a process writes, until everyone who could write has ended.
async fn log_output<O: AsyncRead + Unpin>(
    logs: Arc<Logs>,
    instance: Arc<str>,
    output: O,
    force_kill: CancellationToken,
) {
    // Both branches are cancel-safe: what is cut is lost on purpose.
    tokio::select! {
        () = logs.write_all(instance, output) => {}
        () = force_kill.cancelled() => {}
    }
}

async fn wait_ready(tasks: &ProcessTasks, address: SocketAddr, path: Option<&str>) {
    let mut pause = MIN_PROBE_INTERVAL;
    while !timeout(PROBE_TIMEOUT, is_ready(tasks, address, path)).await.unwrap_or(false) {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(MAX_PROBE_INTERVAL);
    }
}

async fn is_ready(tasks: &ProcessTasks, address: SocketAddr, path: Option<&str>) -> bool {
    let Some(path) = path else {
        return replica_client::connect(address).await.is_ok();
    };
    let request = Request::get(path).header("host", address.to_string()).body(Body::empty());
    let Ok(request) = request else { return false };
    let Ok(mut request) = ReplicaRequest::new(request, address) else { return false };
    let response = request.send(tasks, address).await;
    response.is_ok_and(|response| response.status() == StatusCode::OK)
}

fn exit_reason(status: std::io::Result<ExitStatus>) -> String {
    status.map_or_else(|error| error.to_string(), |status| status.to_string())
}

/// How long to wait before the next start, after so many failures in a row: doubled each time, up to a bound.
fn restart_delay(failures: u32) -> Duration {
    let doubled = 2_u32.saturating_pow(failures.saturating_sub(1));
    MIN_RESTART_DELAY.saturating_mul(doubled).min(MAX_RESTART_DELAY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_bound() {
        let pauses = [(1, 100), (2, 200), (3, 400), (9, 25_600), (10, 30_000), (u32::MAX, 30_000)];
        for (failures, milliseconds) in pauses {
            assert_eq!(restart_delay(failures), Duration::from_millis(milliseconds), "{failures}");
        }
    }

    #[test]
    fn a_replica_that_is_not_ready_takes_no_calls() {
        let replica = Arc::new(Replica::new());
        assert!(replica.acquire_permit().is_none() && replica.load().is_none());
        lock_unpoisoned(&replica.state).ready = Some(([127, 0, 0, 1], 1).into());
        let permit = replica.acquire_permit().unwrap();
        assert_eq!(replica.load(), Some(1));
        drop(permit);
        assert_eq!(replica.load(), Some(0));
    }
}
