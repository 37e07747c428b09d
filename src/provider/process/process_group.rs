//! A process and all it has started: one process group, and what has left it, which end as a whole.

use std::io;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, prlimit};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::provider::process::activity::Activity;
use crate::provider::process::containment::ContainedProcess;
use crate::provider::process::orphans::{Orphans, ProcessRecord};

/// How long a killed process may take to be gone; it can hang in the kernel.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// How often to look for what the leader has left behind: the kernel tells only of the leader's end.
const GROUP_POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Open files that a process may have until it asks for more. This process has raised its own limit, but some programs
/// go through all numbers up to theirs, or cannot use those beyond.
const MAX_OPEN_FILES: u64 = 1024;

/// A running process group. Dropped, it is killed.
#[derive(Debug)]
pub(super) struct ProcessGroup {
    child: Child,
    pid: Pid,
    /// Whether there is anything left to kill: beyond that, the id may be somebody else's.
    is_alive: bool,
    activity: Arc<Activity>,
    _record: ProcessRecord,
    /// All that it has started, whichever group that is in.
    contained: ContainedProcess,
}

impl ProcessGroup {
    /// Starts `command` as the leader of a group of its own.
    pub(super) fn start(
        command: &mut Command,
        activity: &Arc<Activity>,
        orphans: &Orphans,
    ) -> io::Result<Self> {
        let command = command.process_group(0).kill_on_drop(true);
        let (child, held) = orphans.containment.spawn(command)?;
        let pid = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        let pid = pid.ok_or_else(|| io::Error::other("the process has no id"))?;
        limit_open_files(pid);
        activity.group_started(raw_pid(pid));
        let record = orphans.record(pid);
        Ok(Self {
            child,
            pid,
            is_alive: true,
            activity: Arc::clone(activity),
            _record: record,
            contained: held,
        })
    }

    /// The id of the leader, which is the group's.
    pub(super) fn id(&self) -> i32 {
        raw_pid(self.pid)
    }

    pub(super) fn stdin(&mut self) -> Option<ChildStdin> {
        self.child.stdin.take()
    }

    pub(super) fn stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    pub(super) fn stderr(&mut self) -> Option<ChildStderr> {
        self.child.stderr.take()
    }

    /// Waits for the leader to end. Cancel-safe.
    pub(super) async fn wait_leader(&mut self) -> io::Result<ExitStatus> {
        let status = self.child.wait().await?;
        // The leader's id stays taken while others are in the group. If there are none, it may be given away from
        // here on, and must not be used.
        self.is_alive = rustix::process::test_kill_process_group(self.pid).is_ok();
        Ok(status)
    }

    /// Kills all of the group at once.
    pub(super) fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.is_alive = false;
        self.contained.kill();
    }

    /// Ends the group: asks it to, and kills it after `patience` or once `cut` says so.
    pub(super) async fn terminate(mut self, patience: Duration, force_kill: &CancellationToken) {
        self.signal(Signal::TERM);
        // Both branches are cancel-safe.
        tokio::select! {
            _ = timeout(patience, self.wait_all()) => {}
            () = force_kill.cancelled() => {}
        }
        self.kill_and_wait().await;
    }

    /// Waits for the leader, and for the others too: a shell often ends before what it has started.
    async fn wait_all(&mut self) -> io::Result<()> {
        self.wait_leader().await?;
        while self.is_alive {
            tokio::time::sleep(GROUP_POLL_INTERVAL).await;
            self.is_alive = rustix::process::test_kill_process_group(self.pid).is_ok();
        }
        Ok(())
    }

    /// Kills what is left of the group, and what has left it, and waits until that is gone.
    pub(super) async fn kill_and_wait(mut self) {
        self.kill();
        if timeout(KILL_TIMEOUT, self.child.wait()).await.is_err() {
            tracing::warn!(pid = self.id(), "A killed process does not end");
        }
        self.contained.kill_rest_and_wait().await;
    }

    fn signal(&self, signal: Signal) {
        if self.is_alive {
            // It may have ended since; that is as good.
            let _ = rustix::process::kill_process_group(self.pid, signal);
        }
    }
}

impl Drop for ProcessGroup {
    fn drop(&mut self) {
        self.kill();
        self.activity.group_ended(self.id());
    }
}

/// Lowers the limit that was inherited. The process runs already, if only just: it is set from here since to do so
/// between fork and exec is `unsafe`.
fn limit_open_files(pid: Pid) {
    let inherited = getrlimit(Resource::Nofile);
    let current = inherited.current.map_or(MAX_OPEN_FILES, |current| current.min(MAX_OPEN_FILES));
    // A process that has ended, or may not be touched, keeps what it has.
    let _ = prlimit(Some(pid), Resource::Nofile, Rlimit { current: Some(current), ..inherited });
}

fn raw_pid(pid: Pid) -> i32 {
    pid.as_raw_nonzero().get()
}
