//! Runs the process of one replica: starts it, probes it, restarts it when it exits, and finally drains and stops it.

use std::net::SocketAddr;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{Request, StatusCode};
use tokio::io::AsyncRead;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::process::launcher::{ProcessTasks, TERMINATION_GRACE};
use crate::process::logs::Logs;
use crate::process::pool::Pool;
use crate::process::pool::replica::Replica;
use crate::process::process_group::ProcessGroup;
use crate::process::replica_client::{self, ReplicaRequest};
use gateway_base::backoff::Backoff;

/// Limit for a replica to become ready, after which it is restarted.
const START_TIMEOUT: Duration = Duration::from_secs(300);
/// Interval of readiness probes: short at first, since clients may be waiting, and doubled up to the maximum.
const PROBE_BACKOFF: Backoff = Backoff::new(Duration::from_millis(2), Duration::from_millis(50));
/// Limit for one probe.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// Limit for calls in flight on a retired replica.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(60);
/// Running time after which the restart delay is reset.
const STABLE_AFTER: Duration = Duration::from_secs(60);
/// Delay between restarts, doubled after each failure.
const RESTART_BACKOFF: Backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(30));
/// Limit for reading the remaining output of an exited process.
const LAST_OUTPUT_TIMEOUT: Duration = Duration::from_millis(250);

/// Result of one run of a replica's process.
enum RunEnd {
    Exited {
        reason: String,
        /// Time for which it was ready.
        ready_for: Duration,
        last_output: String,
    },
    Retired,
}

impl RunEnd {
    /// The process could not be started.
    fn not_started(reason: String) -> Self {
        Self::Exited { reason, ready_for: Duration::ZERO, last_output: String::new() }
    }
}

/// The output of a process that is being copied to the logs.
struct LoggedOutput {
    instance: Arc<str>,
    /// Closed when all output has been logged.
    logged: mpsc::Receiver<()>,
}

impl Replica {
    /// Restarts the process whenever it exits, until the replica is retired or the provider stops.
    pub(super) async fn supervise(self: Arc<Self>, pool: Arc<Pool>) {
        let function = &pool.workload.function;
        let tasks = &pool.launcher.tasks;
        let mut failures = 0;
        loop {
            let began = Instant::now();
            let end = self.run_once(&pool).await;
            let RunEnd::Exited { reason, ready_for, last_output } = end else {
                return self.report_ready(None, &pool);
            };
            self.record_exit(ready_for, &reason, &last_output);
            self.report_ready(None, &pool);
            failures = if began.elapsed() >= STABLE_AFTER { 1 } else { failures + 1 };
            let pause = RESTART_BACKOFF.after(failures);
            tracing::warn!(function = %function, reason, ?pause, "A replica of {function} exited");
            let name = function.name.as_str().into();
            pool.workload
                .logs
                .write(&name, format!("Replica exited: {reason}; restart in {pause:?}"));
            // All branches are cancel-safe.
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.retire.cancelled() => return,
                () = tasks.stopping.cancelled() => return,
            }
        }
    }

    /// Runs the process once, from its start to its exit.
    async fn run_once(&self, pool: &Arc<Pool>) -> RunEnd {
        // Reserved until the process has exited, so that no other replica gets the same port.
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
        // All branches are cancel-safe: the group is stopped in each case.
        let draining = tokio::select! {
            reason = self.wait_exit(&mut group, port.address(), pool, &mut ready_since) => {
                let ready_for = ready_since.map_or(Duration::ZERO, |at: Instant| at.elapsed());
                // Stops routing calls to it before waiting for its descendants.
                self.report_ready(None, pool);
                group.kill_and_wait().await;
                let last_output = output.last_line(&pool.workload.logs).await;
                return RunEnd::Exited { reason, ready_for, last_output };
            }
            () = self.retire.cancelled() => true,
            // The provider has stopped accepting calls.
            () = tasks.stopping.cancelled() => false,
        };
        self.report_ready(None, pool);
        if draining {
            self.drain(tasks).await;
        }
        group.terminate(TERMINATION_GRACE, &tasks.force_kill).await;
        RunEnd::Retired
    }

    /// Probes the process until it is ready, and waits for its exit; returns the reason. While it refuses connections
    /// it is not ready. Sets `ready_since` to the time when it was first ready.
    async fn wait_exit(
        &self,
        group: &mut ProcessGroup,
        address: SocketAddr,
        pool: &Arc<Pool>,
        ready_since: &mut Option<Instant>,
    ) -> String {
        let path = pool.ready_path();
        loop {
            // Both branches are cancel-safe: a probe changes nothing.
            tokio::select! {
                status = group.wait_leader() => return exit_reason(status),
                ready = timeout(START_TIMEOUT, wait_ready(&pool.launcher.tasks, address, path)) => {
                    if ready.is_err() {
                        return format!("not ready within {START_TIMEOUT:?}");
                    }
                }
            }
            let began = *ready_since.get_or_insert_with(Instant::now);
            self.report_ready(Some(address), pool);
            // Both branches are cancel-safe.
            tokio::select! {
                status = group.wait_leader() => return exit_reason(status),
                () = self.wait_unreachable() => self.record_ready(began.elapsed()),
            }
        }
    }

    /// Waits for the calls in flight, for at most `DRAIN_TIMEOUT`.
    async fn drain(&self, tasks: &ProcessTasks) {
        // All branches are cancel-safe.
        tokio::select! {
            _ = timeout(DRAIN_TIMEOUT, self.wait_idle()) => {}
            () = tasks.stopping.cancelled() => {}
        }
    }

    fn report_ready(&self, ready: Option<SocketAddr>, pool: &Pool) {
        self.set_ready(ready);
        pool.update_readiness();
    }
}

impl LoggedOutput {
    /// Returns the last line of a process that has exited.
    async fn last_line(mut self, logs: &Logs) -> String {
        // A descendant may keep the output open.
        let _ = timeout(LAST_OUTPUT_TIMEOUT, self.logged.recv()).await;
        logs.last_line_of(&self.instance)
    }
}

/// Starts the process, and copies its output to the logs.
fn start(pool: &Pool, port: u16) -> std::io::Result<(ProcessGroup, LoggedOutput)> {
    let workload = &pool.workload;
    let mut command = pool.launcher.command(workload);
    let port = port.to_string();
    command.env("PORT", &port).env("port", &port);
    let mut group = ProcessGroup::start(&mut command, &workload.activity, &pool.launcher.orphans)?;
    let instance: Arc<str> = format!("{}-{}", workload.function.name, group.id()).into();
    let tasks = &pool.launcher.tasks;
    let (logs, force_kill) = (&workload.logs, &tasks.force_kill);
    // No message is sent: the channel closes when both tasks have dropped their sender.
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

/// Copies output to the logs until all processes that could write it have exited.
async fn log_output<O: AsyncRead + Unpin>(
    logs: Arc<Logs>,
    instance: Arc<str>,
    output: O,
    force_kill: CancellationToken,
) {
    // Both branches are cancel-safe: on a forced stop the rest of the output is dropped.
    tokio::select! {
        () = logs.write_all(instance, output) => {}
        () = force_kill.cancelled() => {}
    }
}

async fn wait_ready(tasks: &ProcessTasks, address: SocketAddr, path: Option<&str>) {
    let mut pause = PROBE_BACKOFF.min;
    while !timeout(PROBE_TIMEOUT, is_ready(tasks, address, path)).await.unwrap_or(false) {
        tokio::time::sleep(pause).await;
        pause = PROBE_BACKOFF.next(pause);
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
