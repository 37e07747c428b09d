//! The replicas of one version of a function in HTTP mode.

use std::sync::{Arc, Mutex};

use tokio::sync::watch;

use crate::provider::process::pick::{Pick, pick};
use crate::provider::process::replica::{Replica, Seat};
use crate::provider::process::runner::Runner;
use crate::provider::process::spec::Mode;
use crate::provider::process::sync::lock;
use crate::provider::process::workload::Workload;
use crate::provider::types::StartFailure;

#[derive(Debug)]
pub(super) struct Pool {
    pub(super) workload: Arc<Workload>,
    pub(super) runner: Arc<Runner>,
    replicas: Mutex<Vec<Arc<Replica>>>,
    readiness: watch::Sender<Readiness>,
}

/// What calls can expect of a pool.
#[derive(Clone, Copy, Debug, Default)]
struct Readiness {
    /// How many replicas can be called.
    ready: u64,
    /// There are replicas, and the starts of all of them fail again and again.
    fails: bool,
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
        Self { workload, runner, replicas: Mutex::default(), readiness: watch::Sender::default() }
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
        self.readiness.borrow().ready
    }

    /// Waits until `wanted` replicas can be called.
    pub(super) async fn until_ready(&self, wanted: u64) {
        // The sender is here, so the channel stays open.
        let _ = self.readiness.subscribe().wait_for(|now| now.ready >= wanted).await;
    }

    /// Waits until a replica can be called, or nobody should wait for one any more.
    pub(super) async fn until_ready_or_failing(&self) {
        let _ = self.readiness.subscribe().wait_for(|now| now.ready > 0 || now.fails).await;
    }

    /// Waits until no replica can be called, and nobody should wait for one any more.
    pub(super) async fn until_failing(&self) {
        let _ = self.readiness.subscribe().wait_for(|now| now.fails).await;
    }

    /// How the starts of all replicas fail, if they do so again and again.
    pub(super) fn start_failure(&self) -> Option<StartFailure> {
        if !self.readiness.borrow().fails {
            return None;
        }
        lock(&self.replicas).iter().find_map(|replica| replica.start_failure())
    }

    /// To be called when the readiness of a replica has changed.
    pub(super) fn readiness_changed(&self) {
        self.readiness.send_modify(|now| {
            let replicas = lock(&self.replicas);
            let ready = replicas.iter().filter(|replica| replica.load().is_some()).count() as u64;
            let fails = !replicas.is_empty() && replicas.iter().all(|it| it.does_not_start());
            *now = Readiness { ready, fails };
        });
    }

    pub(super) fn ready_path(&self) -> Option<&str> {
        match &self.workload.spec.mode {
            Mode::Http { ready_path } => ready_path.as_deref(),
            Mode::Fork(_) => None,
        }
    }
}
