//! Batches of calls that are published at the same time.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use gateway::queue::call::QueuedCall;

use crate::support::jetstream_queue::{Gateway, call, stream};
use crate::support::nats::Nats;
use crate::support::within;

pub(crate) const CALLS: usize = 20;

impl Gateway {
    /// The ids of so many calls that were published at once.
    pub(crate) async fn publish_at_once(
        &self,
        count: usize,
        call: impl Fn() -> QueuedCall,
    ) -> Vec<String> {
        let queue = self.queue.for_thread();
        let published = (0..count).map(|_| queue.publish(call()));
        let published = within("publish", futures_util::future::try_join_all(published)).await;
        published.unwrap().into_iter().map(|published| published.id).collect()
    }

    pub(crate) async fn count(&self, id: &str) -> (u64, u64, u64, u64) {
        let counts = self.queue.depths().await.unwrap();
        let counts = counts.iter().find(|(function, _)| function.to_string() == id);
        let counts = counts.map(|(_, counts)| counts.clone()).unwrap_or_default();
        (counts.pending, counts.running, counts.delayed, counts.dead_letters)
    }
}

pub(crate) async fn messages(nats: &Nats, what: &str) -> u64 {
    stream(nats, &format!("gateway-faas-request-{what}")).await.cached_info().state.messages
}

/// One under an id that it will not be known by.
pub(crate) fn fresh() -> QueuedCall {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    call(&NUMBER.fetch_add(1, Relaxed).to_string())
}

pub(crate) fn set(ids: &[String]) -> BTreeSet<String> {
    ids.iter().cloned().collect()
}
