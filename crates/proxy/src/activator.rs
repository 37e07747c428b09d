//! Cold starts: holds requests of a function that is not ready, scales it up, and releases them when it is ready.
//!
//! For a ready function a request only reads a flag (`functions::registry::FunctionState`), which the provider poller
//! updates. This module handles all other requests. Each function that is not ready has one queue of waiting requests
//! and one activation task, which polls the provider and scales the function. So the provider receives one status query
//! at a time and one scale request, however many requests wait on however many threads.
//!
//! The number of replicas for a given load is not decided here: see `autoscale`.

mod activation;
mod cold_start_queue;
pub mod step;
pub mod unavailable;
mod wait;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::activator::activation::Activation;
use crate::activator::cold_start_queue::{ColdStartQueue, PendingWait, Readiness, WaitState};
use crate::error::Error;
use crate::functions::registry::FunctionRegistry;
use gateway_base::function::Function;
use gateway_base::shutdown::Tasks;
use gateway_base::sync::lock_unpoisoned;
use gateway_provider::Provider;

pub use wait::ColdStartWait;

/// Timeout of a status query. It exceeds `LONG_POLL`, the time for which the provider may delay its response.
const STATUS_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum bytes of a request body that are buffered for a retry.
pub const MAX_REPLAY_BODY: usize = 64 << 10;
/// Maximum of all buffered request bodies together, in KiB.
const MAX_REPLAY_TOTAL_KIB: usize = 64 << 10;

/// Limits for calls that wait for a function to become ready.
#[derive(Clone, Copy, Debug)]
pub struct ColdStart {
    /// `cold_start_timeout`
    pub timeout: Duration,
    /// `cold_start_queue_limit`: maximum number of calls that wait for one function.
    pub queue_limit: usize,
}

/// Coordinates cold starts. One per process.
pub struct Activator {
    provider: Provider,
    registry: Arc<FunctionRegistry>,
    limits: ColdStart,
    tasks: Tasks,
    /// Runtime of the activation tasks. A proxy thread may end before requests on other threads have been released.
    runtime: Handle,
    /// The queues of functions that are not known to be ready. Rank 2: the registry of functions is locked under it.
    queues: Mutex<HashMap<Function, Arc<ColdStartQueue>>>,
    replay_budget: Semaphore,
}

/// Result of joining the queue of a function.
enum Admission {
    Ready(Readiness),
    Waiting(PendingWait),
}

impl Activator {
    /// Creates an activator whose activations run as `tasks` on the current runtime. The client of `provider` must
    /// belong to the same runtime.
    pub fn new(
        provider: Provider,
        registry: Arc<FunctionRegistry>,
        limits: ColdStart,
        tasks: &Tasks,
    ) -> Arc<Self> {
        Arc::new(Self {
            provider: Provider { timeout: STATUS_TIMEOUT, ..provider },
            registry,
            limits,
            tasks: tasks.clone(),
            runtime: Handle::current(),
            queues: Mutex::default(),
            replay_budget: Semaphore::new(MAX_REPLAY_TOTAL_KIB),
        })
    }

    /// Starts the cold-start handling of one request of `function`.
    pub fn start_wait(self: &Arc<Self>, function: &Function) -> ColdStartWait {
        ColdStartWait::new(Arc::clone(self), function.clone())
    }

    /// Reserves memory to buffer a body of `length` bytes for a retry; an unknown length counts as [`MAX_REPLAY_BODY`].
    /// Returns `None` while the budget is exhausted.
    pub fn reserve_replay(&self, length: Option<u64>) -> Option<SemaphorePermit<'_>> {
        let length = length.and_then(|length| usize::try_from(length).ok());
        let kib = length.unwrap_or(MAX_REPLAY_BODY).min(MAX_REPLAY_BODY).div_ceil(1024);
        self.replay_budget.try_acquire_many(u32::try_from(kib).unwrap_or(u32::MAX)).ok()
    }

    /// Joins the queue of `function`, unless the function is ready. `suspect_since`: send time of the request that
    /// received a sign of unavailability, if there was one.
    fn join(
        self: &Arc<Self>,
        function: &Function,
        suspect_since: Option<Instant>,
    ) -> Result<Admission, Error> {
        let mut queues = self.queues();
        let (queue, is_new) = self.queue_for(&mut queues, function);
        let min_query_time = self.note_suspicion(&queue, suspect_since);
        if let WaitState::Ready(ready) = queue.wait_state_since(min_query_time) {
            return Ok(Admission::Ready(ready));
        }
        // Join under the lock, so that the activation cannot finish as unused in between.
        let pending = queue.join(min_query_time, self.limits.queue_limit);
        drop(queues);
        self.spawn_activation(queue, is_new);
        pending.map(Admission::Waiting).ok_or_else(|| Error::ColdStartQueueFull(function.clone()))
    }

    /// Reports that a request sent at `sent` received a sign that `function` is not ready. An activation queries the
    /// provider; this function does not wait for it.
    fn suspect(self: &Arc<Self>, function: &Function, sent: Instant) {
        let mut queues = self.queues();
        let (queue, is_new) = self.queue_for(&mut queues, function);
        self.note_suspicion(&queue, Some(sent));
        drop(queues);
        self.spawn_activation(queue, is_new);
    }

    fn queue_for(
        &self,
        queues: &mut HashMap<Function, Arc<ColdStartQueue>>,
        function: &Function,
    ) -> (Arc<ColdStartQueue>, bool) {
        if let Some(queue) = queues.get(function) {
            return (Arc::clone(queue), false);
        }
        let queue = ColdStartQueue::new(function.clone());
        queues.insert(function.clone(), Arc::clone(&queue));
        (queue, true)
    }

    /// Records the suspicion. Returns the earliest query time whose result this request may rely on.
    fn note_suspicion(
        &self,
        queue: &ColdStartQueue,
        suspect_since: Option<Instant>,
    ) -> Option<Instant> {
        let is_outdated =
            |ready: Readiness| self.registry.invalidated_since(&queue.function, ready.queried_at);
        let suspect_since = if queue.last_readiness().is_some_and(is_outdated) {
            Some(Instant::now())
        } else {
            suspect_since
        };
        if let Some(sent) = suspect_since {
            queue.suspect(sent);
        }
        suspect_since.or_else(|| queue.suspected_at())
    }

    fn spawn_activation(self: &Arc<Self>, queue: Arc<ColdStartQueue>, is_new: bool) {
        if !is_new {
            return;
        }
        let activation = Activation::new(Arc::clone(self), queue);
        self.tasks.spawn_on(&self.runtime, |stopping| async move {
            // If the activation is cancelled, its `Drop` releases the waiting requests.
            tokio::select! {
                () = stopping.cancelled() => {}
                () = activation.run() => {}
            }
        });
    }

    /// Returns the time at which `function` became ready, if that was recent.
    fn ready_since(&self, function: &Function) -> Option<Instant> {
        match self.queues().get(function)?.wait_state() {
            WaitState::Ready(ready) => ready.ready_since,
            WaitState::Pending | WaitState::Failed(_) => None,
        }
    }

    /// Removes `queue` if `condition` holds, while no request can join it. Returns whether it did.
    fn remove_if(
        &self,
        queue: &ColdStartQueue,
        condition: impl FnOnce(&ColdStartQueue) -> bool,
    ) -> bool {
        let mut queues = self.queues();
        let holds = condition(queue);
        if holds {
            queues.remove(&queue.function);
        }
        holds
    }

    fn queues(&self) -> MutexGuard<'_, HashMap<Function, Arc<ColdStartQueue>>> {
        lock_unpoisoned(&self.queues)
    }
}

#[cfg(test)]
impl Activator {
    /// Creates an activator whose provider is unreachable and whose queue holds `limit` requests.
    fn with_unreachable_provider(limit: usize) -> Arc<Self> {
        use gateway_base::base_url::BaseUrl;
        use gateway_http::client::{Client, Origin, PoolLimits, Tls};

        let provider = Provider {
            client: Client::new(PoolLimits { total: 0, per_host: 0 }, Tls::default()),
            origin: Origin::new(BaseUrl::parse("http://127.0.0.1:1").unwrap()),
            credentials: None,
            timeout: STATUS_TIMEOUT,
        };
        let limits = ColdStart { timeout: Duration::from_secs(60), queue_limit: limit };
        Self::new(provider, Arc::default(), limits, &Tasks::default())
    }
}
