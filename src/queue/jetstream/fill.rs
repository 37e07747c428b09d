//! How many calls there are room for. The server counts messages, each of which may have several calls: of a large queue
//! they are counted by their subjects, which takes it some time, and so as seldom as can be.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

use crate::queue::Error;
use crate::queue::jetstream::Shared;
use crate::queue::jetstream::bundle::Record;
use crate::queue::jetstream::ids;
use crate::queue::jetstream::server::Fault;
use crate::queue::jetstream::subject::{self, CALLS};

/// The server counts for a part of the time no larger than one of so many.
const SELDOM: u32 = 20;
/// Nobody waits for longer to be let in.
const PATIENCE: Duration = Duration::from_millis(500);

/// What is known of that.
pub(super) struct Fill {
    known: Mutex<Known>,
    /// So many were taken in here since, or are about to be.
    since: AtomicU64,
    /// So many of them are on their way: they may be counted or not.
    flying: AtomicU64,
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

/// Room for calls that are on their way.
pub(super) struct Taken<'a> {
    fill: &'a Fill,
    calls: u64,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.fill.flying.fetch_sub(self.calls, Relaxed);
    }
}

impl Fill {
    pub(super) fn new() -> Self {
        let known = Mutex::new(Known { most: 0, again: None });
        Self { known, since: AtomicU64::new(0), flying: AtomicU64::new(0), turn: Semaphore::new(1) }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes room for so many, if there is some for all that is known.
    fn take(&self, calls: u64, limit: u64) -> Option<Taken<'_>> {
        let known = self.known();
        let there = known.most.saturating_add(self.since.load(Relaxed));
        if known.again.is_none() || there.saturating_add(calls) > limit {
            return None;
        }
        self.since.fetch_add(calls, Relaxed);
        self.flying.fetch_add(calls, Relaxed);
        Some(Taken { fill: self, calls })
    }
}

impl Shared {
    /// Takes room for so many calls, until they are stored. What other gateways have taken in since the calls were
    /// counted last may be more than there was room for.
    ///
    /// # Errors
    /// [`Error::Full`] when there is none.
    pub(super) async fn make_room(&self, calls: usize) -> Result<Taken<'_>, Error> {
        let (calls, limit) = (calls as u64, self.options.limits.pending as u64);
        match self.fill.take(calls, limit) {
            Some(taken) => Ok(taken),
            None => Box::pin(self.count_room(calls, limit)).await,
        }
    }

    async fn count_room(&self, calls: u64, limit: u64) -> Result<Taken<'_>, Error> {
        let turn = tokio::time::timeout(PATIENCE, self.fill.turn.acquire()).await;
        let _turn = turn.map_err(|_| Error::Full)?;
        // Whoever was here before may have found some.
        if let Some(taken) = self.fill.take(calls, limit) {
            return Ok(taken);
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
        let stored = {
            let _known = self.fill.known();
            self.fill.since.load(Relaxed) - self.fill.flying.load(Relaxed)
        };
        let most = self.count_most(limit).await?;
        {
            let mut known = self.fill.known();
            *known = Known { most, again: Some(Instant::now() + start.elapsed() * SELDOM) };
            self.fill.since.fetch_sub(stored, Relaxed);
        }
        self.fill.take(calls, limit).ok_or(Error::Full)
    }

    /// How many calls there are at most. Where that says enough, it is far more than there are.
    async fn count_most(&self, limit: u64) -> Result<u64, Fault> {
        let (server, names) = (&self.server, &self.names);
        let messages = server.messages(&names.calls).await?;
        let most = messages.saturating_mul(ids::MOST as u64);
        if most < limit || messages >= limit {
            return Ok(most);
        }
        let subjects = server.subjects(&names.calls, &names.of(CALLS, None), usize::MAX).await?;
        let all: usize = subjects.iter().map(|subject| subject::calls(subject)).sum();
        if (all as u64) < limit {
            return Ok(all as u64);
        }
        let over: usize = self.records(None).await?.values().map(Record::closed).sum();
        Ok(all.saturating_sub(over) as u64)
    }
}
