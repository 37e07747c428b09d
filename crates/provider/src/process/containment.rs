//! Contains the descendants of a function's process, so that all of them end with its call. A process group is not
//! enough: a process leaves it by `setsid`.
//!
//! Where cgroups (version 2) can be created, each process gets one, and the kernel kills all processes in it. Where the
//! provider can adopt orphans, it kills those whose call has ended. The latter also finds processes that were started
//! before their parent was moved into its cgroup, which happens shortly after its start.

use std::io;
use std::sync::Arc;

use tokio::process::{Child, Command};

use crate::process::cgroup::{Cgroup, Cgroups};
use crate::process::descendants::{Descendants, MarkedProcess};

/// The available mechanisms of containment, in addition to process groups.
#[derive(Debug, Default)]
pub(super) struct Containment {
    pub(super) cgroups: Option<Arc<Cgroups>>,
    pub(super) descendants: Option<Arc<Descendants>>,
}

/// A process and its descendants.
#[derive(Debug)]
pub(super) struct ContainedProcess {
    cgroup: Option<Cgroup>,
    marked: Option<MarkedProcess>,
}

impl Containment {
    /// Logs the mechanisms in use. Call once.
    pub(super) fn log_method(&self) {
        match self {
            Self { cgroups: Some(cgroups), .. } => {
                let path = cgroups.path().display();
                tracing::info!(%path, "Processes started by functions are killed with the cgroup of their call");
            }
            Self { descendants: Some(_), .. } => tracing::info!(
                "Processes started by functions are adopted and killed by this process: it cannot create cgroups"
            ),
            Self { .. } => tracing::warn!(
                "Processes started by functions are killed by process group: a process that leaves its group is not killed"
            ),
        }
    }

    /// Starts `command` and contains its descendants.
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

    /// Removes the cgroups. Call when no process runs any more.
    pub(super) fn close(&self) {
        if let Some(cgroups) = &self.cgroups {
            cgroups.close();
        }
    }
}

impl ContainedProcess {
    /// Kills the process and its descendants, without waiting.
    pub(super) fn kill(&self) {
        if let Some(cgroup) = &self.cgroup {
            cgroup.kill();
        }
        if let Some(marked) = &self.marked {
            marked.kill();
        }
    }

    /// Kills the descendants of a process that has exited, and waits until they have exited.
    pub(super) async fn kill_rest_and_wait(&self) {
        if let Some(cgroup) = &self.cgroup {
            cgroup.kill_and_wait().await;
        }
        if let Some(marked) = &self.marked {
            marked.kill_rest_and_wait().await;
        }
    }
}
