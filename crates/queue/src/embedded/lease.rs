//! A received call, until it is settled or dropped.

use crate::call::{QueuedCall, UnixMillis};
use crate::embedded::Embedded;
use crate::embedded::settle_write::SettleWrite;
use crate::embedded::state::{AttemptStart, Claim};
use crate::embedded::writer::WriteOp;
use crate::status::{CallRecord, Settlement};
use crate::{Error, Settle, now};

/// A received call. It is requeued when the lease is dropped unsettled.
pub(crate) struct Lease {
    queue: Embedded,
    pub(super) claim: Claim,
    pub(super) started_at: UnixMillis,
    /// Number of earlier attempts, and the HTTP status of the last one.
    pub(super) previous: (u32, Option<u16>),
}

impl Lease {
    pub(super) fn new(queue: Embedded, claim: Claim) -> Self {
        Self { queue, claim, started_at: now(), previous: (0, None) }
    }
}

impl Settle for Lease {
    fn release_slot(&self) {
        let shared = &self.queue.shared;
        let released = shared.state().release_slot(self.claim);
        if released {
            shared.ready.notify_one();
        }
    }

    /// If the future is dropped, the settlement is written nevertheless, unless the queue of the writer was full and it
    /// still waited for a place there. If the lease is dropped before the write, the call is requeued; a write that
    /// finishes it then removes it again, unless another worker has received it. After a retry or a dead letter that is
    /// written so late, the call is executed once more.
    async fn settle(&self, call: &QueuedCall, settlement: &Settlement) -> Result<(), Error> {
        if !self.queue.shared.state().owns(self.claim) {
            return Err(Error::Gone);
        }
        let (attempts, status) = self.previous;
        let running = CallRecord { status, ..CallRecord::queued(call) };
        let start = AttemptStart { attempts: attempts + 1, started_at: self.started_at };
        let status = start.apply_to(running).settled(settlement, now());
        let settled = SettleWrite::new(&status, settlement);
        self.queue.submit(|reply| WriteOp::Settle(self.claim, settled, reply)).await
    }
}

impl Drop for Lease {
    /// Requeues the call if it was not settled.
    fn drop(&mut self) {
        let shared = &self.queue.shared;
        let mut state = shared.state();
        if state.end_execution(self.claim) {
            state.requeue(self.claim.selected, std::thread::panicking());
            drop(state);
            shared.ready.notify_one();
        }
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Lease").field(&self.claim.selected.number).finish()
    }
}
