//! Holds together what a function's process has started, so that all of it ends with its call. A process group does not
//! suffice: `setsid` leaves it.
//!
//! Where a cgroup (version 2) can be created, each process gets one, and the kernel kills all that is in there. Where the
//! provider can adopt orphans, it kills those whose call has ended. The latter also finds what a process has started
//! before it was put into its cgroup, which happens a moment after its start.

use std::io;
use std::sync::Arc;

use tokio::process::{Child, Command};

use crate::provider::process::cgroup::{Cgroup, Cgroups};
use crate::provider::process::descendants::{Descendants, MarkedProcess};

/// How processes are held together, beside their groups.
#[derive(Debug, Default)]
pub(super) struct Containment {
    pub(super) cgroups: Option<Arc<Cgroups>>,
    pub(super) descendants: Option<Arc<Descendants>>,
}

/// What one process has started, itself included.
#[derive(Debug)]
pub(super) struct ContainedProcess {
    cgroup: Option<Cgroup>,
    marked: Option<MarkedProcess>,
}

impl Containment {
    /// Says how processes are held together. To be called once.
    pub(super) fn log_method(&self) {
        match self {
            Self { cgroups: Some(cgroups), .. } => {
                let path = cgroups.path().display();
                tracing::info!(%path, "What functions start is ended by a cgroup of each call");
            }
            Self { descendants: Some(_), .. } => tracing::info!(
                "What functions start is ended by this process, which adopts it: no cgroup can be created here"
            ),
            Self { .. } => tracing::warn!(
                "What functions start is ended by process groups: a process that leaves its group outlives its call"
            ),
        }
    }

    /// Starts `command`, and holds all that it starts.
    pub(super) fn spawn(&self, command: &mut Command) -> io::Result<(Child, ContainedProcess)> {
        let (child, marked) = match &self.descendants {
            Some(descendants) => {
                let (child, marked) = Descendants::spawn(descendants, command)?;
                (child, Some(marked))
            }
            None => (command.spawn()?, None),
        };
        let cgroup = self.cgroups.as_ref().zip(child.id()).and_then(|(all, id)| all.contain(id));
        Ok((child, ContainedProcess { cgroup, marked }))
    }

    /// Releases what the system keeps for it. Nothing runs any more.
    pub(super) fn close(&self) {
        if let Some(cgroups) = &self.cgroups {
            cgroups.close();
        }
    }
}

impl ContainedProcess {
    /// Kills all that can be killed at once.
    pub(super) fn kill(&self) {
        if let Some(cgroup) = &self.cgroup {
            cgroup.kill();
        }
        if let Some(marked) = &self.marked {
            marked.kill();
        }
    }

    /// The process itself has ended: kills what it has left, and waits until that is gone.
    pub(super) async fn kill_rest_and_wait(&self) {
        if let Some(cgroup) = &self.cgroup {
            cgroup.kill_and_wait().await;
        }
        if let Some(marked) = &self.marked {
            marked.kill_rest_and_wait().await;
        }
    }
}
