//! Hands claimed calls to receivers.
use std::sync::Arc;
use std::time::Instant;

use crate::jetstream::Shared;
use crate::jetstream::consume::consumer::pull_calls;
use crate::jetstream::consume::discovery::{DISCOVERY_INTERVAL, discover_functions};
use crate::jetstream::consume::lease::Lease;
use crate::jetstream::consume::supervisor::supervise_leases;
use crate::{Delivery, Error};

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

/// Waits for the next call that is due. If the future is dropped, calls that were claimed for it stay prefetched.
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
        let lease = Lease::new(shared, function_index, received);
        supervise_leases(shared);
        shared.tasks.spawn(claim(Arc::clone(shared), lease));
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
