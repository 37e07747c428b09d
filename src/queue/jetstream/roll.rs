//! Who makes which calls. Each taker keeps a list of those that it makes on the server, and puts what comes while the
//! list is being written on it together next, so that a list is written for many calls at once.
//!
//! Whoever takes a call back writes a mark first and reads the lists then; a taker writes its list first and reads the
//! marks then. So at least one of the two sees the other, and a call is never both made and taken back.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_nats::HeaderMap;
use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::sync::oneshot;

use crate::queue::call::UnixMillis;
use crate::queue::jetstream::Shared;
use crate::queue::jetstream::begun;
use crate::queue::jetstream::bundle::Place;
use crate::queue::jetstream::message::{List, json};
use crate::queue::jetstream::pull::Arrived;
use crate::queue::jetstream::server::Fault;
use crate::queue::now;

/// A mark is heeded for so long. Whoever writes one is done within half of it, and no call is held unmarked for longer.
pub(super) const HEEDED: Duration = Duration::from_secs(10);
/// So many questions are on their way at a time.
const TOGETHER: usize = 32;

/// The calls that we have.
pub(super) struct Roll {
    /// What our list is known by.
    taker: String,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    held: HashMap<u64, Held>,
    /// How many have been held.
    holds: u64,
    /// Who waits for the list.
    waiting: Vec<(u64, oneshot::Sender<Result<bool, Fault>>)>,
    /// Somebody writes the list.
    writing: bool,
    /// The list names a call that we do not have any more, which others are to know soon.
    stale: bool,
    /// The list as it was written last names calls.
    names_some: bool,
    /// When it was written, and over which connection.
    written: Option<(Instant, u64)>,
    /// The latest mark of all, and when it was new to us.
    mark: Option<(u64, Instant)>,
    /// Up to which number of the lists and marks that is so.
    marks_seen: u64,
    /// Somebody looks after what we have.
    kept: bool,
}

struct Held {
    arrived: Arc<Arrived>,
    /// Since when it is on our list.
    since: Option<UnixMillis>,
    /// When the server has last heard of it.
    told: Instant,
}

impl Roll {
    pub(super) fn new() -> Self {
        Self { taker: uuid::Uuid::new_v4().simple().to_string(), inner: Mutex::default() }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on the server hears that we have the call. What comes back is what it is known by here.
    pub(super) fn hold(&self, arrived: &Arc<Arrived>) -> u64 {
        let mut inner = self.inner();
        inner.holds += 1;
        let hold = inner.holds;
        let held = Held { arrived: Arc::clone(arrived), since: None, told: Instant::now() };
        inner.held.insert(hold, held);
        hold
    }

    /// The call that is the message `sequence`, if we have it.
    pub(super) fn held(&self, sequence: u64) -> Option<Arc<Arrived>> {
        let inner = self.inner();
        let held = inner.held.values().find(|held| held.arrived.sequence == sequence)?;
        Some(Arc::clone(&held.arrived))
    }

    /// We have it no more. If it is not `over`, others are to know soon.
    pub(super) fn release(&self, shared: &Arc<Shared>, hold: u64, over: bool) {
        let mut inner = self.inner();
        let listed = inner.held.remove(&hold).is_some_and(|held| held.since.is_some());
        if listed && !over {
            inner.stale = true;
            self.write_soon(&mut inner, shared);
        }
    }

    /// Since when the call has been on the list.
    pub(super) fn since(&self, hold: u64) -> Option<UnixMillis> {
        self.inner().held.get(&hold)?.since
    }

    /// Puts a call on the list; `false` if somebody takes it back.
    pub(super) async fn claim(&self, shared: &Arc<Shared>, hold: u64) -> Result<bool, Fault> {
        let (done, claimed) = oneshot::channel();
        {
            let mut inner = self.inner();
            inner.waiting.push((hold, done));
            self.write_soon(&mut inner, shared);
        }
        // It is dropped when the queue is stopped.
        claimed.await.unwrap_or(Err(Fault::Away))
    }

    fn write_soon(&self, inner: &mut Inner, shared: &Arc<Shared>) {
        if inner.writing {
            return;
        }
        inner.writing = true;
        let shared = Arc::clone(shared);
        let tasks = Arc::clone(&shared);
        tasks.tasks.spawn(async move { shared.roll.write(&shared).await });
    }

    /// Writes the list as long as it changes.
    async fn write(&self, shared: &Shared) {
        loop {
            let (waiting, new, list) = {
                let mut inner = self.inner();
                let waiting = std::mem::take(&mut inner.waiting);
                if waiting.is_empty() && !inner.stale {
                    inner.writing = false;
                    return;
                }
                inner.stale = false;
                inner.names_some = true;
                let new: Vec<Place> =
                    waiting.iter().map(|(hold, _)| inner.list_it(*hold)).collect();
                (waiting, new, inner.list())
            };
            let marked = self.store(shared, &list, &new).await;
            let answers = waiting.into_iter().zip(new).map(|((_, done), place)| {
                let ours = marked.as_ref().map(|marked| !marked.contains(&place));
                (done, ours.map_err(Clone::clone))
            });
            for (done, ours) in answers {
                // Whoever has left does not want it.
                let _ = done.send(ours);
            }
        }
    }

    /// Stores the list. Which of the calls that are `new` on it somebody takes back.
    async fn store(
        &self,
        shared: &Shared,
        list: &List,
        new: &[Place],
    ) -> Result<Vec<Place>, Fault> {
        let connection = shared.ready().await?.server.connection().await?;
        let subject = shared.names.list(&self.taker);
        let stored = shared.server.put(subject, HeaderMap::new(), json(list).into(), None).await?;
        let nothing_between = {
            let mut inner = self.inner();
            inner.written = Some((Instant::now(), connection));
            inner.names_some = !list.is_empty();
            inner.marks_seen + 1 == stored.sequence
        };
        if new.is_empty() && !nothing_between {
            return Ok(Vec::new());
        }
        if !nothing_between {
            let (claims, mark) = (&shared.names.claims, shared.names.mark("*"));
            let latest = shared.server.last(claims, &mark).await?.map(|found| found.sequence);
            let mut inner = self.inner();
            if inner.mark.map(|(mark, _)| mark) != latest {
                inner.mark = latest.map(|mark| (mark, Instant::now()));
            }
        }
        let mark = {
            let mut inner = self.inner();
            inner.marks_seen = stored.sequence;
            inner.mark
        };
        match mark {
            // The others are older than anything that we have been given since.
            Some((_, at)) if at.elapsed() <= HEEDED => self.marked(shared, new).await,
            _ => Ok(Vec::new()),
        }
    }

    /// Which of these calls have a mark.
    async fn marked(&self, shared: &Shared, calls: &[Place]) -> Result<Vec<Place>, Fault> {
        let (server, names) = (&shared.server, &shared.names);
        stream::iter(calls.to_vec())
            .map(|call| async move {
                let found = server.last(&names.claims, &names.mark(call)).await?;
                Ok(found.map(|_| call))
            })
            .buffer_unordered(TOGETHER)
            .try_filter_map(|call| std::future::ready(Ok(call)))
            .try_collect()
            .await
    }

    /// Sees that what we have stays ours, and that what nobody here takes goes back, until we have nothing.
    pub(super) fn keep(shared: &Arc<Shared>) {
        if std::mem::replace(&mut shared.roll.inner().kept, true) {
            return;
        }
        let shared = Arc::clone(shared);
        let tasks = Arc::clone(&shared);
        tasks.tasks.supervise("leases", move || Self::keep_all(Arc::clone(&shared)));
    }

    async fn keep_all(shared: Arc<Shared>) {
        let lease = shared.options.lease;
        loop {
            tokio::time::sleep((lease / 6).min(begun::HOLD / 2)).await;
            begun::give_back(&shared).await;
            let untold = shared.roll.inner().untold(lease / 3);
            for arrived in untold {
                arrived.still_busy(&shared).await;
            }
            shared.roll.renew(&shared, lease / 3).await;
            let nothing_ahead = begun::nothing_ahead(&shared);
            let mut inner = shared.roll.inner();
            if inner.held.is_empty() && nothing_ahead {
                inner.kept = false;
                if inner.names_some {
                    // Those that are over still count as being made.
                    inner.stale = true;
                    shared.roll.write_soon(&mut inner, &shared);
                }
                return;
            }
        }
    }

    /// Leaves an empty list behind: we make no more calls.
    pub(super) async fn leave(&self, shared: &Shared) {
        if !self.inner().names_some {
            return;
        }
        if let Err(error) = self.store(shared, &List::default(), &[]).await {
            tracing::debug!(%error, "The list of calls that are made cannot be emptied");
        }
    }

    /// Writes a list anew that would grow too old, or that a server has not seen.
    async fn renew(&self, shared: &Arc<Shared>, age: Duration) {
        let connection = shared.server.connection().await.ok();
        let mut inner = self.inner();
        let listed = inner.held.values().any(|held| held.since.is_some());
        let fresh =
            inner.written.is_some_and(|(at, over)| at.elapsed() < age && Some(over) == connection);
        if listed && !fresh {
            inner.stale = true;
            self.write_soon(&mut inner, shared);
        }
    }
}

impl Inner {
    fn list(&self) -> List {
        let mut list = List::default();
        for Held { arrived, since, .. } in self.held.values() {
            if let Some(since) = since {
                list.add(&arrived.consumer, arrived.place(), *since);
            }
        }
        list
    }

    /// Puts a call on the list; its place.
    fn list_it(&mut self, hold: u64) -> Place {
        // Whoever waited for one that is not held any more has left.
        let Some(held) = self.held.get_mut(&hold) else { return Place::alone(0) };
        held.since = Some(now());
        held.arrived.place()
    }

    /// What the server has not heard of for `time`; it is told now.
    fn untold(&mut self, time: Duration) -> Vec<Arc<Arrived>> {
        let old = self.held.values_mut().filter(|held| held.told.elapsed() >= time);
        old.map(|held| {
            held.told = Instant::now();
            Arc::clone(&held.arrived)
        })
        .collect()
    }
}

impl Shared {
    /// The calls that somebody makes at this moment, and since when.
    pub(super) async fn runs(&self) -> Result<HashMap<Place, UnixMillis>, Fault> {
        Ok(self.lists().await?.iter().flat_map(List::places).collect())
    }

    /// What each taker makes at this moment.
    pub(super) async fn lists(&self) -> Result<Vec<List>, Fault> {
        let (server, names) = (&self.server, &self.names);
        let lists = server.subjects(&names.claims, &names.list("*"), usize::MAX).await?;
        let lists: Vec<_> = stream::iter(lists)
            .map(|list| async move { server.last(&names.claims, &list).await })
            .buffer_unordered(TOGETHER)
            .try_collect()
            .await?;
        let lists = lists.into_iter().flatten();
        Ok(lists.filter_map(|it| serde_json::from_slice(&it.payload).ok()).collect())
    }
}
