//! What it takes to run processes: the base of their environment, their secrets, and the way they all end.

use std::collections::BTreeSet;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::process::Command;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::PoolLimits;
use crate::provider::process::command::{DEFAULT_PATH, find_program};
use crate::provider::process::fork_limiter::ForkLimiter;
use crate::provider::process::mounts::{Mounts, SECRETS_DIRECTORY};
use crate::provider::process::orphans::Orphans;
use crate::provider::process::secrets::Secrets;
use crate::provider::process::spec::FunctionSpec;
use crate::provider::process::sync::lock_unpoisoned;
use crate::provider::process::workload::Workload;
use crate::proxy::client::Client;
use crate::shutdown::Tasks;

/// How long a process that was asked to end may take.
pub(super) const TERMINATION_GRACE: Duration = Duration::from_secs(10);
/// Connections to replicas that are kept open.
const REPLICA_POOL_LIMITS: PoolLimits = PoolLimits { total: 1024, per_host: 64 };
/// How long killed processes may take to be gone when the provider stops.
const KILL_GRACE: Duration = Duration::from_secs(6);

/// Calls that may be forked at once, by all functions together. A few pipes and some memory each, before what the
/// function itself needs.
const MAX_FORKED_CALLS: usize = 1000;

/// Shared by all functions.
#[derive(Debug)]
pub(super) struct ProcessLauncher {
    pub(super) tasks: ProcessTasks,
    pub(super) orphans: Orphans,
    pub(super) secrets: Secrets,
    pub(super) fork_limiter: ForkLimiter,
    /// `None`: secrets stay in the function's directory, which `secrets_path` names.
    mounts: Option<Mounts>,
    environment: Vec<(String, String)>,
    reserved_ports: Arc<Mutex<BTreeSet<u16>>>,
}

/// The tasks that own processes, and the two signals that end them.
#[derive(Clone)]
pub(super) struct ProcessTasks {
    tasks: Tasks,
    tracker: TaskTracker,
    /// Processes are to end.
    pub(super) stopping: CancellationToken,
    /// Those that have not are to be killed.
    pub(super) force_kill: CancellationToken,
    /// Calls replicas.
    pub(super) client: Arc<Client>,
}

/// A port of this machine that no other replica is given, until this is dropped.
#[derive(Debug)]
pub(super) struct ReservedPort {
    pub(super) number: u16,
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

    /// A command that runs a function, with its environment and secrets, and nothing of this process's own.
    pub(super) fn command(&self, workload: &Workload) -> Command {
        let Workload { function, spec, .. } = workload;
        let view = self.secrets.view(function);
        let mounts = self.mounts.as_ref().filter(|_| !spec.secrets.is_empty());
        let mut command = match mounts {
            Some(mounts) => mounts.wrap(&view, &spec.argv),
            None => {
                let name = &spec.argv[0];
                // By its path: to look a name up in the child's PATH, the whole process would be forked for it.
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

    /// The PATH that a function's command is looked up in.
    pub(super) fn search_path<'a>(&'a self, spec: &'a FunctionSpec) -> &'a str {
        let inherited = || self.environment.iter().find(|(name, _)| name == "PATH").map(|(_, v)| v);
        spec.env.get("PATH").or_else(inherited).map_or(DEFAULT_PATH, String::as_str)
    }

    /// A port that is free now. Another program may still take it first; then the replica fails and gets another.
    pub(super) fn reserve_port(&self) -> io::Result<ReservedPort> {
        // Held until one is found that no replica has been given: the kernel would offer the same again.
        let mut held = Vec::new();
        loop {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            let number = listener.local_addr()?.port();
            if lock_unpoisoned(&self.reserved_ports).insert(number) {
                return Ok(ReservedPort { number, reserved: Arc::clone(&self.reserved_ports) });
            }
            held.push(listener);
        }
    }
}

impl ProcessTasks {
    fn new(tasks: Tasks) -> Self {
        let stopping = CancellationToken::new();
        let stop_all = stopping.clone();
        // Whoever stops the process's tasks means ours too.
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
            // The sweep holds nothing over an await.
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

    /// Spawns a task that watches `stopping` and `cut` by itself.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let running = self.tracker.token();
        self.tasks.spawn(|_| async move {
            task.await;
            drop(running);
        });
    }

    /// Ends all processes: asks them to, and kills those that are still there after `grace`.
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
            tracing::error!(tasks = self.tracker.len(), "Killed processes do not end");
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
