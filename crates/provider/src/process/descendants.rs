//! The provider as a subreaper (`PR_SET_CHILD_SUBREAPER`): it adopts descendants of functions when their parent exits,
//! and kills them when their call has ended.
//!
//! Each process has a mark, a number that its descendants inherit. The mark is stored in a resource limit that does not
//! affect them (realtime scheduling, a value of days) and survives `exec` and an empty environment. This process sets
//! its own limit just before it starts another process, so that no process is ever without a mark. Where the system has
//! a lower hard limit, an environment variable has the mark. An orphan with neither belongs to one of the calls that
//! were running when it was first seen, and is killed when the last of them has ended.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::{
    Pid, Resource, Rlimit, Signal, WaitOptions, getrlimit, kill_process, set_child_subreaper,
    setrlimit, waitpid,
};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::process::procfs::{self, Stat};
use gateway_base::sync::lock_unpoisoned;

/// Environment variable with the mark of a process.
const MARK_VARIABLE: &str = "GATEWAY_PROCESS";
/// Smallest mark: as a limit in microseconds, about 12 days.
const FIRST_MARK: u64 = 1 << 40;
/// Limit for killed processes to exit.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
/// Interval of sweeps while killed processes exit.
const SWEEP_INTERVAL: Duration = Duration::from_millis(2);

/// All processes that this process has started or adopted. It must have no other children.
#[derive(Debug)]
pub(super) struct Descendants {
    own_pid: i32,
    next_mark: AtomicU64,
    /// Held while a process is started: each process inherits its own mark, and a child that is not registered yet is
    /// not mistaken for an orphan. Rank 3: `sweep_lock` may be held.
    spawn_lock: Mutex<()>,
    /// A leaf; `sweep_lock` or `spawn_lock` may be held, or both.
    processes: Mutex<Processes>,
    /// Held during a sweep: a concurrent sweep must not reap a process id that this one is going to kill.
    /// Rank 2: acquired first.
    sweep_lock: Mutex<()>,
}

#[derive(Debug, Default)]
struct Processes {
    /// Processes started here that have not been waited for, by process id.
    started: BTreeMap<i32, StartedProcess>,
    /// Orphans without a mark, by process id and start time, with the marks of the calls that they may belong to.
    unmarked_orphans: BTreeMap<(i32, u64), BTreeSet<u64>>,
}

#[derive(Debug)]
struct StartedProcess {
    mark: u64,
    /// Its descendants are to be killed, even if the process itself has not been waited for yet.
    call_ended: bool,
}

/// A process that was started with a mark. Dropping it kills its descendants.
#[derive(Debug)]
pub(super) struct MarkedProcess {
    pid: i32,
    mark: u64,
    descendants: Arc<Descendants>,
}

impl Descendants {
    /// Makes this process adopt orphans from now on.
    pub(super) fn adopt() -> io::Result<Arc<Self>> {
        let own_pid = rustix::process::getpid();
        set_child_subreaper(Some(own_pid))?;
        let own_pid = own_pid.as_raw_nonzero().get();
        let next = AtomicU64::new(FIRST_MARK);
        Ok(Arc::new(Self {
            own_pid,
            next_mark: next,
            spawn_lock: Mutex::default(),
            processes: Mutex::default(),
            sweep_lock: Mutex::default(),
        }))
    }

    /// Starts `command` with a new mark, which its descendants inherit.
    pub(super) fn spawn(
        descendants: &Arc<Self>,
        command: &mut Command,
    ) -> io::Result<(Child, MarkedProcess)> {
        let mark = descendants.next_mark.fetch_add(1, Relaxed);
        command.env(MARK_VARIABLE, mark.to_string());
        let _starting = lock_unpoisoned(&descendants.spawn_lock);
        let limit = Rlimit { current: Some(mark), ..getrlimit(Resource::Rttime) };
        // Fails if the hard limit is lower: then the variable has the mark.
        let _ = setrlimit(Resource::Rttime, limit);
        let child = command.spawn()?;
        let pid = child.id().and_then(|id| i32::try_from(id).ok());
        let pid = pid.ok_or_else(|| io::Error::other("the process has no id"))?;
        lock_unpoisoned(&descendants.processes)
            .started
            .insert(pid, StartedProcess { mark, call_ended: false });
        Ok((child, MarkedProcess { pid, mark, descendants: Arc::clone(descendants) }))
    }

    /// Sweeps whenever a child exits, until `stopping`.
    pub(super) async fn run(self: Arc<Self>, stopping: CancellationToken) {
        let Ok(mut ended) = signal(SignalKind::child()) else { return };
        loop {
            // Both branches are cancel-safe.
            tokio::select! {
                () = stopping.cancelled() => return,
                _ = ended.recv() => {}
            }
            self.sweep();
        }
    }

    /// Reaps orphans that have exited, and kills orphans whose call has ended. Returns the marks of the killed ones.
    fn sweep(&self) -> Vec<Option<u64>> {
        let _looking = lock_unpoisoned(&self.sweep_lock);
        let (mut to_kill, mut marks) = (Vec::new(), Vec::new());
        let orphans = self.orphans();
        let mut processes = lock_unpoisoned(&self.processes);
        let live = processes.started.values().filter(|started| !started.call_ended);
        let live: BTreeSet<u64> = live.map(|started| started.mark).collect();
        let mut unmarked = BTreeMap::new();
        for orphan in &orphans {
            if orphan.is_zombie && reap_zombie(orphan.pid) {
                continue;
            }
            let mark = inherited_mark(orphan.pid);
            let call_ended = match mark {
                Some(mark) => !live.contains(&mark),
                None => {
                    let name = (orphan.pid, orphan.started);
                    let candidates =
                        processes.unmarked_orphans.remove(&name).unwrap_or_else(|| live.clone());
                    let candidates: BTreeSet<_> = candidates.intersection(&live).copied().collect();
                    let call_ended = candidates.is_empty();
                    if !call_ended {
                        unmarked.insert(name, candidates);
                    }
                    call_ended
                }
            };
            if call_ended {
                to_kill.push(orphan.pid);
                marks.push(mark);
            }
        }
        // Drops entries of orphans that have exited.
        processes.unmarked_orphans = unmarked;
        drop(processes);
        if to_kill.is_empty() {
            return marks;
        }
        // Their descendants are killed with them: they would be adopted only after their parents have exited.
        let all = procfs::all();
        let mut at = 0;
        while let Some(parent) = to_kill.get(at).copied() {
            to_kill
                .extend(all.iter().filter(|child| child.parent == parent).map(|child| child.pid));
            at += 1;
        }
        for pid in to_kill.iter().filter_map(|pid| Pid::from_raw(*pid)) {
            // Ignores processes that have exited meanwhile.
            let _ = kill_process(pid, Signal::KILL);
        }
        marks
    }

    /// Returns the children of this process that it has not started.
    fn orphans(&self) -> Vec<Stat> {
        let _spawn_lock = lock_unpoisoned(&self.spawn_lock);
        let processes = lock_unpoisoned(&self.processes);
        // The kernel makes orphans children of the first thread.
        let children = match procfs::children(self.own_pid) {
            Some(children) => children.into_iter().filter_map(procfs::stat).collect(),
            None => procfs::all(),
        };
        let is_orphan =
            |stat: &Stat| stat.parent == self.own_pid && !processes.started.contains_key(&stat.pid);
        children.into_iter().filter(is_orphan).collect()
    }
}

/// Reaps an orphan. Nothing else waits for it, since it was not started here. Returns `false` if only its first thread
/// has exited, which looks like a zombie as well.
fn reap_zombie(pid: i32) -> bool {
    let waited = Pid::from_raw(pid).map(|pid| waitpid(Some(pid), WaitOptions::NOHANG));
    !matches!(waited, Some(Ok(None)))
}

/// Returns the mark that a process has inherited.
fn inherited_mark(pid: i32) -> Option<u64> {
    let variable = || procfs::environment_variable(pid, MARK_VARIABLE)?.parse().ok();
    procfs::realtime_limit(pid).filter(|limit| *limit >= FIRST_MARK).or_else(variable)
}

impl MarkedProcess {
    /// Kills orphans of the process. Later orphans are killed when they appear.
    pub(super) fn kill(&self) {
        if let Some(started) =
            lock_unpoisoned(&self.descendants.processes).started.get_mut(&self.pid)
            && started.mark == self.mark
        {
            started.call_ended = true;
        }
        self.descendants.sweep();
    }

    /// Kills the descendants of a process that has been waited for, and waits until they have exited.
    pub(super) async fn kill_rest_and_wait(&self) {
        self.unregister();
        // An orphan without a mark may be a descendant. Orphans of other calls may be stuck and are not waited for.
        let may_be_descendant = |mark: &Option<u64>| mark.is_none_or(|mark| mark == self.mark);
        let emptied = async {
            while self.descendants.sweep().iter().any(may_be_descendant) {
                sleep(SWEEP_INTERVAL).await;
            }
        };
        if timeout(KILL_TIMEOUT, emptied).await.is_err() {
            tracing::warn!("Killed descendants of a function do not exit");
        }
    }

    fn unregister(&self) {
        let mut processes = lock_unpoisoned(&self.descendants.processes);
        // The id may have been reused by another process.
        if processes.started.get(&self.pid).is_some_and(|started| started.mark == self.mark) {
            processes.started.remove(&self.pid);
        }
    }
}

impl Drop for MarkedProcess {
    fn drop(&mut self) {
        self.unregister();
        self.descendants.sweep();
    }
}
