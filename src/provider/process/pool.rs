//! The replicas of one version of a function in HTTP mode.

use std::sync::{Arc, Mutex};

use tokio::sync::watch;

use crate::provider::process::balancer::{Selection, least_loaded};
use crate::provider::process::launcher::ProcessLauncher;
use crate::provider::process::replica::{Replica, ReplicaPermit};
use crate::provider::process::spec::Mode;
use crate::provider::process::sync::lock_unpoisoned;
use crate::provider::process::workload::Workload;
use crate::provider::types::StartFailure;

#[derive(Debug)]
pub(super) struct Pool {
    pub(super) workload: Arc<Workload>,
    pub(super) launcher: Arc<ProcessLauncher>,
    replicas: Mutex<Vec<Arc<Replica>>>,
    readiness: watch::Sender<Readiness>,
}

/// What calls can expect of a pool.
#[derive(Clone, Copy, Debug, Default)]
struct Readiness {
    /// How many replicas can be called.
    ready: u64,
    /// There are replicas, and the starts of all of them fail again and again.
    is_failing: bool,
}

/// Why there is no place for a call.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum AcquireError {
    Busy,
    NoneReady,
}

impl Pool {
    /// A pool without replicas.
    pub(super) fn new(workload: Arc<Workload>, launcher: Arc<ProcessLauncher>) -> Self {
        Self { workload, launcher, replicas: Mutex::default(), readiness: watch::Sender::default() }
    }

    /// Starts or retires replicas until there are `wanted`. Those that cannot be called yet go first.
    pub(super) fn scale(self: &Arc<Self>, wanted: u64) {
        let wanted = usize::try_from(wanted).unwrap_or(usize::MAX);
        let mut replicas = lock_unpoisoned(&self.replicas);
        while replicas.len() > wanted {
            let last = replicas.len() - 1;
            let at = replicas.iter().rposition(|replica| replica.load().is_none());
            replicas.remove(at.unwrap_or(last)).retire.cancel();
        }
        while replicas.len() < wanted {
            let replica = Arc::new(Replica::new());
            self.launcher.tasks.spawn(Arc::clone(&replica).supervise(Arc::clone(self)));
            replicas.push(replica);
        }
        drop(replicas);
        self.update_readiness();
    }

    /// A place in the replica with the fewest calls in flight.
    pub(super) fn acquire_permit(&self) -> Result<ReplicaPermit, AcquireError> {
        let replicas = lock_unpoisoned(&self.replicas);
        let limit = self.workload.spec.max_inflight;
        match least_loaded(replicas.iter().map(|replica| replica.load()), limit) {
            Selection::Busy => Err(AcquireError::Busy),
            Selection::NoneReady => Err(AcquireError::NoneReady),
            Selection::Replica(at) => replicas[at].acquire_permit().ok_or(AcquireError::NoneReady),
        }
    }

    /// How many replicas can be called.
    pub(super) fn ready_count(&self) -> u64 {
        self.readiness.borrow().ready
    }

    /// Waits until `wanted` replicas can be called.
    pub(super) async fn wait_ready(&self, wanted: u64) {
        // The sender is here, so the channel stays open.
        let _ = self.readiness.subscribe().wait_for(|now| now.ready >= wanted).await;
    }

    /// Waits until a replica can be called, or nobody should wait for one any more.
    pub(super) async fn wait_ready_or_failing(&self) {
        let _ = self.readiness.subscribe().wait_for(|now| now.ready > 0 || now.is_failing).await;
    }

    /// Waits until no replica can be called, and nobody should wait for one any more.
    pub(super) async fn wait_failing(&self) {
        let _ = self.readiness.subscribe().wait_for(|now| now.is_failing).await;
    }

    /// How the starts of all replicas fail, if they do so again and again.
    pub(super) fn start_failure(&self) -> Option<StartFailure> {
        if !self.readiness.borrow().is_failing {
            return None;
        }
        lock_unpoisoned(&self.replicas).iter().find_map(|replica| replica.start_failure())
    }

    /// To be called when the readiness of a replica has changed.
    pub(super) fn update_readiness(&self) {
        self.readiness.send_modify(|now| {
            let replicas = lock_unpoisoned(&self.replicas);
            let ready = replicas.iter().filter(|replica| replica.load().is_some()).count() as u64;
            let is_failing = !replicas.is_empty() && replicas.iter().all(|it| it.does_not_start());
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
