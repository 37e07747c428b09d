//! A process with its process group and its other descendants, which are terminated together.

use std::io;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, prlimit};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::process::activity::Activity;
use crate::process::containment::ContainedProcess;
use crate::process::orphans::{Orphans, ProcessRecord};

/// Limit for a killed process to exit; it can hang in the kernel.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// Interval of checks for remaining processes of the group: the kernel signals only the exit of the leader.
const GROUP_POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Soft limit of open files of a process. The provider's own limit is higher, but some programs iterate over all file
/// descriptors up to the limit, or cannot use descriptors above 1024.
const MAX_OPEN_FILES: u64 = 1024;

/// A running process group. Dropping it kills it.
#[derive(Debug)]
pub(super) struct ProcessGroup {
    child: Child,
    pid: Pid,
    /// True while the group has processes. Afterwards its id may be reused and must not be signalled.
    is_alive: bool,
    activity: Arc<Activity>,
    _record: ProcessRecord,
    /// All descendants, including those in other groups.
    contained: ContainedProcess,
}

impl ProcessGroup {
    /// Starts `command` as the leader of a new group.
    pub(super) fn start(
        command: &mut Command,
        activity: &Arc<Activity>,
        orphans: &Orphans,
    ) -> io::Result<Self> {
        let command = command.process_group(0).kill_on_drop(true);
        let (child, contained) = orphans.containment.spawn(command)?;
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
            contained,
        })
    }

    /// Returns the id of the leader, which is the id of the group.
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

    /// Waits for the leader to exit. Cancel-safe.
    pub(super) async fn wait_leader(&mut self) -> io::Result<ExitStatus> {
        let status = self.child.wait().await?;
        // The id stays reserved while the group has other processes. Without any, it may be reused from here on.
        self.is_alive = rustix::process::test_kill_process_group(self.pid).is_ok();
        Ok(status)
    }

    /// Kills the group and all descendants, without waiting.
    pub(super) fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.is_alive = false;
        self.contained.kill();
    }

    /// Sends SIGTERM to the group, and kills it after `grace` or when `force_kill` is cancelled.
    pub(super) async fn terminate(mut self, grace: Duration, force_kill: &CancellationToken) {
        self.signal(Signal::TERM);
        // Both branches are cancel-safe.
        tokio::select! {
            _ = timeout(grace, self.wait_all()) => {}
            () = force_kill.cancelled() => {}
        }
        self.kill_and_wait().await;
    }

    /// Waits for all processes of the group: a shell often exits before its children.
    async fn wait_all(&mut self) -> io::Result<()> {
        self.wait_leader().await?;
        while self.is_alive {
            tokio::time::sleep(GROUP_POLL_INTERVAL).await;
            self.is_alive = rustix::process::test_kill_process_group(self.pid).is_ok();
        }
        Ok(())
    }

    /// Kills the group and all descendants, and waits until they have exited.
    pub(super) async fn kill_and_wait(mut self) {
        self.kill();
        if timeout(KILL_TIMEOUT, self.child.wait()).await.is_err() {
            tracing::warn!(pid = self.id(), "A killed process does not exit");
        }
        self.contained.kill_rest_and_wait().await;
    }

    fn signal(&self, signal: Signal) {
        if self.is_alive {
            // Ignores a group that has exited meanwhile.
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

/// Lowers the inherited limit of open files. This happens after the start, since setting it between fork and exec would
/// require `unsafe`.
fn limit_open_files(pid: Pid) {
    let inherited = getrlimit(Resource::Nofile);
    let current = inherited.current.map_or(MAX_OPEN_FILES, |current| current.min(MAX_OPEN_FILES));
    // Ignores a process that has exited or may not be changed.
    let _ = prlimit(Some(pid), Resource::Nofile, Rlimit { current: Some(current), ..inherited });
}

fn raw_pid(pid: Pid) -> i32 {
    pid.as_raw_nonzero().get()
}
