//! The replicas of one version of a function in HTTP mode.

mod replica;
mod supervisor;

use std::sync::{Arc, Mutex};

use tokio::sync::watch;

use crate::process::launcher::ProcessLauncher;
use crate::process::pool::replica::Replica;
use crate::process::spec::Mode;
use crate::process::workload::Workload;
use crate::types::StartFailure;
use gateway_base::sync::lock_unpoisoned;
use gateway_http::client::balancer::{Selection, least_loaded};

pub(super) use self::replica::ReplicaPermit;

#[derive(Debug)]
pub(super) struct Pool {
    pub(super) workload: Arc<Workload>,
    pub(super) launcher: Arc<ProcessLauncher>,
    /// Rank 4: `change_lock` of the provider and `old_pool` of the function may be held. The states of the replicas are
    /// locked under it.
    replicas: Mutex<Vec<Arc<Replica>>>,
    readiness: watch::Sender<Readiness>,
}

/// Readiness of a pool.
#[derive(Clone, Copy, Debug, Default)]
struct Readiness {
    /// Number of ready replicas.
    ready: u64,
    /// The pool has replicas, and all of them fail to start.
    is_failing: bool,
}

/// No permit is available.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum AcquireError {
    Busy,
    NoneReady,
}

impl Pool {
    /// Creates a pool without replicas.
    pub(super) fn new(workload: Arc<Workload>, launcher: Arc<ProcessLauncher>) -> Self {
        Self { workload, launcher, replicas: Mutex::default(), readiness: watch::Sender::default() }
    }

    /// Starts or retires replicas until there are `wanted`. Retires replicas that are not ready first.
    pub(super) fn scale(self: &Arc<Self>, desired: u64) {
        let desired = usize::try_from(desired).unwrap_or(usize::MAX);
        let mut replicas = lock_unpoisoned(&self.replicas);
        while replicas.len() > desired {
            let last = replicas.len() - 1;
            let index = replicas.iter().rposition(|replica| replica.load().is_none());
            replicas.remove(index.unwrap_or(last)).retire.cancel();
        }
        while replicas.len() < desired {
            let replica = Arc::new(Replica::new());
            self.launcher.tasks.spawn(Arc::clone(&replica).supervise(Arc::clone(self)));
            replicas.push(replica);
        }
        drop(replicas);
        self.update_readiness();
    }

    /// Acquires a permit of the replica with the fewest calls in flight.
    pub(super) fn acquire_permit(&self) -> Result<ReplicaPermit, AcquireError> {
        let replicas = lock_unpoisoned(&self.replicas);
        let limit = self.workload.spec.max_inflight;
        match least_loaded(replicas.iter().map(|replica| replica.load()), limit) {
            Selection::Busy => Err(AcquireError::Busy),
            Selection::NoneReady => Err(AcquireError::NoneReady),
            Selection::Replica(index) => {
                replicas[index].acquire_permit().ok_or(AcquireError::NoneReady)
            }
        }
    }

    /// Returns the number of ready replicas.
    pub(super) fn ready_count(&self) -> u64 {
        self.readiness.borrow().ready
    }

    /// Waits until `wanted` replicas are ready.
    pub(super) async fn wait_ready(&self, desired: u64) {
        // Never fails: `self` holds the sender.
        let _ = self.readiness.subscribe().wait_for(|now| now.ready >= desired).await;
    }

    /// Waits until a replica is ready, or all replicas fail to start.
    pub(super) async fn wait_ready_or_failing(&self) {
        let _ = self.readiness.subscribe().wait_for(|now| now.ready > 0 || now.is_failing).await;
    }

    /// Waits until all replicas fail to start.
    pub(super) async fn wait_failing(&self) {
        let _ = self.readiness.subscribe().wait_for(|now| now.is_failing).await;
    }

    /// Returns the last failed start if all replicas fail to start.
    pub(super) fn start_failure(&self) -> Option<StartFailure> {
        if !self.readiness.borrow().is_failing {
            return None;
        }
        lock_unpoisoned(&self.replicas).iter().find_map(|replica| replica.start_failure())
    }

    /// Recalculates the readiness. Call after each change of a replica's readiness.
    pub(super) fn update_readiness(&self) {
        self.readiness.send_modify(|now| {
            let replicas = lock_unpoisoned(&self.replicas);
            let ready = replicas.iter().filter(|replica| replica.load().is_some()).count() as u64;
            let is_failing =
                !replicas.is_empty() && replicas.iter().all(|replica| replica.does_not_start());
            *now = Readiness { ready, is_failing };
        });
    }

    pub(super) fn ready_path(&self) -> Option<&str> {
        match &self.workload.spec.mode {
            Mode::Http { ready_path } => ready_path.as_deref(),
            Mode::Fork(_) => None,
        }
    }
}
