//! Finds functions whose calls other processes have published.
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::jetstream::Shared;
use crate::jetstream::consume::consumer::subscribe_all;
use crate::jetstream::consumers::MAX_SCANNED_MESSAGES;
use crate::jetstream::error::NatsError;
use crate::jetstream::wire::subjects::{self, CALLS};
use gateway_base::function::Function;
use gateway_base::sync::lock_unpoisoned;

/// Interval between searches for new functions; a receiver that waits checks again after it.
pub(in crate::jetstream) const DISCOVERY_INTERVAL: Duration = Duration::from_secs(1);

/// Searches for functions whose calls other processes have published, at most once per interval.
pub(in crate::jetstream) fn discover_functions(shared: &Arc<Shared>) {
    let mut last_discovery = lock_unpoisoned(&shared.last_discovery);
    let connection = match *last_discovery {
        Some((at, _)) if at.elapsed() < DISCOVERY_INTERVAL => return,
        Some((_, connection)) => connection,
        None => 0,
    };
    *last_discovery = Some((Instant::now(), connection));
    drop(last_discovery);
    let this = Arc::clone(shared);
    shared.tasks.spawn(async move {
        // From the first search on, other processes announce new consumers, so their calls need not wait for the next
        // search. If the server is unavailable, the next search subscribes.
        let _ = this.inbox.get_or_try_init(|| subscribe_all(&this)).await;
        let Ok((found, connection)) = find_functions(&this, connection).await else { return };
        *lock_unpoisoned(&this.last_discovery) = Some((Instant::now(), connection));
        let new = found.iter().filter(|function| this.pull_scheduler().add(function)).count();
        if new > 0 {
            this.call_available.notify_one();
        }
    });
}

/// Returns the functions with a consumer, and the number of the connection. On a connection other than `last`, also
/// returns functions that have calls but no consumer: it may have been removed.
async fn find_functions(shared: &Shared, last: u64) -> Result<(Vec<Function>, u64), NatsError> {
    let connection = shared.api.wait_connected().await?;
    let Shared { api, subjects, .. } = shared.ready().await?;
    let (mut found, _) = shared.functions(Duration::ZERO).await?;
    let all_calls = subjects.of_function(CALLS, None);
    if connection != last {
        // Responses to pulls on an earlier connection are lost.
        shared.pull_scheduler().reset_pulls();
        if shared.inbox.initialized() {
            shared.load_dirty_batches(connection).await?;
        }
        if api.message_count(&subjects.calls).await? <= MAX_SCANNED_MESSAGES {
            let calls = api.subjects(&subjects.calls, &all_calls, usize::MAX).await?;
            found.extend(calls.iter().filter_map(|call| Some(subjects::parse(call)?.function)));
        }
    }
    // A call that no consumer delivers eventually becomes the oldest message.
    let oldest = api.get_next(&subjects.calls, &all_calls, 1).await?;
    found.extend(oldest.and_then(|call| Some(subjects::parse(&call.subject)?.function)));
    Ok((found, connection))
}
