//! Can a function be called now? If not, it is woken, and its callers wait.
//!
//! A warm function costs its calls one look at a flag (`metrics::known::Warm`), which the poll of the provider keeps
//! fresh. What is in here is for all others. For each of them there is one line of callers and one driver, which asks
//! the provider and scales the function: however many callers there are, on whichever threads, the provider gets one
//! question at a time and one request to scale.
//! What is not in here: deciding how many replicas a load needs.

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

/// A provider that has not answered a question by then is away. Longer than it may be asked to hold its answer back.
const LONGEST_QUESTION: Duration = Duration::from_secs(5);
/// So much of a call's body is kept, to be sent once more if it met nobody.
pub const KEPT: usize = 64 << 10;
/// What all calls that wait may keep, in KiB.
const ALL_KEPT: usize = 64 << 10;

/// What wakes functions. One for the process.
pub struct Scaling {
    provider: Provider,
    known: Arc<Known>,
    limits: ColdStart,
    tasks: Tasks,
    /// Where drivers run: a thread that carries calls may end before those that wait on others.
    runtime: Handle,
    lines: Mutex<HashMap<Function, Arc<Line>>>,
    room: Semaphore,
}

/// How a call finds its function.
enum Entered {
    Ready(Ready),
    Waiting(Place),
}

impl Scaling {
    /// Drivers run as `tasks` on the current runtime; `provider`'s client must be of that runtime, too.
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

    /// The way of a call of `function`.
    pub fn passage(self: &Arc<Self>, function: &Function) -> Passage {
        Passage::new(Arc::clone(self), function.clone())
    }

    /// Room to keep a body of `length` bytes, if that is known; `None` while too many are kept.
    pub fn room_for(&self, length: Option<u64>) -> Option<SemaphorePermit<'_>> {
        let length = length.and_then(|length| usize::try_from(length).ok());
        let kib = length.unwrap_or(KEPT).min(KEPT).div_ceil(1024);
        self.room.try_acquire_many(u32::try_from(kib).unwrap_or(u32::MAX)).ok()
    }

    /// Joins the line for `function`, unless it is known to be ready. `doubt`: the caller's call was sent then, and has
    /// met a sign that it is not.
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
        // Under the lock: a line that is entered is not taken for abandoned.
        let place = line.enter(since, self.limits.queue_limit);
        drop(lines);
        self.drive(line, is_new);
        place.map(Entered::Waiting).ok_or_else(|| Error::LineFull(function.clone()))
    }

    /// Has somebody ask whether `function` is ready, after a call that was sent at `sent`, and waits for nothing.
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

    /// Since when the provider must have been asked for its answer to say something to a caller with `doubt`.
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
            // Whatever is cut here, the driver's end tells those who wait.
            tokio::select! {
                () = stopping.cancelled() => {}
                () = driver.run() => {}
            }
        });
    }

    /// When `function` became ready, if that was just now.
    fn woken(&self, function: &Function) -> Option<Instant> {
        match self.lines().get(function)?.phase() {
            Phase::Ready(ready) => ready.woken,
            Phase::Asking | Phase::Over(_) => None,
        }
    }

    /// Takes `line` away if `condition` holds, while nobody can enter it. Whether it did.
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
    /// One whose provider is away, with room for `queue` callers.
    fn alone(queue: usize) -> Arc<Self> {
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
