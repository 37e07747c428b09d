//! How many calls there are room for. The server counts messages, each of which may have several calls: of a large queue
//! they are counted by their subjects, which takes it some time, and so as seldom as can be.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

use crate::queue::Error;
use crate::queue::jetstream::Shared;
use crate::queue::jetstream::ids::TOGETHER;
use crate::queue::jetstream::server::Fault;
use crate::queue::jetstream::subject::{self, CALLS};

/// The server counts for a part of the time no larger than one of so many.
const SELDOM: u32 = 20;
/// Nobody waits for longer to be let in.
const PATIENCE: Duration = Duration::from_millis(500);

/// What is known of that.
pub(super) struct Fill {
    known: Mutex<Known>,
    /// So many were taken in here since.
    since: AtomicU64,
    /// To count.
    turn: Semaphore,
}

#[derive(Clone, Copy)]
struct Known {
    /// There were no more calls then.
    most: u64,
    /// When they may be counted again; `None`: they have not been yet.
    again: Option<Instant>,
}

impl Fill {
    pub(super) fn new() -> Self {
        let known = Mutex::new(Known { most: 0, again: None });
        Self { known, since: AtomicU64::new(0), turn: Semaphore::new(1) }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes room for so many, if there is some for all that is known.
    fn takes(&self, calls: u64, limit: u64) -> bool {
        let known = *self.known();
        let there = known.most.saturating_add(self.since.load(Relaxed));
        let fits = known.again.is_some() && there.saturating_add(calls) <= limit;
        if fits {
            self.since.fetch_add(calls, Relaxed);
        }
        fits
    }
}

impl Shared {
    /// Takes room for so many calls. What other gateways have taken in since the calls were counted last may be more
    /// than there was room for.
    ///
    /// # Errors
    /// [`Error::Full`] when there is none.
    pub(super) async fn make_room(&self, calls: usize) -> Result<(), Error> {
        let (calls, limit) = (calls as u64, self.options.limits.pending as u64);
        if self.fill.takes(calls, limit) {
            return Ok(());
        }
        Box::pin(self.count_room(calls, limit)).await
    }

    async fn count_room(&self, calls: u64, limit: u64) -> Result<(), Error> {
        let turn = tokio::time::timeout(PATIENCE, self.fill.turn.acquire()).await;
        let _turn = turn.map_err(|_| Error::Full)?;
        // Whoever was here before may have found some.
        if self.fill.takes(calls, limit) {
            return Ok(());
        }
        let again = self.fill.known().again;
        if let Some(again) = again {
            let wait = again.saturating_duration_since(Instant::now());
            if wait > PATIENCE {
                return Err(Error::Full);
            }
            tokio::time::sleep(wait).await;
        }
        let start = Instant::now();
        let since = self.fill.since.load(Relaxed);
        let most = self.count_most(limit).await?;
        *self.fill.known() = Known { most, again: Some(Instant::now() + start.elapsed() * SELDOM) };
        self.fill.since.fetch_sub(since, Relaxed);
        if self.fill.takes(calls, limit) { Ok(()) } else { Err(Error::Full) }
    }

    /// How many calls there are at most. Where that says enough, it is far more than there are.
    async fn count_most(&self, limit: u64) -> Result<u64, Fault> {
        let (server, names) = (&self.server, &self.names);
        let messages = server.messages(&names.calls).await?;
        let most = messages.saturating_mul(TOGETHER as u64);
        if most < limit || messages >= limit {
            return Ok(most);
        }
        let subjects = server.subjects(&names.calls, &names.of(CALLS, None), usize::MAX).await?;
        Ok(subjects.iter().map(|subject| subject::calls(subject) as u64).sum())
    }
}
