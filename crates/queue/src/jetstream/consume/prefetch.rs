//! Hands delivered calls to receivers. Calls are claimed before that, and some are claimed ahead of free concurrency
//! slots.
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};

use crate::Delivery;
use crate::jetstream::Shared;
use crate::jetstream::consume::lease::ClaimedCall;
use crate::jetstream::consume::pull_scheduler::PullScheduler;
use crate::jetstream::consume::rate::ArrivalRate;
use crate::jetstream::consume::received::Received;

/// Maximum time that a prefetched call waits for a receiver.
pub(in crate::jetstream) const PREFETCH_TTL: Duration = Duration::from_secs(1);
/// Maximum number of concurrent naks.
const MAX_CONCURRENT_NAKS: usize = 32;

/// Claimed calls that no receiver has yet.
#[derive(Default)]
pub(in crate::jetstream) struct Prefetched {
    /// Calls with the time of their claim and the index of their function.
    pub(super) ready: VecDeque<(Instant, usize, ClaimedCall)>,
    /// Number of waiting receivers.
    pub(super) receivers: usize,
    /// Rate at which calls are received.
    rate: ArrivalRate,
}

impl Prefetched {
    /// Returns how many more calls should be claimed, for waiting receivers and those expected soon.
    pub(super) fn wanted(
        &self,
        scheduler: &PullScheduler<Received>,
        concurrency: usize,
        now: Instant,
    ) -> usize {
        (self.receivers + self.rate.prefetch(now)).saturating_sub(scheduler.runnable(concurrency))
    }

    /// Returns the first call that has a free slot.
    pub(super) fn pop(
        &mut self,
        scheduler: &mut PullScheduler<Received>,
        concurrency: usize,
    ) -> Option<Delivery> {
        let next = self
            .ready
            .iter()
            .position(|(_, function_index, _)| scheduler.has_slot(*function_index, concurrency))?;
        let (_, function_index, claimed) = self.ready.remove(next)?;
        scheduler.occupy_slot(function_index);
        self.rate.record(Instant::now());
        Some(claimed.deliver())
    }

    pub(in crate::jetstream) fn drain(&mut self) -> Vec<ClaimedCall> {
        self.ready.drain(..).map(|(.., claimed)| claimed).collect()
    }
}

/// Returns calls to the queue that have waited too long for a receiver.
pub(in crate::jetstream) async fn release_expired(shared: &Arc<Shared>) {
    let Some(before) = Instant::now().checked_sub(PREFETCH_TTL.min(shared.options.lease / 3))
    else {
        return;
    };
    let buffered = shared.pull_scheduler().remove_older(before);
    nak_all(shared, buffered).await;
    let mut old = Vec::new();
    {
        let mut prefetched = shared.prefetched();
        while prefetched.ready.front().is_some_and(|(at, ..)| *at < before) {
            old.extend(prefetched.ready.pop_front());
        }
    }
    drop(old);
}

/// Naks calls that no receiver takes here.
pub(in crate::jetstream) async fn nak_all(shared: &Arc<Shared>, calls: Vec<Received>) {
    let calls = stream::iter(calls);
    calls
        .for_each_concurrent(MAX_CONCURRENT_NAKS, async |received| received.nak(shared, None).await)
        .await;
}

/// Returns whether no call waits for a receiver.
pub(in crate::jetstream) fn is_empty(shared: &Shared) -> bool {
    shared.pull_scheduler().is_empty() && shared.prefetched().ready.is_empty()
}
