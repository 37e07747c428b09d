//! Records running processes on disk, so that the next provider can kill those that outlive a killed provider.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, Signal};

use crate::process::containment::Containment;
use crate::process::{files, procfs};

/// A directory with one file for each running process group, named by its id.
#[derive(Debug)]
pub(super) struct Orphans {
    directory: PathBuf,
    boot_id: Option<String>,
    /// Containment of processes while this provider runs.
    pub(super) containment: Containment,
}

/// The record of a process, removed on drop.
#[derive(Debug)]
pub(super) struct ProcessRecord(Option<PathBuf>);

impl Orphans {
    pub(super) fn open(directory: PathBuf) -> std::io::Result<Self> {
        files::create_private_directory(&directory)?;
        Ok(Self { directory, boot_id: procfs::boot_id(), containment: Containment::default() })
    }

    /// Kills process groups left by an earlier provider, and returns their number.
    pub(super) fn kill_all(&self) -> std::io::Result<usize> {
        let mut killed = 0;
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            if let Some(pid) = self.running_process(&path) {
                killed += 1;
                // Ignores a group that has exited meanwhile.
                let _ = rustix::process::kill_process_group(pid, Signal::KILL);
            }
            fs::remove_file(&path)?;
        }
        Ok(killed)
    }

    /// Records a new process, the leader of a group.
    ///
    /// The record is not synced to disk, since a crash of the machine ends the process as well. An error does not fail
    /// the call.
    pub(super) fn record(&self, pid: Pid) -> ProcessRecord {
        let pid = pid.as_raw_nonzero().get();
        let path = self.directory.join(pid.to_string());
        let (Some(boot_id), Some(stat)) = (&self.boot_id, procfs::stat(pid)) else {
            return ProcessRecord(None);
        };
        if let Err(error) = fs::write(&path, format!("{boot_id} {}", stat.started)) {
            tracing::warn!(%error, pid, "Cannot record a process in the state directory");
        }
        ProcessRecord(Some(path))
    }

    /// Returns the process recorded in `path`, unless it has exited. Compares the start time, since process ids are
    /// reused.
    fn running_process(&self, path: &Path) -> Option<Pid> {
        let pid: i32 = path.file_name()?.to_str()?.parse().ok()?;
        let text = fs::read_to_string(path).ok()?;
        let (boot_id, started) = text.split_once(' ')?;
        let same_boot = self.boot_id.as_deref() == Some(boot_id);
        let stat = procfs::stat(pid)?;
        let is_same = same_boot && started.parse() == Ok(stat.started) && stat.group == pid;
        is_same.then(|| Pid::from_raw(pid)).flatten()
    }
}

impl Drop for ProcessRecord {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    use std::process::Command;

    use super::*;

    #[test]
    fn only_the_recorded_process_is_killed_not_another_one_with_its_id() {
        let directory = tempfile::tempdir().unwrap();
        let orphans = Orphans::open(directory.path().join("running")).unwrap();
        let mut child = Command::new("sleep").arg("1000").process_group(0).spawn().unwrap();
        let pid = Pid::from_child(&child);

        std::mem::forget(orphans.record(pid));
        let path = orphans.directory.join(child.id().to_string());
        let recorded = fs::read_to_string(&path).unwrap();
        fs::write(&path, format!("{recorded}0")).unwrap();
        assert_eq!(orphans.kill_all().unwrap(), 0);
        assert!(!path.exists());

        std::mem::forget(orphans.record(pid));
        assert_eq!(orphans.kill_all().unwrap(), 1);
        assert_eq!(child.wait().unwrap().signal(), Some(9));
    }
}
