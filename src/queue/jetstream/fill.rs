//! How many calls there are room for. The server counts messages, each of which may have several calls: of a large queue
//! they are counted by their subjects, which takes it some time, and so as seldom as can be.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

use crate::queue::Error;
use crate::queue::jetstream::Shared;
use crate::queue::jetstream::ids;
use crate::queue::jetstream::server::Fault;
use crate::queue::jetstream::subject::{self, CALLS, OPEN};

/// The server counts for a part of the time no larger than one of so many.
const SELDOM: u32 = 20;
/// Of so many messages at most it is looked at which of their calls are over.
const FEW: u64 = 100;
/// What was counted longer ago is counted again.
const OLD: Duration = Duration::from_secs(2);
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
    /// When that was, and when they may be counted again; `None`: they have not been yet.
    times: Option<(Instant, Instant)>,
}

/// Room for calls that are on their way.
pub(super) struct Admitted<'a> {
    fill: &'a Fill,
    calls: u64,
}

impl Drop for Admitted<'_> {
    fn drop(&mut self) {
        self.fill.flying.fetch_sub(self.calls, Relaxed);
    }
}

impl Fill {
    pub(super) fn new() -> Self {
        let known = Mutex::new(Known { most: 0, times: None });
        Self { known, since: AtomicU64::new(0), flying: AtomicU64::new(0), turn: Semaphore::new(1) }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes room for so many, if there is some for all that is known.
    fn take(&self, calls: u64, limit: u64) -> Option<Admitted<'_>> {
        let known = self.known();
        let there = known.most.saturating_add(self.since.load(Relaxed));
        if known.times.is_none() || there.saturating_add(calls) > limit {
            return None;
        }
        self.since.fetch_add(calls, Relaxed);
        self.flying.fetch_add(calls, Relaxed);
        Some(Admitted { fill: self, calls })
    }
}

impl Shared {
    /// Takes room for so many calls, until they are stored. What other gateways have taken in since the calls were
    /// counted last may be more than there was room for.
    ///
    /// # Errors
    /// [`Error::Full`] when there is none.
    pub(super) async fn make_room(&self, calls: usize) -> Result<Admitted<'_>, Error> {
        let (calls, limit) = (calls as u64, self.options.limits.max_pending as u64);
        match self.fill.take(calls, limit) {
            Some(taken) => Ok(taken),
            None => Box::pin(self.count_room(calls, limit)).await,
        }
    }

    async fn count_room(&self, calls: u64, limit: u64) -> Result<Admitted<'_>, Error> {
        let turn = tokio::time::timeout(PATIENCE, self.fill.turn.acquire()).await;
        let known = self.fill.known().times.is_some();
        let _turn = turn.map_err(|_| if known { Error::Full } else { Error::Unreachable })?;
        // Whoever was here before may have found some.
        if let Some(taken) = self.fill.take(calls, limit) {
            return Ok(taken);
        }
        let times = self.fill.known().times;
        if let Some((_, again)) = times {
            let wait = again.saturating_duration_since(Instant::now());
            if wait > PATIENCE {
                return Err(Error::Full);
            }
            tokio::time::sleep(wait).await;
        }
        self.count(limit).await?;
        self.fill.take(calls, limit).ok_or(Error::Full)
    }

    /// Counts again what was counted a while ago, for others take calls in as well. To be called every second or so.
    pub(super) async fn count_again(&self) -> Result<(), Fault> {
        let times = self.fill.known().times;
        let due = times.is_some_and(|(at, again)| at.elapsed() > OLD && again < Instant::now());
        match self.fill.turn.try_acquire() {
            Ok(_turn) if due => self.count(self.options.limits.max_pending as u64).await,
            _ => Ok(()),
        }
    }

    async fn count(&self, limit: u64) -> Result<(), Fault> {
        let start = Instant::now();
        let stored = {
            let _known = self.fill.known();
            self.fill.since.load(Relaxed) - self.fill.flying.load(Relaxed)
        };
        let (most, each) = self.count_most(limit).await?;
        let mut known = self.fill.known();
        let pause = if each { start.elapsed() * SELDOM } else { Duration::ZERO };
        let now = Instant::now();
        *known = Known { most, times: Some((now, now + pause)) };
        self.fill.since.fetch_sub(stored, Relaxed);
        Ok(())
    }

    /// How many calls there are at most, and whether each message was looked at for that. Where it says enough, the first
    /// is far more than there are.
    async fn count_most(&self, limit: u64) -> Result<(u64, bool), Fault> {
        let (server, names) = (&self.server, &self.names);
        let messages = server.messages(&names.calls).await?;
        let most = messages.saturating_mul(ids::MOST as u64);
        if most < limit {
            return Ok((most, false));
        }
        let subjects = server.subjects(&names.calls, &names.of(CALLS, None), usize::MAX).await?;
        let all: usize = subjects.iter().map(|subject| subject::calls(subject)).sum();
        if (all as u64) < limit || server.messages(&names.open).await? > FEW {
            return Ok((all as u64, true));
        }
        // Some of the calls are over, of messages that are not.
        let open = server.subjects(&names.open, &names.of(OPEN, None), usize::MAX).await?;
        let there: HashSet<_> = subjects.iter().filter_map(|it| names.record_of(it)).collect();
        let mut over = 0;
        for subject in open.iter().filter(|subject| there.contains(*subject)) {
            let record = self.record_at(subject, false).await?;
            over += record.map_or(0, |(record, _)| record.closed());
        }
        Ok((all.saturating_sub(over) as u64, true))
    }
}
