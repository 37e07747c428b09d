//! State of one replica of a function in HTTP mode, and permits for its calls.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::process::start_failure::FailedStarts;
use crate::types::StartFailure;
use gateway_base::sync::lock_unpoisoned;

#[derive(Debug)]
pub(super) struct Replica {
    /// A leaf; `replicas` of the pool may be held.
    state: Mutex<ReplicaState>,
    /// Notified when the last call in flight has finished.
    idle: Notify,
    /// Notified when a ready replica refused a connection.
    unreachable: Notify,
    /// Cancelled to drain and stop the replica.
    pub(super) retire: CancellationToken,
}

#[derive(Debug, Default)]
struct ReplicaState {
    /// The replica's address while it is ready.
    ready: Option<SocketAddr>,
    in_flight: u64,
    failed_starts: FailedStarts,
}

/// Counts a call as in flight on a replica until it is dropped.
#[derive(Debug)]
pub(in crate::process) struct ReplicaPermit {
    pub(in crate::process) address: SocketAddr,
    replica: Arc<Replica>,
}

impl Replica {
    pub(super) fn new() -> Self {
        let retire = CancellationToken::new();
        Self { state: Mutex::default(), idle: Notify::new(), unreachable: Notify::new(), retire }
    }

    /// Returns the number of calls in flight; `None` if the replica is not ready.
    pub(super) fn load(&self) -> Option<u64> {
        let state = lock_unpoisoned(&self.state);
        state.ready.map(|_| state.in_flight)
    }

    /// Acquires a permit for a call; `None` if the replica is not ready.
    pub(super) fn acquire_permit(self: &Arc<Self>) -> Option<ReplicaPermit> {
        let mut state = lock_unpoisoned(&self.state);
        let address = state.ready?;
        state.in_flight += 1;
        Some(ReplicaPermit { address, replica: Arc::clone(self) })
    }

    /// Returns the last failed start if the replica fails to start repeatedly.
    pub(super) fn start_failure(&self) -> Option<StartFailure> {
        lock_unpoisoned(&self.state).failed_starts.persistent().cloned()
    }

    /// Returns whether the replica is not ready and fails to start repeatedly: calls do not wait for it.
    pub(super) fn does_not_start(&self) -> bool {
        let state = lock_unpoisoned(&self.state);
        state.ready.is_none() && state.failed_starts.persistent().is_some()
    }

    /// The connection to `address` was refused: the replica receives no calls until a probe succeeds.
    pub(super) fn mark_unreachable_at(&self, address: SocketAddr) {
        let mut state = lock_unpoisoned(&self.state);
        if state.ready == Some(address) {
            state.ready = None;
            self.unreachable.notify_one();
        }
    }

    /// Sets the address under which the replica is ready; `None`: it is not ready.
    pub(super) fn set_ready(&self, address: Option<SocketAddr>) {
        lock_unpoisoned(&self.state).ready = address;
    }

    /// Records that the process has exited after it was ready for `ready_for`.
    pub(super) fn record_exit(&self, ready_for: Duration, reason: &str, last_output: &str) {
        lock_unpoisoned(&self.state).failed_starts.record_exit(ready_for, reason, last_output);
    }

    /// Records that the process was ready for `ready_for`, and still runs.
    pub(super) fn record_ready(&self, ready_for: Duration) {
        lock_unpoisoned(&self.state).failed_starts.record_ready(ready_for);
    }

    /// Waits until a connection to the ready replica is refused. Cancel-safe.
    pub(super) async fn wait_unreachable(&self) {
        self.unreachable.notified().await;
    }

    /// Waits until no call is in flight. Cancel-safe.
    pub(super) async fn wait_idle(&self) {
        while lock_unpoisoned(&self.state).in_flight > 0 {
            self.idle.notified().await;
        }
    }
}

impl Drop for ReplicaPermit {
    fn drop(&mut self) {
        let mut state = lock_unpoisoned(&self.replica.state);
        state.in_flight -= 1;
        if state.in_flight == 0 {
            self.replica.idle.notify_one();
        }
    }
}

impl ReplicaPermit {
    /// The connection to this replica was refused.
    pub(in crate::process) fn mark_unreachable(&self) {
        self.replica.mark_unreachable_at(self.address);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_that_is_not_ready_has_no_permits() {
        let replica = Arc::new(Replica::new());
        assert!(replica.acquire_permit().is_none() && replica.load().is_none());
        lock_unpoisoned(&replica.state).ready = Some(([127, 0, 0, 1], 1).into());
        let permit = replica.acquire_permit().unwrap();
        assert_eq!(replica.load(), Some(1));
        drop(permit);
        assert_eq!(replica.load(), Some(0));
    }
}
