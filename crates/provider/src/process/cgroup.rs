//! Cgroups (version 2) of the provider, one for each process of a function.

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

use crate::process::command::find_program;
use gateway_base::sync::lock_unpoisoned;

/// Prefix of the names of providers' root directories.
const DIRECTORY_PREFIX: &str = "gateway-provider-";
/// Attempts to create the root directory: another provider that starts may remove it before it is locked.
const MAX_CREATE_ATTEMPTS: usize = 10;
/// Maximum number of empty cgroups kept for reuse. Creating one is cheap, but the kernel frees a removed one slowly.
const MAX_IDLE_CGROUPS: usize = 64;
/// Number of idle cgroups checked for an empty one.
const MAX_IDLE_CHECKS: usize = 4;
/// Limit for killed processes to exit.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
/// Interval of checks whether a cgroup is empty.
const EMPTY_POLL_INTERVAL: Duration = Duration::from_millis(2);
/// Limit for the probe of the kernel's support.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

/// The provider's cgroups, below one root directory.
#[derive(Debug)]
pub(super) struct Cgroups {
    root: PathBuf,
    /// Lock on the root directory: other providers do not remove it while this process runs.
    _lock: File,
    /// File with the path of the root directory, for the next provider if this one is killed.
    record_path: PathBuf,
    created: AtomicU64,
    /// Directories without a process, for the next call. A leaf, held for a few file operations.
    idle: Mutex<Vec<PathBuf>>,
    warned: AtomicBool,
}

/// A cgroup that contains a process.
#[derive(Debug)]
pub(super) struct Cgroup {
    path: PathBuf,
    cgroups: Arc<Cgroups>,
}

impl Cgroups {
    /// Creates the root directory and probes whether a process can be moved into a cgroup and killed there; an error
    /// has the reason. Kills processes of the earlier provider that wrote the file `record`, and removes empty root
    /// directories of other providers that were killed.
    pub(super) async fn open(record: PathBuf, path: &str) -> anyhow::Result<Arc<Self>> {
        kill_leftovers(&record).await;
        let mounts = fs::read_to_string("/proc/self/mountinfo").context("no mountinfo")?;
        let own = fs::read_to_string("/proc/self/cgroup").context("no cgroup")?;
        let parent = own_cgroup_path(&mounts, &own).context("no cgroup of version 2 is mounted")?;
        let (root, lock) = create_root(&parent)?;
        remove_abandoned(&parent);
        let cgroups = Arc::new(Self {
            root,
            _lock: lock,
            record_path: record,
            created: AtomicU64::new(0),
            idle: Mutex::default(),
            warned: AtomicBool::new(false),
        });
        cgroups.probe(path).await?;
        let path = cgroups.root.display().to_string();
        fs::write(&cgroups.record_path, path).context("cannot write to the state directory")?;
        Ok(cgroups)
    }

    /// Removes the root directory. If that fails, the next provider removes it.
    pub(super) fn close(&self) {
        if remove_root(&self.root) {
            let _ = fs::remove_file(&self.record_path);
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.root
    }

    /// Moves a new process into its own cgroup; `None` if that fails.
    ///
    /// The process runs already, so its existing children are moved as well. Starting a process inside of a cgroup
    /// would require `unsafe`.
    pub(super) fn contain(self: &Arc<Self>, pid: u32) -> Option<Cgroup> {
        let cgroup = self.acquire().and_then(|cgroup| {
            cgroup.add(pid)?;
            Ok(cgroup)
        });
        let cgroup = cgroup.inspect_err(|error| self.warn_once(error)).ok()?;
        cgroup.add_descendants(pid, children);
        Some(cgroup)
    }

    /// Logs the first failure to move a process into a cgroup. A process that has exited is not a failure.
    fn warn_once(&self, error: &io::Error) {
        let ended = error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error());
        if !ended && !self.warned.swap(true, Relaxed) {
            tracing::warn!(%error, "Cannot move a process into a cgroup");
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
        cgroup
            .add(child.id().context("the process has no id")?)
            .context("no process can be moved into it")?;
        fs::write(cgroup.path.join("cgroup.kill"), "1")
            .context("its processes cannot be killed")?;
        let ended =
            timeout(PROBE_TIMEOUT, child.wait()).await.context("its processes do not exit")??;
        ensure!(!ended.success(), "its processes were not killed");
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

    /// Moves all descendants of `pid` into this cgroup. They may exit meanwhile; that is not an error of `pid`.
    fn add_descendants(&self, pid: u32, children: impl Fn(u32) -> Vec<u32>) {
        let mut pids = children(pid);
        while let Some(pid) = pids.pop() {
            match self.add(pid) {
                Ok(()) => pids.extend(children(pid)),
                Err(error) => self.cgroups.warn_once(&error),
            }
        }
    }

    /// Kills all processes in this cgroup.
    pub(super) fn kill(&self) {
        if !is_empty(&self.path)
            && let Err(error) = fs::write(self.path.join("cgroup.kill"), "1")
        {
            tracing::warn!(%error, "Cannot kill a cgroup");
        }
    }

    /// Kills all processes in this cgroup and waits until they have exited, for at most `KILL_TIMEOUT`.
    pub(super) async fn kill_and_wait(&self) {
        self.kill();
        let emptied = async {
            while !is_empty(&self.path) {
                sleep(EMPTY_POLL_INTERVAL).await;
            }
        };
        if timeout(KILL_TIMEOUT, emptied).await.is_err() {
            tracing::warn!(path = %self.path.display(), "Killed processes do not exit");
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        self.kill();
        let path = std::mem::take(&mut self.path);
        let mut idle = lock_unpoisoned(&self.cgroups.idle);
        // A cgroup that is not empty yet cannot be removed; it stays in the list.
        if idle.len() < MAX_IDLE_CGROUPS || fs::remove_dir(&path).is_err() {
            idle.push(path);
        }
    }
}

fn is_empty(path: &Path) -> bool {
    let events = fs::read_to_string(path.join("cgroup.events"));
    // A cgroup that does not exist counts as empty.
    events.map_or(true, |events| events.lines().any(|line| line == "populated 0"))
}

/// Returns the children of a process; empty if the kernel does not list them.
fn children(pid: u32) -> Vec<u32> {
    let listed = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    listed.unwrap_or_default().split_whitespace().filter_map(|pid| pid.parse().ok()).collect()
}

/// Returns the directory of this process's own cgroup, in which it may create others. `None` without version 2.
fn own_cgroup_path(mountinfo: &str, own: &str) -> Option<PathBuf> {
    let own = own.lines().find_map(|line| line.strip_prefix("0::"))?;
    mountinfo.lines().find_map(|line| {
        // Format: id, parent, device, root, mount point, …, dash, type, source, options.
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

/// Creates and locks a root directory in `parent`.
fn create_root(parent: &Path) -> anyhow::Result<(PathBuf, File)> {
    for _ in 0..MAX_CREATE_ATTEMPTS {
        let root = parent.join(format!("{DIRECTORY_PREFIX}{}", uuid::Uuid::new_v4().simple()));
        fs::create_dir(&root).context("no cgroup can be created")?;
        if let Some(lock) = lock_directory(&root) {
            return Ok((root, lock));
        }
    }
    bail!("other providers remove each cgroup that is created")
}

/// Locks a root directory; `None` if another process has locked or removed it.
fn lock_directory(root: &Path) -> Option<File> {
    let directory = File::open(root).ok()?;
    if let Err(TryLockError::WouldBlock) = directory.try_lock() {
        return None;
    }
    let locked = directory.metadata().ok()?;
    let current = fs::metadata(root).ok()?;
    (locked.ino() == current.ino()).then_some(directory)
}

/// Removes the root directories in `parent` of providers that were killed, unless they contain a process. A running
/// provider has locked its own.
fn remove_abandoned(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
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

/// Kills the processes of an earlier provider.
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
            tracing::warn!(path = %root.display(), "Processes of an earlier provider do not exit");
        }
    }
    let _ = fs::remove_file(record);
}

/// Removes a root directory with its empty cgroups. Returns whether it is removed.
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
    async fn a_process_is_not_killed_if_its_child_exits_while_they_are_moved() {
        let place = tempfile::tempdir().unwrap();
        // Skipped on machines where this process cannot create cgroups.
        let opened = Cgroups::open(place.path().join("cgroup"), "/usr/bin:/bin").await;
        let Ok(cgroups) = opened else { return };
        let start = |program: &str| {
            let mut command = Command::new(program);
            command.arg("1000").kill_on_drop(true).spawn().unwrap()
        };
        let (mut function, mut below) = (start("sleep"), start("true"));
        let (pid, ended) = (function.id().unwrap(), below.id().unwrap());
        below.wait().await.unwrap();

        let cgroup = cgroups.contain(pid).unwrap();
        cgroup.add_descendants(pid, |of| if of == pid { vec![ended] } else { Vec::new() });
        let inside = fs::read_to_string(cgroup.path.join("cgroup.procs")).unwrap();
        assert_eq!(inside.trim(), pid.to_string());
        // A killed process would not end by this signal.
        kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::TERM).unwrap();
        assert_eq!(function.wait().await.unwrap().signal(), Some(Signal::TERM.as_raw()));
    }

    #[tokio::test]
    async fn only_empty_cgroups_of_killed_providers_are_removed() {
        let place = tempfile::tempdir().unwrap();
        let open = async |name: &str| Cgroups::open(place.path().join(name), "/usr/bin:/bin").await;
        // Skipped on machines where this process cannot create cgroups.
        let Ok(living) = open("living").await else { return };
        let parent = living.root.parent().unwrap();
        // As left by killed providers: one without, one with a running process.
        let left = |name: &str| {
            let root = parent.join(format!("{DIRECTORY_PREFIX}test-{name}-{}", std::process::id()));
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
        // The next provider removes the rest.
        drop(open("last").await.unwrap());
        assert!(!roots.iter().any(|root| root.exists()));
    }

    #[test]
    fn the_path_of_the_own_cgroup_follows_from_its_mount() {
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
