//! The enqueueing side of the queue: what the API and the callbacks of a worker share.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use http::header::{CONTENT_LENGTH, HOST};
use http::{HeaderMap, HeaderName, HeaderValue};

use crate::memory::BodyBudget;
use crate::metrics::{DepthGauges, QueueMetrics};
use crate::unconfirmed::UnconfirmedFunctions;
use crate::{Error, JobQueue as _, Queue, QueueDepth, now};
use gateway_base::function::Function;
use gateway_http::call_id::RequestIds;
use gateway_http::headers::to_upstream;
use gateway_http::names::{X_DELAY_SECONDS, X_EXPIRES_SECONDS, X_MAX_ATTEMPTS};

/// The queue with what is needed to enqueue calls. One for the process; threads that use it much have a clone.
#[derive(Clone)]
pub struct QueueIngress {
    pub queue: Queue,
    pub max_body: usize,
    pub metrics: Arc<QueueMetrics>,
    /// Memory for bodies that wait for the queue or that a worker holds.
    pub budget: BodyBudget,
    /// Runnable and running calls by function, as of the last count.
    pending_counts: Arc<ArcSwapOption<HashMap<Arc<str>, u64>>>,
    pub unconfirmed: Arc<UnconfirmedFunctions>,
}

impl QueueIngress {
    /// Creates the ingress of `queue`. `max_body`: maximum bytes of a call's body.
    pub fn new(queue: Queue, max_body: usize, metrics: QueueMetrics) -> Arc<Self> {
        let (budget, metrics) = (BodyBudget::default(), Arc::new(metrics));
        let (pending_counts, unconfirmed) = (Arc::default(), Arc::default());
        Arc::new(Self { queue, max_body, metrics, budget, pending_counts, unconfirmed })
    }

    /// Returns a clone for the current thread and its runtime.
    #[must_use]
    pub fn for_thread(&self) -> Arc<Self> {
        Arc::new(Self { queue: self.queue.for_thread(), ..self.clone() })
    }

    /// Queries the queue's depth and updates the metrics.
    ///
    /// # Errors
    /// When the queue cannot be queried. The previous values remain; the caller tries again later.
    pub async fn update_depths(&self) -> Result<(), Error> {
        let now = now();
        let counts = match self.queue.store()? {
            Some(store) => store.depths().await?,
            // A queue that cannot be counted is treated as empty.
            None => Vec::new(),
        };
        let pending_counts =
            counts.iter().filter(|(_, counts)| counts.pending + counts.running > 0);
        let pending_counts = pending_counts.map(|(function, counts)| {
            (function.to_string().into(), counts.pending + counts.running)
        });
        self.pending_counts.store(Some(Arc::new(pending_counts.collect())));
        let gauges = |(function, counts): (Function, QueueDepth)| DepthGauges {
            label: function.to_string(),
            pending: counts.pending,
            running: counts.running,
            delayed: counts.delayed,
            dead_letters: counts.dead_letters,
            oldest_age: Duration::from_millis(counts.oldest.map_or(0, |at| now.saturating_sub(at))),
        };
        self.metrics.set_depths(counts.into_iter().map(gauges).collect());
        Ok(())
    }

    /// Runnable and running calls by function as of the last count; `None` before the first one.
    pub fn pending_by_function(&self) -> Option<Arc<HashMap<Arc<str>, u64>>> {
        self.pending_counts.load_full()
    }

    /// Returns the maximum size of a call's body in bytes.
    pub fn body_limit(&self) -> usize {
        self.queue.max_body_bytes().map_or(self.max_body, |max| max.min(self.max_body))
    }
}

/// Returns the headers that the function will receive. The worker sets `Host`; `X-Forwarded-*` are as for any
/// invocation.
pub fn function_headers(headers: &HeaderMap, peer: &HeaderValue, ids: &RequestIds) -> HeaderMap {
    const NOT_PASSED_ON: [HeaderName; 5] =
        [HOST, CONTENT_LENGTH, X_DELAY_SECONDS, X_MAX_ATTEMPTS, X_EXPIRES_SECONDS];
    let mut kept = HeaderMap::with_capacity(headers.len() + 4);
    let put = |name: &HeaderName, value: &HeaderValue| {
        if !NOT_PASSED_ON.contains(name) {
            kept.append(name, value.clone());
        }
    };
    to_upstream(headers, &HeaderValue::from_static("queued"), peer, Some(ids), put);
    kept
}
