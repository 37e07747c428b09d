//! Cold starts: holds requests of a function that is not ready, scales it up, and releases them when it is ready.
//!
//! For a ready function a request only reads a flag (`metrics::registry::ReadyFlag`), which the provider poller
//! updates. This module handles all other requests. Each function that is not ready has one queue of waiting requests
//! and one activation task, which polls the provider and scales the function. So the provider receives one status query
//! at a time and one scale request, however many requests wait on however many threads.
//!
//! The number of replicas for a given load is not decided here: see `autoscale`.

mod driver;
pub mod fault;
mod line;
mod passage;
pub mod step;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::config::ColdStart;
use crate::error::Error;
use crate::function::Function;
use crate::metrics::known::Known;
use crate::provider::Provider;
use crate::scaling::driver::Driver;
use crate::scaling::line::{Line, Phase, Place, Ready};
use crate::shutdown::Tasks;

pub use passage::Passage;

/// Timeout of a status query. It exceeds `LONG_POLL`, the time for which the provider may delay its response.
const LONGEST_QUESTION: Duration = Duration::from_secs(5);
/// Maximum bytes of a request body that are buffered for a retry.
pub const KEPT: usize = 64 << 10;
/// Maximum of all buffered request bodies together, in KiB.
const ALL_KEPT: usize = 64 << 10;

/// Coordinates cold starts. One per process.
pub struct Scaling {
    provider: Provider,
    known: Arc<Known>,
    limits: ColdStart,
    tasks: Tasks,
    /// Runtime of the activation tasks. A proxy thread may end before requests on other threads have been released.
    runtime: Handle,
    lines: Mutex<HashMap<Function, Arc<Line>>>,
    room: Semaphore,
}

/// Result of joining the queue of a function.
enum Entered {
    Ready(Ready),
    Waiting(Place),
}

impl Scaling {
    /// Creates an activator whose activations run as `tasks` on the current runtime. The client of `provider` must
    /// belong to the same runtime.
    pub fn new(
        provider: Provider,
        known: Arc<Known>,
        limits: ColdStart,
        tasks: &Tasks,
    ) -> Arc<Self> {
        Arc::new(Self {
            provider: Provider { timeout: LONGEST_QUESTION, ..provider },
            known,
            limits,
            tasks: tasks.clone(),
            runtime: Handle::current(),
            lines: Mutex::default(),
            room: Semaphore::new(ALL_KEPT),
        })
    }

    /// Starts the cold-start handling of one request of `function`.
    pub fn passage(self: &Arc<Self>, function: &Function) -> Passage {
        Passage::new(Arc::clone(self), function.clone())
    }

    /// Reserves memory to buffer a body of `length` bytes for a retry; an unknown length counts as [`MAX_REPLAY_BODY`].
    /// Returns `None` while the budget is exhausted.
    pub fn room_for(&self, length: Option<u64>) -> Option<SemaphorePermit<'_>> {
        let length = length.and_then(|length| usize::try_from(length).ok());
        let kib = length.unwrap_or(KEPT).min(KEPT).div_ceil(1024);
        self.room.try_acquire_many(u32::try_from(kib).unwrap_or(u32::MAX)).ok()
    }

    /// Joins the queue of `function`, unless the function is ready. `suspect_since`: send time of the request that
    /// received a sign of unavailability, if there was one.
    fn enter(
        self: &Arc<Self>,
        function: &Function,
        doubt: Option<Instant>,
    ) -> Result<Entered, Error> {
        let mut lines = self.lines();
        let (line, is_new) = self.line(&mut lines, function);
        let since = self.see_doubt(&line, doubt);
        if let Phase::Ready(ready) = line.phase_since(since) {
            return Ok(Entered::Ready(ready));
        }
        // Join under the lock, so that the activation cannot finish as unused in between.
        let place = line.enter(since, self.limits.queue_limit);
        drop(lines);
        self.drive(line, is_new);
        place.map(Entered::Waiting).ok_or_else(|| Error::LineFull(function.clone()))
    }

    /// Reports that a request sent at `sent` received a sign that `function` is not ready. An activation queries the
    /// provider; this function does not wait for it.
    fn doubt(self: &Arc<Self>, function: &Function, sent: Instant) {
        let mut lines = self.lines();
        let (line, is_new) = self.line(&mut lines, function);
        self.see_doubt(&line, Some(sent));
        drop(lines);
        self.drive(line, is_new);
    }

    fn line(
        &self,
        lines: &mut HashMap<Function, Arc<Line>>,
        function: &Function,
    ) -> (Arc<Line>, bool) {
        if let Some(line) = lines.get(function) {
            return (Arc::clone(line), false);
        }
        let line = Line::new(function.clone());
        lines.insert(function.clone(), Arc::clone(&line));
        (line, true)
    }

    /// Records the suspicion. Returns the earliest query time whose result this request may rely on.
    fn see_doubt(&self, line: &Line, doubt: Option<Instant>) -> Option<Instant> {
        let is_old = |ready: Ready| self.known.changed_since(&line.function, ready.asked);
        let doubt = if line.answer().is_some_and(is_old) { Some(Instant::now()) } else { doubt };
        if let Some(sent) = doubt {
            line.doubt(sent);
        }
        doubt.or_else(|| line.doubted())
    }

    fn drive(self: &Arc<Self>, line: Arc<Line>, is_new: bool) {
        if !is_new {
            return;
        }
        let driver = Driver::new(Arc::clone(self), line);
        self.tasks.spawn_on(&self.runtime, |stopping| async move {
            // If the activation is cancelled, its `Drop` releases the waiting requests.
            tokio::select! {
                () = stopping.cancelled() => {}
                () = driver.run() => {}
            }
        });
    }

    /// Returns the time at which `function` became ready, if that was recent.
    fn woken(&self, function: &Function) -> Option<Instant> {
        match self.lines().get(function)?.phase() {
            Phase::Ready(ready) => ready.woken,
            Phase::Asking | Phase::Over(_) => None,
        }
    }

    /// Removes `queue` if `condition` holds, while no request can join it. Returns whether it did.
    fn remove(&self, line: &Line, condition: impl FnOnce(&Line) -> bool) -> bool {
        let mut lines = self.lines();
        let holds = condition(line);
        if holds {
            lines.remove(&line.function);
        }
        holds
    }

    fn lines(&self) -> MutexGuard<'_, HashMap<Function, Arc<Line>>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
impl Scaling {
    /// Creates an activator whose provider is unreachable and whose queue holds `limit` requests.
    fn alone(limit: usize) -> Arc<Self> {
        use crate::config::PoolLimits;
        use crate::config::base_url::BaseUrl;
        use crate::proxy::client::{Client, Origin, Tls};

        let provider = Provider {
            client: Client::new(PoolLimits { total: 0, per_host: 0 }, Tls::default()),
            origin: Origin::new(BaseUrl::parse("http://127.0.0.1:1").unwrap()),
            credentials: None,
            timeout: LONGEST_QUESTION,
        };
        let limits = ColdStart { timeout: Duration::from_secs(60), queue_limit: queue };
        Self::new(provider, Arc::default(), limits, &Tasks::default())
    }
}
