//! Cgroups (version 2) of the provider's own, one for each process that a function runs as.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use tokio::process::Command;
use tokio::time::{sleep, timeout};

use crate::provider::process::command::find_program;
use crate::provider::process::sync::lock_unpoisoned;

/// How the names of providers' directories begin.
const DIRECTORY_PREFIX: &str = "gateway-provider-";
/// How often a directory is created, in case another provider that starts removes it before it is locked.
const MAX_CREATE_ATTEMPTS: usize = 10;
/// Cgroups that are kept for the next call. To create one costs little, but the kernel takes time to forget it.
const MAX_IDLE_CGROUPS: usize = 64;
/// How many kept ones are looked at for one that is empty.
const MAX_IDLE_CHECKS: usize = 4;
/// How long killed processes may take to be gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
const EMPTY_POLL_INTERVAL: Duration = Duration::from_millis(2);
/// How long trying it out may take.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

/// The provider's cgroups, below one directory.
#[derive(Debug)]
pub(super) struct Cgroups {
    root: PathBuf,
    /// The directory, locked: nobody else removes it while this process lives.
    _lock: File,
    /// Names the directory for the next provider, should this one be killed.
    record_path: PathBuf,
    created: AtomicU64,
    idle: Mutex<Vec<PathBuf>>,
    warned: AtomicBool,
}

/// A cgroup with a process in it.
#[derive(Debug)]
pub(super) struct Cgroup {
    path: PathBuf,
    cgroups: Arc<Cgroups>,
}

impl Cgroups {
    /// Creates a directory and finds out whether a process can be put there and killed; an error says why not. Kills
    /// what an earlier provider, which has written `record_path`, has left in its own, and removes the empty ones that other
    /// providers have left.
    pub(super) async fn open(record: PathBuf, path: &str) -> anyhow::Result<Arc<Self>> {
        kill_leftovers(&record).await;
        let mounts = fs::read_to_string("/proc/self/mountinfo").context("no mountinfo")?;
        let own = fs::read_to_string("/proc/self/cgroup").context("no cgroup")?;
        let home = own_cgroup_path(&mounts, &own).context("no cgroup of version 2 is mounted")?;
        let (root, lock) = create_root(&home)?;
        remove_abandoned(&home);
        let cgroups = Arc::new(Self {
            root,
            _lock: lock,
            record_path: record,
            created: AtomicU64::new(0),
            idle: Mutex::default(),
            warned: AtomicBool::new(false),
        });
        cgroups.probe(path).await?;
        let shown = cgroups.root.display().to_string();
        fs::write(&cgroups.record_path, shown).context("cannot write to the state directory")?;
        Ok(cgroups)
    }

    /// Removes the directory. What cannot be removed is left for the next provider to clear.
    pub(super) fn close(&self) {
        if remove_root(&self.root) {
            let _ = fs::remove_file(&self.record_path);
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.root
    }

    /// Puts a process that has just been started into a cgroup of its own; `None` if that fails.
    ///
    /// It runs already: what it has started before belongs there, too. The system offers to start a process in a
    /// cgroup, but not without `unsafe`.
    pub(super) fn contain(self: &Arc<Self>, pid: u32) -> Option<Cgroup> {
        let held = self.acquire().and_then(|cgroup| {
            cgroup.add(pid)?;
            Ok(cgroup)
        });
        let held = held.inspect_err(|error| self.warn_once(error)).ok()?;
        held.add_descendants(pid, children);
        Some(held)
    }

    /// Logs the first failure to put a process into a cgroup. A process that has ended is no failure.
    fn warn_once(&self, error: &io::Error) {
        let ended = error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error());
        if !ended && !self.warned.swap(true, Relaxed) {
            tracing::warn!(%error, "A process cannot be put into a cgroup");
        }
    }

    fn acquire(self: &Arc<Self>) -> io::Result<Cgroup> {
        let mut idle = lock_unpoisoned(&self.idle);
        let empty = idle.iter().take(MAX_IDLE_CHECKS).position(|path| is_empty(path));
        let path = match empty {
            Some(at) => idle.swap_remove(at),
            None => {
                let path = self.root.join(self.created.fetch_add(1, Relaxed).to_string());
                fs::create_dir(&path)?;
                path
            }
        };
        drop(idle);
        Ok(Cgroup { path, cgroups: Arc::clone(self) })
    }

    async fn probe(self: &Arc<Self>, path: &str) -> anyhow::Result<()> {
        let program = find_program("sleep", path).context("sleep is not installed")?;
        let mut command = Command::new(program);
        command.arg("60").stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
        let mut child = command.spawn()?;
        let cgroup = self.acquire()?;
        cgroup.add(child.id().context("the process has no id")?).context("it takes no process")?;
        fs::write(cgroup.path.join("cgroup.kill"), "1").context("it cannot be killed")?;
        let ended =
            timeout(PROBE_TIMEOUT, child.wait()).await.context("what is in it does not end")??;
        ensure!(!ended.success(), "what is in it was not killed");
        Ok(())
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        self.close();
    }
}

impl Cgroup {
    fn add(&self, pid: u32) -> io::Result<()> {
        fs::write(self.path.join("cgroup.procs"), pid.to_string())
    }

    /// Adds all that `pid`, which is in here, had started before. Any of it may end meanwhile: that must not end `pid`.
    fn add_descendants(&self, pid: u32, children: impl Fn(u32) -> Vec<u32>) {
        let mut pids = children(pid);
        while let Some(pid) = pids.pop() {
            match self.add(pid) {
                Ok(()) => pids.extend(children(pid)),
                Err(error) => self.cgroups.warn_once(&error),
            }
        }
    }

    /// Kills all that is in it.
    pub(super) fn kill(&self) {
        if !is_empty(&self.path)
            && let Err(error) = fs::write(self.path.join("cgroup.kill"), "1")
        {
            tracing::warn!(%error, "A cgroup cannot be killed");
        }
    }

    /// Waits until all that is in it is gone, which has been killed.
    pub(super) async fn kill_and_wait(&self) {
        self.kill();
        let emptied = async {
            while !is_empty(&self.path) {
                sleep(EMPTY_POLL_INTERVAL).await;
            }
        };
        if timeout(KILL_TIMEOUT, emptied).await.is_err() {
            tracing::warn!(path = %self.path.display(), "Killed processes do not end");
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        self.kill();
        let path = std::mem::take(&mut self.path);
        let mut idle = lock_unpoisoned(&self.cgroups.idle);
        // One that is not empty yet cannot be removed, and is looked at again.
        if idle.len() < MAX_IDLE_CGROUPS || fs::remove_dir(&path).is_err() {
            idle.push(path);
        }
    }
}

fn is_empty(path: &Path) -> bool {
    let events = fs::read_to_string(path.join("cgroup.events"));
    // One that is not there holds nothing.
    events.map_or(true, |events| events.lines().any(|line| line == "populated 0"))
}

/// The children of a process that its threads have started, as far as the kernel tells.
fn children(pid: u32) -> Vec<u32> {
    let listed = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    listed.unwrap_or_default().split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

/// Where this process may create cgroups: its own cgroup, as it is mounted. `None` without version 2.
fn own_cgroup_path(mountinfo: &str, own: &str) -> Option<PathBuf> {
    let own = own.lines().find_map(|line| line.strip_prefix("0::"))?;
    mountinfo.lines().find_map(|line| {
        // Fields before the dash: id, parent, device, root, mount point, …; after it: type, source, options.
        let (place, kind) = line.split_once(" - ")?;
        let mut fields = place.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        if kind.split(' ').next() != Some("cgroup2") || point.contains('\\') {
            return None;
        }
        let below = if root == "/" { own } else { own.strip_prefix(root)? };
        Some(Path::new(point).join(below.trim_start_matches('/')))
    })
}

/// Creates a provider's directory in `own_cgroup_path`, and locks it.
fn create_root(home: &Path) -> anyhow::Result<(PathBuf, File)> {
    for _ in 0..MAX_CREATE_ATTEMPTS {
        let root = home.join(format!("{DIRECTORY_PREFIX}{}", uuid::Uuid::new_v4().simple()));
        fs::create_dir(&root).context("no cgroup can be created")?;
        if let Some(lock) = lock_directory(&root) {
            return Ok((root, lock));
        }
    }
    bail!("other providers remove each cgroup that is created")
}

/// Locks a provider's directory; `None` if another process has locked or removed it.
fn lock_directory(root: &Path) -> Option<File> {
    let directory = File::open(root).ok()?;
    if let Err(TryLockError::WouldBlock) = directory.try_lock() {
        return None;
    }
    let locked = directory.metadata().ok()?;
    let there = fs::metadata(root).ok()?;
    (locked.ino() == there.ino()).then_some(directory)
}

/// Removes the directories in `own_cgroup_path` of providers that were killed, unless a process is in them. A provider that lives
/// has locked its own.
fn remove_abandoned(home: &Path) {
    for entry in fs::read_dir(home).into_iter().flatten().flatten() {
        let is_providers = entry.file_name().to_string_lossy().starts_with(DIRECTORY_PREFIX);
        let path = entry.path();
        if is_providers
            && let Some(_lock) = lock_directory(&path)
            && is_empty(&path)
        {
            remove_root(&path);
        }
    }
}

/// Kills what is left of an earlier provider.
async fn kill_leftovers(record: &Path) {
    let Ok(text) = fs::read_to_string(record) else { return };
    let root = Path::new(text.trim());
    let is_ours =
        root.file_name().is_some_and(|name| name.to_string_lossy().starts_with(DIRECTORY_PREFIX));
    if is_ours && root.join("cgroup.procs").exists() {
        let _ = fs::write(root.join("cgroup.kill"), "1");
        let removed = async {
            while !remove_root(root) {
                sleep(EMPTY_POLL_INTERVAL).await;
            }
        };
        if timeout(KILL_TIMEOUT, removed).await.is_err() {
            tracing::warn!(path = %root.display(), "Processes of an earlier provider do not end");
        }
    }
    let _ = fs::remove_file(record);
}

/// Removes a directory of cgroups without processes; whether it is gone.
fn remove_root(root: &Path) -> bool {
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let _ = fs::remove_dir(entry.path());
    }
    fs::remove_dir(root).is_ok() || !root.exists()
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use rustix::process::{Pid, Signal, kill_process};

    use super::*;

    #[tokio::test]
    async fn a_process_outlives_those_that_it_started_before_it_was_put_there() {
        let place = tempfile::tempdir().unwrap();
        // Not every machine lets this process create cgroups.
        let opened = Cgroups::open(place.path().join("cgroup"), "/usr/bin:/bin").await;
        let Ok(cgroups) = opened else { return };
        let start = |program: &str| {
            let mut command = Command::new(program);
            command.arg("1000").kill_on_drop(true).spawn().unwrap()
        };
        let (mut function, mut below) = (start("sleep"), start("true"));
        let (pid, ended) = (function.id().unwrap(), below.id().unwrap());
        below.wait().await.unwrap();

        let held = cgroups.contain(pid).unwrap();
        held.add_descendants(pid, |of| if of == pid { vec![ended] } else { Vec::new() });
        let inside = fs::read_to_string(held.path.join("cgroup.procs")).unwrap();
        assert_eq!(inside.trim(), pid.to_string());
        // One that was killed would not get as far as this signal.
        kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::TERM).unwrap();
        assert_eq!(function.wait().await.unwrap().signal(), Some(Signal::TERM.as_raw()));
    }

    #[tokio::test]
    async fn only_empty_cgroups_of_providers_that_are_gone_are_removed() {
        let place = tempfile::tempdir().unwrap();
        let open = async |name: &str| Cgroups::open(place.path().join(name), "/usr/bin:/bin").await;
        // Not every machine lets this process create cgroups.
        let Ok(living) = open("living").await else { return };
        let home = living.root.parent().unwrap();
        // As a provider leaves them that is killed: after calls, and with a process that it could not end.
        let left = |name: &str| {
            let root = home.join(format!("{DIRECTORY_PREFIX}test-{name}-{}", std::process::id()));
            fs::create_dir(&root).unwrap();
            fs::create_dir(root.join("0")).unwrap();
            root
        };
        let (empty, populated) = (left("empty"), left("populated"));
        let mut process = Command::new("sleep").arg("1000").kill_on_drop(true).spawn().unwrap();
        fs::write(populated.join("0/cgroup.procs"), process.id().unwrap().to_string()).unwrap();

        let next = open("next").await.unwrap();
        assert!(!empty.exists() && populated.join("0").exists());
        assert!(living.root.exists() && living.acquire().unwrap().path.exists());

        process.kill().await.unwrap();
        let roots = [living.root.clone(), next.root.clone(), populated];
        drop((living, next));
        // The next one to start clears the rest.
        drop(open("last").await.unwrap());
        assert!(!roots.iter().any(|root| root.exists()));
    }

    #[test]
    fn cgroups_are_created_below_this_processes_own_as_it_is_mounted() {
        let unified = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate";
        let hybrid = "29 23 0:25 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      30 23 0:26 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 none rw";
        let container = "30 23 0:26 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup rw";
        let of = |mounts: &str, own: &str| {
            own_cgroup_path(mounts, own).map(|path| path.display().to_string())
        };
        let is = |path: &str| Some(path.to_owned());
        assert_eq!(of(unified, "0::/a.slice/b\n"), is("/sys/fs/cgroup/a.slice/b"));
        assert_eq!(of(hybrid, "1:cpu:/x\n0::/\n"), is("/sys/fs/cgroup/unified/"));
        assert_eq!(of(container, "0::/docker/abc/d\n"), is("/sys/fs/cgroup/d"));
        assert_eq!(of(container, "0::/elsewhere\n"), None);
        assert_eq!(of(unified, "1:cpu:/x\n"), None);
        assert_eq!(of("29 23 0:25 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu", "0::/\n"), None);
    }
}
