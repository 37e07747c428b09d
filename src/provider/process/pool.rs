//! The replicas of one version of a function in HTTP mode.

use std::sync::{Arc, Mutex};

use tokio::sync::watch;

use crate::provider::process::pick::{Pick, pick};
use crate::provider::process::replica::{Replica, Seat};
use crate::provider::process::runner::Runner;
use crate::provider::process::spec::Mode;
use crate::provider::process::sync::lock;
use crate::provider::process::workload::Workload;

#[derive(Debug)]
pub(super) struct Pool {
    pub(super) workload: Arc<Workload>,
    pub(super) runner: Arc<Runner>,
    replicas: Mutex<Vec<Arc<Replica>>>,
    /// How many can be called.
    ready: watch::Sender<u64>,
}

/// Why there is no place for a call.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NoSeat {
    Busy,
    NoneReady,
}

impl Pool {
    /// A pool without replicas.
    pub(super) fn new(workload: Arc<Workload>, runner: Arc<Runner>) -> Self {
        Self { workload, runner, replicas: Mutex::default(), ready: watch::Sender::new(0) }
    }

    /// Starts or retires replicas until there are `wanted`. Those that cannot be called yet go first.
    pub(super) fn scale(self: &Arc<Self>, wanted: u64) {
        let wanted = usize::try_from(wanted).unwrap_or(usize::MAX);
        let mut replicas = lock(&self.replicas);
        while replicas.len() > wanted {
            let last = replicas.len() - 1;
            let at = replicas.iter().rposition(|replica| replica.load().is_none());
            replicas.remove(at.unwrap_or(last)).retire.cancel();
        }
        while replicas.len() < wanted {
            let replica = Arc::new(Replica::new());
            self.runner.tasks.spawn(Arc::clone(&replica).supervise(Arc::clone(self)));
            replicas.push(replica);
        }
        drop(replicas);
        self.readiness_changed();
    }

    /// A place in the replica with the fewest calls in flight.
    pub(super) fn seat(&self) -> Result<Seat, NoSeat> {
        let replicas = lock(&self.replicas);
        let limit = self.workload.spec.max_inflight;
        match pick(replicas.iter().map(|replica| replica.load()), limit) {
            Pick::Busy => Err(NoSeat::Busy),
            Pick::NoneReady => Err(NoSeat::NoneReady),
            Pick::Replica(at) => replicas[at].seat().ok_or(NoSeat::NoneReady),
        }
    }

    /// How many replicas can be called.
    pub(super) fn ready(&self) -> u64 {
        *self.ready.borrow()
    }

    /// Waits until `wanted` replicas can be called.
    pub(super) async fn until_ready(&self, wanted: u64) {
        // The sender is here, so the channel stays open.
        let _ = self.ready.subscribe().wait_for(|ready| *ready >= wanted).await;
    }

    /// To be called by a replica whose readiness has changed.
    pub(super) fn readiness_changed(&self) {
        self.ready.send_modify(|ready| {
            let replicas = lock(&self.replicas);
            *ready = replicas.iter().filter(|replica| replica.load().is_some()).count() as u64;
        });
    }

    pub(super) fn ready_path(&self) -> Option<&str> {
        match &self.workload.spec.mode {
            Mode::Http { ready_path } => ready_path.as_deref(),
            Mode::Fork(_) => None,
        }
    }
}
