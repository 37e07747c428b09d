//! The provider as the parent of orphans: what a function's process has started is adopted by the provider when its
//! parent ends (`PR_SET_CHILD_SUBREAPER`), and killed when its call has ended.
//!
//! Which call an orphan belongs to is told by a number that processes inherit, in a resource limit that means nothing to
//! them (of realtime scheduling, in weeks) and survives `exec` and an emptied environment. This process sets its own
//! just before it starts another, so that there is no moment without it. Where the system has a lower limit, a variable
//! has the number. An orphan with neither belongs to one of the calls that ran when it was seen first, and ends with the
//! last of them.

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

use crate::provider::process::procfs::{self, Stat};
use crate::provider::process::sync::lock_unpoisoned;

/// The variable that has a process's mark.
const MARK_VARIABLE: &str = "GATEWAY_PROCESS";
/// Where marks begin: in microseconds, some 12 days.
const FIRST_MARK: u64 = 1 << 40;
/// How long killed processes may take to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
const SWEEP_INTERVAL: Duration = Duration::from_millis(2);

/// All that this process has started or adopted. It must have no children but those.
#[derive(Debug)]
pub(super) struct Descendants {
    own_pid: i32,
    next_mark: AtomicU64,
    /// Held while a process is started: it inherits its own mark, and a child that is not known yet is not taken for an
    /// orphan.
    spawn_lock: Mutex<()>,
    processes: Mutex<Processes>,
    /// Held while orphans are looked at: an id that one look has found must not be freed by another.
    sweep_lock: Mutex<()>,
}

#[derive(Debug, Default)]
struct Processes {
    /// Processes that were started here and have not been waited for.
    started: BTreeMap<i32, StartedProcess>,
    /// Orphans without a mark, by id and start, each with the marks of the calls that it may belong to.
    unmarked_orphans: BTreeMap<(i32, u64), BTreeSet<u64>>,
}

#[derive(Debug)]
struct StartedProcess {
    mark: u64,
    /// What it has left is to be killed, even if the process itself has not been waited for yet.
    call_ended: bool,
}

/// A process that was started with a mark.
#[derive(Debug)]
pub(super) struct MarkedProcess {
    pid: i32,
    mark: u64,
    descendants: Arc<Descendants>,
}

impl Descendants {
    /// Has this process adopt orphans from now on.
    pub(super) fn adopt() -> io::Result<Arc<Self>> {
        let own = rustix::process::getpid();
        set_child_subreaper(Some(own))?;
        let own = own.as_raw_nonzero().get();
        let next = AtomicU64::new(FIRST_MARK);
        Ok(Arc::new(Self {
            own_pid: own,
            next_mark: next,
            spawn_lock: Mutex::default(),
            processes: Mutex::default(),
            sweep_lock: Mutex::default(),
        }))
    }

    /// Starts `command` with a mark that all it starts will have.
    pub(super) fn spawn(
        descendants: &Arc<Self>,
        command: &mut Command,
    ) -> io::Result<(Child, MarkedProcess)> {
        let mark = descendants.next_mark.fetch_add(1, Relaxed);
        command.env(MARK_VARIABLE, mark.to_string());
        let _starting = lock_unpoisoned(&descendants.spawn_lock);
        let limit = Rlimit { current: Some(mark), ..getrlimit(Resource::Rttime) };
        // If it is lower, the variable has to do.
        let _ = setrlimit(Resource::Rttime, limit);
        let child = command.spawn()?;
        let pid = child.id().and_then(|id| i32::try_from(id).ok());
        let pid = pid.ok_or_else(|| io::Error::other("the process has no id"))?;
        lock_unpoisoned(&descendants.processes)
            .started
            .insert(pid, StartedProcess { mark, call_ended: false });
        Ok((child, MarkedProcess { pid, mark, descendants: Arc::clone(descendants) }))
    }

    /// Buries orphans that have ended, and kills those whose call has, whenever a child ends, until `stopping`.
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

    /// Buries orphans that have ended, and kills those whose call has. Returns the marks of the latter.
    fn sweep(&self) -> Vec<Option<u64>> {
        let _looking = lock_unpoisoned(&self.sweep_lock);
        let (mut doomed, mut marks) = (Vec::new(), Vec::new());
        let orphans = self.orphans();
        let mut known = lock_unpoisoned(&self.processes);
        let live = known.started.values().filter(|started| !started.call_ended);
        let live: BTreeSet<u64> = live.map(|started| started.mark).collect();
        let mut unmarked = BTreeMap::new();
        for orphan in &orphans {
            if orphan.is_zombie && reap_zombie(orphan.pid) {
                continue;
            }
            let mark = inherited_mark(orphan.pid);
            let is_over = match mark {
                Some(mark) => !live.contains(&mark),
                None => {
                    let name = (orphan.pid, orphan.started);
                    let may_be =
                        known.unmarked_orphans.remove(&name).unwrap_or_else(|| live.clone());
                    let may_be: BTreeSet<_> = may_be.intersection(&live).copied().collect();
                    let is_over = may_be.is_empty();
                    if !is_over {
                        unmarked.insert(name, may_be);
                    }
                    is_over
                }
            };
            if is_over {
                doomed.push(orphan.pid);
                marks.push(mark);
            }
        }
        // Of the others, none is there any more.
        known.unmarked_orphans = unmarked;
        drop(known);
        if doomed.is_empty() {
            return marks;
        }
        // With all below them, which would be adopted only when they have ended.
        let all = procfs::all();
        let mut at = 0;
        while let Some(parent) = doomed.get(at).copied() {
            doomed.extend(all.iter().filter(|child| child.parent == parent).map(|child| child.pid));
            at += 1;
        }
        for pid in doomed.iter().filter_map(|pid| Pid::from_raw(*pid)) {
            // It may have ended since; that is as good.
            let _ = kill_process(pid, Signal::KILL);
        }
        marks
    }

    /// This process's children that it has not started.
    fn orphans(&self) -> Vec<Stat> {
        let _nobody_starts = lock_unpoisoned(&self.spawn_lock);
        let known = lock_unpoisoned(&self.processes);
        // The kernel gives orphans to the first thread.
        let children = match procfs::children(self.own_pid) {
            Some(children) => children.into_iter().filter_map(procfs::stat).collect(),
            None => procfs::all(),
        };
        let is_orphan =
            |stat: &Stat| stat.parent == self.own_pid && !known.started.contains_key(&stat.pid);
        children.into_iter().filter(is_orphan).collect()
    }
}

/// Takes the exit status of an orphan, which nobody else waits for: it was not started here. `false`: its first thread
/// alone has ended, which looks the same.
fn reap_zombie(pid: i32) -> bool {
    let waited = Pid::from_raw(pid).map(|pid| waitpid(Some(pid), WaitOptions::NOHANG));
    !matches!(waited, Some(Ok(None)))
}

/// The mark that a process has inherited.
fn inherited_mark(pid: i32) -> Option<u64> {
    let variable = || procfs::environment_variable(pid, MARK_VARIABLE)?.parse().ok();
    procfs::realtime_limit(pid).filter(|limit| *limit >= FIRST_MARK).or_else(variable)
}

impl MarkedProcess {
    /// Kills what the process has left. What it would still leave is killed when it has ended.
    pub(super) fn kill(&self) {
        if let Some(started) =
            lock_unpoisoned(&self.descendants.processes).started.get_mut(&self.pid)
            && started.mark == self.mark
        {
            started.call_ended = true;
        }
        self.descendants.sweep();
    }

    /// The process has been waited for: kills what it has left, and waits until that is gone.
    pub(super) async fn kill_rest_and_wait(&self) {
        self.unregister();
        // One without a mark may be its own. One of another call may be stuck, which is not waited for here.
        let may_be_own = |mark: &Option<u64>| mark.is_none_or(|mark| mark == self.mark);
        let emptied = async {
            while self.descendants.sweep().iter().any(may_be_own) {
                sleep(SWEEP_INTERVAL).await;
            }
        };
        if timeout(KILL_TIMEOUT, emptied).await.is_err() {
            tracing::warn!("What a function has started does not end");
        }
    }

    fn unregister(&self) {
        let mut known = lock_unpoisoned(&self.descendants.processes);
        // The id may be another's by now.
        if known.started.get(&self.pid).is_some_and(|started| started.mark == self.mark) {
            known.started.remove(&self.pid);
        }
    }
}

impl Drop for MarkedProcess {
    fn drop(&mut self) {
        self.unregister();
        self.descendants.sweep();
    }
}
