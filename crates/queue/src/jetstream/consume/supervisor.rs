//! Extends the leases of the calls that this process holds, and returns calls that no receiver takes.
use std::sync::Arc;

use crate::jetstream::Shared;
use crate::jetstream::consume::prefetch;

/// Starts the task that extends leases and naks expired prefetched calls; it runs while this process holds calls.
pub(super) fn supervise_leases(shared: &Arc<Shared>) {
    if shared.claims.start_supervision() {
        let (this, tasks) = (Arc::clone(shared), Arc::clone(shared));
        tasks.tasks.supervise("leases", move || run(Arc::clone(&this)));
    }
}

async fn run(shared: Arc<Shared>) {
    let lease = shared.options.lease;
    loop {
        tokio::time::sleep((lease / 6).min(prefetch::PREFETCH_TTL / 2)).await;
        prefetch::release_expired(&shared).await;
        for received in shared.claims.due_for_progress(lease / 3) {
            received.in_progress(&shared).await;
        }
        shared.claims.republish_if_old(&shared, lease / 3).await;
        let nothing_prefetched = prefetch::is_empty(&shared);
        if shared.claims.end_supervision(&shared, nothing_prefetched) {
            return;
        }
    }
}
