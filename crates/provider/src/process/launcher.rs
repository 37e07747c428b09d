//! Builds commands of functions with their environment and secrets, reserves ports, and owns the tasks of processes.

use std::collections::BTreeSet;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::process::Command;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::process::command::{DEFAULT_PATH, find_program};
use crate::process::fork_limiter::ForkLimiter;
use crate::process::mounts::{Mounts, SECRETS_DIRECTORY};
use crate::process::orphans::Orphans;
use crate::process::secrets::Secrets;
use crate::process::spec::FunctionSpec;
use crate::process::workload::Workload;
use gateway_base::shutdown::Tasks;
use gateway_base::sync::lock_unpoisoned;
use gateway_http::client::{Client, PoolLimits};

/// Time between SIGTERM and SIGKILL.
pub(super) const TERMINATION_GRACE: Duration = Duration::from_secs(10);
/// Limits of idle connections to replicas.
const REPLICA_POOL_LIMITS: PoolLimits = PoolLimits { total: 1024, per_host: 64 };
/// Limit for killed processes to exit when the provider stops.
const KILL_GRACE: Duration = Duration::from_secs(6);

/// Maximum number of forked calls of all functions. Each needs a few pipes and some memory in the provider.
const MAX_FORKED_CALLS: usize = 1000;

/// Starts processes. Shared by all functions.
#[derive(Debug)]
pub(super) struct ProcessLauncher {
    pub(super) tasks: ProcessTasks,
    pub(super) orphans: Orphans,
    pub(super) secrets: Secrets,
    pub(super) fork_limiter: ForkLimiter,
    /// `None` if secrets cannot be mounted: functions read them from the directory in `secrets_path`.
    mounts: Option<Mounts>,
    environment: Vec<(String, String)>,
    /// The ports of all replicas. A leaf.
    reserved_ports: Arc<Mutex<BTreeSet<u16>>>,
}

/// The tasks that own processes, and the two signals that stop them.
#[derive(Clone)]
pub(super) struct ProcessTasks {
    tasks: Tasks,
    tracker: TaskTracker,
    /// Cancelled to stop all processes gracefully.
    pub(super) stopping: CancellationToken,
    /// Cancelled to kill the processes that still run.
    pub(super) force_kill: CancellationToken,
    /// Client for replicas.
    pub(super) client: Arc<Client>,
}

/// A local port reserved for one replica until this is dropped.
#[derive(Debug)]
pub(super) struct ReservedPort {
    pub(super) number: u16,
    /// The same as `reserved_ports` of the launcher.
    reserved: Arc<Mutex<BTreeSet<u16>>>,
}

impl ProcessLauncher {
    pub(super) fn new(
        tasks: &Tasks,
        orphans: Orphans,
        secrets: Secrets,
        mounts: Option<Mounts>,
        environment: Vec<(String, String)>,
    ) -> Self {
        let tasks = ProcessTasks::new(tasks.clone());
        let fork_limiter = ForkLimiter::new(MAX_FORKED_CALLS);
        Self {
            tasks,
            orphans,
            secrets,
            fork_limiter,
            mounts,
            environment,
            reserved_ports: Arc::default(),
        }
    }

    /// Returns the command of a function, with its environment and secrets. It inherits no variable of this process.
    pub(super) fn command(&self, workload: &Workload) -> Command {
        let Workload { function, spec, .. } = workload;
        let view = self.secrets.view(function);
        let mounts = self.mounts.as_ref().filter(|_| !spec.secrets.is_empty());
        let mut command = match mounts {
            Some(mounts) => mounts.wrap(&view, &spec.argv),
            None => {
                let name = &spec.argv[0];
                // Uses the full path: a lookup in the child's PATH would require fork instead of the faster
                // posix_spawn.
                let program =
                    find_program(name, self.search_path(spec)).unwrap_or_else(|| name.into());
                let mut command = Command::new(program);
                command.arg0(name).args(&spec.argv[1..]);
                command
            }
        };
        command.env_clear().env("PATH", DEFAULT_PATH);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.envs(&spec.env);
        match self.mounts {
            Some(_) => command.env("secrets_path", SECRETS_DIRECTORY),
            None => command.env("secrets_path", view),
        };
        if let Some(directory) = &spec.working_directory {
            command.current_dir(directory);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Returns the PATH for looking up a function's command.
    pub(super) fn search_path<'a>(&'a self, spec: &'a FunctionSpec) -> &'a str {
        let inherited = || self.environment.iter().find(|(name, _)| name == "PATH").map(|(_, v)| v);
        spec.env.get("PATH").or_else(inherited).map_or(DEFAULT_PATH, String::as_str)
    }

    /// Reserves an unused port. If another program binds it first, the replica fails and is restarted on another port.
    pub(super) fn reserve_port(&self) -> io::Result<ReservedPort> {
        // Keeps listeners on already reserved ports open, so that the kernel does not return the same port again.
        let mut rejected = Vec::new();
        loop {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            let number = listener.local_addr()?.port();
            if lock_unpoisoned(&self.reserved_ports).insert(number) {
                return Ok(ReservedPort { number, reserved: Arc::clone(&self.reserved_ports) });
            }
            rejected.push(listener);
        }
    }
}

impl ProcessTasks {
    fn new(tasks: Tasks) -> Self {
        let stopping = CancellationToken::new();
        let stop_all = stopping.clone();
        // Stopping the tasks of the whole process stops these tasks as well.
        tasks.spawn(|asked| async move {
            // Both branches are cancel-safe.
            tokio::select! {
                () = asked.cancelled() => stop_all.cancel(),
                () = stop_all.cancelled() => {}
            }
        });
        let client = Client::for_local_processes(REPLICA_POOL_LIMITS);
        let swept = Arc::clone(&client);
        tasks.spawn(|asked| async move {
            // Cancel-safe: the reaper holds no state across an await.
            tokio::select! {
                () = asked.cancelled() => {}
                () = swept.run_idle_reaper() => {}
            }
        });
        Self {
            tasks,
            tracker: TaskTracker::new(),
            stopping,
            force_kill: CancellationToken::new(),
            client,
        }
    }

    /// Spawns a task that reacts to `stopping` and `force_kill` itself.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let running = self.tracker.token();
        self.tasks.spawn(|_| async move {
            task.await;
            drop(running);
        });
    }

    /// Stops all processes gracefully, and kills those that still run after `grace`.
    pub(super) async fn stop(&self, grace: Duration) {
        self.stopping.cancel();
        self.tracker.close();
        if tokio::time::timeout(grace, self.tracker.wait()).await.is_ok() {
            return;
        }
        tracing::warn!(
            tasks = self.tracker.len(),
            "Processes killed at the end of the grace period"
        );
        self.force_kill.cancel();
        if tokio::time::timeout(KILL_GRACE, self.tracker.wait()).await.is_err() {
            tracing::error!(tasks = self.tracker.len(), "Killed processes do not exit");
        }
    }
}

impl std::fmt::Debug for ProcessTasks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RunnerTasks").field("running", &self.tracker.len()).finish_non_exhaustive()
    }
}

impl ReservedPort {
    pub(super) fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.number).into()
    }
}

impl Drop for ReservedPort {
    fn drop(&mut self) {
        lock_unpoisoned(&self.reserved).remove(&self.number);
    }
}
