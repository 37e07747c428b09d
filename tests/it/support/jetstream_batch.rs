//! Batches of calls that are published at the same time.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use gateway_queue::call::QueuedCall;
use gateway_queue::{JobQueue as _, JobStore as _};

use crate::support::jetstream_queue::{TestQueue, call, stream};
use crate::support::nats::Nats;
use crate::support::within;

pub(crate) const CALLS: usize = 20;

impl TestQueue {
    /// Publishes `count` calls at the same time. Returns their ids.
    pub(crate) async fn publish_batch(
        &self,
        count: usize,
        call: impl Fn() -> QueuedCall,
    ) -> Vec<String> {
        let queue = self.inner.for_thread();
        let published = (0..count).map(|_| queue.publish(call(), None));
        let published = within("publish", futures_util::future::try_join_all(published)).await;
        published.unwrap().into_iter().map(|published| published.id).collect()
    }

    pub(crate) async fn depths(&self, id: &str) -> (u64, u64, u64, u64) {
        let counts = self.inner.depths().await.unwrap();
        let counts = counts.iter().find(|(function, _)| function.to_string() == id);
        let counts = counts.map(|(_, counts)| counts.clone()).unwrap_or_default();
        (counts.pending, counts.running, counts.delayed, counts.dead_letters)
    }
}

pub(crate) async fn message_count(nats: &Nats, what: &str) -> u64 {
    stream(nats, &format!("gateway-faas-request-{what}")).await.cached_info().state.messages
}

/// A call that may be batched. Its id is replaced when it is published.
pub(crate) fn new_call() -> QueuedCall {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    call(&NUMBER.fetch_add(1, Relaxed).to_string())
}

pub(crate) fn id_set(ids: &[String]) -> BTreeSet<String> {
    ids.iter().cloned().collect()
}
