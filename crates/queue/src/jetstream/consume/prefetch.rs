//! Hands delivered calls to receivers. Calls are claimed before that, and some are claimed ahead of free concurrency
//! slots.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};

use crate::jetstream::Shared;
use crate::jetstream::consume::consumer::{
    DISCOVERY_INTERVAL, Received, discover_functions, pull_calls,
};
use crate::jetstream::consume::lease::{ClaimedCall, Lease};
use crate::jetstream::consume::pull_scheduler::PullScheduler;
use crate::jetstream::consume::rate::ArrivalRate;
use crate::{Delivery, Error};

/// Maximum time that a prefetched call waits for a receiver.
pub(in crate::jetstream) const PREFETCH_TTL: Duration = Duration::from_secs(1);
/// Maximum number of concurrent naks.
const MAX_CONCURRENT_NAKS: usize = 32;

/// Claimed calls that no receiver has yet.
#[derive(Default)]
pub(in crate::jetstream) struct Prefetched {
    /// Calls with the time of their claim and the index of their function.
    ready: VecDeque<(Instant, usize, ClaimedCall)>,
    /// Number of waiting receivers.
    receivers: usize,
    /// Rate at which calls are received.
    rate: ArrivalRate,
}

impl Prefetched {
    /// Returns how many more calls should be claimed, for waiting receivers and those expected soon.
    fn wanted(
        &self,
        scheduler: &PullScheduler<Received>,
        concurrency: usize,
        now: Instant,
    ) -> usize {
        (self.receivers + self.rate.prefetch(now)).saturating_sub(scheduler.runnable(concurrency))
    }

    /// Returns the first call that has a free slot.
    fn pop(
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

/// Counts a waiting receiver.
struct Receiver<'a>(&'a Shared);

impl<'a> Receiver<'a> {
    fn new(shared: &'a Shared) -> Self {
        shared.prefetched().receivers += 1;
        Self(shared)
    }
}

impl Drop for Receiver<'_> {
    fn drop(&mut self) {
        self.0.prefetched().receivers -= 1;
    }
}

/// Waits for the next call that is due.
pub(in crate::jetstream) async fn receive(
    shared: &Arc<Shared>,
    concurrency: usize,
) -> Result<Delivery, Error> {
    let _receiver = Receiver::new(shared);
    loop {
        // Created before the check, so that no notification is missed in between.
        let notified = shared.call_available.notified();
        fill(shared, concurrency);
        {
            let mut prefetched = shared.prefetched();
            let next = prefetched.pop(&mut shared.pull_scheduler(), concurrency);
            if let Some(delivery) = next {
                drop(prefetched);
                // Wakes the next receiver: more calls may be available than were notified.
                shared.call_available.notify_one();
                return Ok(delivery);
            }
        }
        // After the timeout, discovery runs again.
        let _ = tokio::time::timeout(DISCOVERY_INTERVAL, notified).await;
    }
}

/// Claims runnable calls, and pulls more where there is capacity.
fn fill(shared: &Arc<Shared>, concurrency: usize) {
    discover_functions(shared);
    let now = Instant::now();
    let (selected, wanted) = {
        let prefetched = shared.prefetched();
        let mut scheduler = shared.pull_scheduler();
        // Claimed calls without a slot leave this number unchanged, so it is recomputed for each call.
        let select = || {
            (prefetched.wanted(&scheduler, concurrency, now) > 0)
                .then(|| scheduler.select(concurrency, now))?
        };
        let selected: Vec<_> = std::iter::from_fn(select).collect();
        (selected, scheduler.plan_pulls(concurrency, now))
    };
    for (function_index, received) in selected {
        shared.tasks.spawn(claim(Arc::clone(shared), Lease::new(shared, function_index, received)));
    }
    for wanted in wanted {
        shared.tasks.spawn(pull_calls(Arc::clone(shared), wanted));
    }
}

async fn claim(shared: Arc<Shared>, lease: Lease) {
    let (function_index, received) = (lease.function_index, Arc::clone(&lease.received));
    match lease.claim().await {
        Ok(Some(claimed)) => {
            shared.prefetched().ready.push_back((Instant::now(), function_index, claimed))
        }
        Ok(None) => {}
        Err(error) => {
            let call_id = &received.call.id;
            tracing::debug!(call_id, %error, "Cannot claim a delivered call");
        }
    }
    shared.call_available.notify_one();
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
