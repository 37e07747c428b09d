//! Tracks which process executes which calls. Each receiver publishes one list of the calls that it has claimed. Claims
//! that arrive while the list is being written are added to the next version, so one write covers many calls.
//!
//! To cancel a call, a process writes a cancel marker and then reads the lists. A receiver writes its list and then
//! reads the markers. So at least one of them sees the other, and a cancelled call is never executed.
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use async_nats::HeaderMap;
use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::sync::oneshot;

use crate::call::UnixMillis;
use crate::jetstream::Shared;
use crate::jetstream::consume::received::Received;
use crate::jetstream::decide::claim::SeenMarkers;
use crate::jetstream::error::NatsError;
use crate::jetstream::wire::call_ref::CallRef;
use crate::jetstream::wire::claims::RunningList;
use crate::jetstream::wire::json;
use crate::now;
use gateway_base::sync::lock_unpoisoned;

/// Maximum number of concurrent requests to the server.
const MAX_CONCURRENT_QUERIES: usize = 32;

/// The calls that this process holds.
pub(in crate::jetstream) struct Claims {
    /// Identifies the list of this process.
    receiver_id: String,
    /// The calls, and the state of their list. A leaf.
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    tracked: HashMap<u64, TrackedCall>,
    /// The last id given to a tracked call.
    last_id: u64,
    /// Claims that wait for the next write of the list.
    pending_claims: Vec<(u64, oneshot::Sender<Result<bool, NatsError>>)>,
    /// A task is writing the list.
    writing: bool,
    /// The published list contains a call that this process no longer holds, and must be updated soon.
    stale: bool,
    /// The last published list was not empty.
    list_not_empty: bool,
    /// Time of the last write, and its connection.
    last_write: Option<(Instant, u64)>,
    markers: SeenMarkers,
    /// A task extends the leases.
    supervised: bool,
}

struct TrackedCall {
    received: Arc<Received>,
    /// Time when the call was added to the list.
    claimed_at: Option<UnixMillis>,
    /// Time of the last in-progress ack.
    last_progress: Instant,
}

impl Claims {
    pub(in crate::jetstream) fn new() -> Self {
        Self { receiver_id: uuid::Uuid::new_v4().simple().to_string(), inner: Mutex::default() }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        lock_unpoisoned(&self.inner)
    }

    /// Starts to extend the lease of a call. Returns the id of the claim.
    pub(in crate::jetstream) fn track(&self, received: &Arc<Received>) -> u64 {
        let mut inner = self.inner();
        inner.last_id += 1;
        let claim_id = inner.last_id;
        let tracked = TrackedCall {
            received: Arc::clone(received),
            claimed_at: None,
            last_progress: Instant::now(),
        };
        inner.tracked.insert(claim_id, tracked);
        claim_id
    }

    /// Returns the held call of the message `sequence`, if there is one.
    pub(in crate::jetstream) fn tracked(&self, sequence: u64) -> Option<Arc<Received>> {
        let inner = self.inner();
        let tracked =
            inner.tracked.values().find(|tracked| tracked.received.sequence == sequence)?;
        Some(Arc::clone(&tracked.received))
    }

    /// Stops tracking a call. Unless it is `finished`, the list is updated soon, so that other receivers may claim the
    /// call.
    pub(in crate::jetstream) fn untrack(
        &self,
        shared: &Arc<Shared>,
        claim_id: u64,
        finished: bool,
    ) {
        let mut inner = self.inner();
        let listed =
            inner.tracked.remove(&claim_id).is_some_and(|tracked| tracked.claimed_at.is_some());
        if listed && !finished {
            inner.stale = true;
            self.schedule_write(&mut inner, shared);
        }
    }

    /// Returns the time when the call was added to the list.
    pub(in crate::jetstream) fn claimed_at(&self, claim_id: u64) -> Option<UnixMillis> {
        self.inner().tracked.get(&claim_id)?.claimed_at
    }

    /// Adds a call to the published list. Returns `false` if the call is being cancelled.
    pub(in crate::jetstream) async fn claim(
        &self,
        shared: &Arc<Shared>,
        claim_id: u64,
    ) -> Result<bool, NatsError> {
        let (done, claimed) = oneshot::channel();
        {
            let mut inner = self.inner();
            inner.pending_claims.push((claim_id, done));
            self.schedule_write(&mut inner, shared);
        }
        // The sender is dropped when the queue is stopped.
        claimed.await.unwrap_or(Err(NatsError::Unavailable))
    }

    fn schedule_write(&self, inner: &mut Inner, shared: &Arc<Shared>) {
        if inner.writing {
            return;
        }
        inner.writing = true;
        let shared = Arc::clone(shared);
        let tasks = Arc::clone(&shared);
        tasks.tasks.spawn(async move { shared.claims.write_while_changed(&shared).await });
    }

    /// Writes the list until no change is left.
    async fn write_while_changed(&self, shared: &Shared) {
        loop {
            let (pending, new, list) = {
                let mut inner = self.inner();
                let pending = std::mem::take(&mut inner.pending_claims);
                if pending.is_empty() && !inner.stale {
                    inner.writing = false;
                    return;
                }
                inner.stale = false;
                inner.list_not_empty = true;
                let new: Vec<CallRef> =
                    pending.iter().map(|(claim_id, _)| inner.add_to_list(*claim_id)).collect();
                (pending, new, inner.running_list())
            };
            let cancelled = self.publish_list(shared, &list, &new).await;
            let results = pending.into_iter().zip(new).map(|((_, done), call_ref)| {
                let accepted = cancelled.as_ref().map(|cancelled| !cancelled.contains(&call_ref));
                (done, accepted.map_err(Clone::clone))
            });
            for (done, accepted) in results {
                // The receiver may have been dropped.
                let _ = done.send(accepted);
            }
        }
    }

    /// Publishes the list. Returns those of the `new` calls that are being cancelled.
    async fn publish_list(
        &self,
        shared: &Shared,
        list: &RunningList,
        new: &[CallRef],
    ) -> Result<Vec<CallRef>, NatsError> {
        let connection = shared.ready().await?.api.wait_connected().await?;
        let subject = shared.subjects.running_list(&self.receiver_id);
        let stored = shared.api.publish(subject, HeaderMap::new(), json(list).into(), None).await?;
        let must_read = {
            let mut inner = self.inner();
            inner.last_write = Some((Instant::now(), connection));
            inner.list_not_empty = !list.is_empty();
            inner.markers.must_read(stored.sequence)
        };
        if new.is_empty() && must_read {
            return Ok(Vec::new());
        }
        if must_read {
            let (claims, marker) = (&shared.subjects.claims, shared.subjects.cancel_marker("*"));
            let latest = shared.api.get_last(claims, &marker).await?.map(|found| found.sequence);
            self.inner().markers.on_read(latest, Instant::now());
        }
        let may_be_cancelled =
            self.inner().markers.may_be_cancelled(stored.sequence, Instant::now());
        match may_be_cancelled {
            true => self.with_cancel_marker(shared, new).await,
            false => Ok(Vec::new()),
        }
    }

    /// Returns those of the calls that have a cancel marker.
    async fn with_cancel_marker(
        &self,
        shared: &Shared,
        calls: &[CallRef],
    ) -> Result<Vec<CallRef>, NatsError> {
        let (api, subjects) = (&shared.api, &shared.subjects);
        stream::iter(calls.to_vec())
            .map(|call| async move {
                let found = api.get_last(&subjects.claims, &subjects.cancel_marker(call)).await?;
                Ok(found.map(|_| call))
            })
            .buffer_unordered(MAX_CONCURRENT_QUERIES)
            .try_filter_map(|call| std::future::ready(Ok(call)))
            .try_collect()
            .await
    }

    /// Returns whether the caller must start the task that extends leases: it does not run.
    pub(super) fn start_supervision(&self) -> bool {
        !std::mem::replace(&mut self.inner().supervised, true)
    }

    /// Returns whether the task that extends leases ends: this process holds no call.
    pub(super) fn end_supervision(&self, shared: &Arc<Shared>, nothing_prefetched: bool) -> bool {
        let mut inner = self.inner();
        let ends = inner.tracked.is_empty() && nothing_prefetched;
        if ends {
            inner.supervised = false;
            if inner.list_not_empty {
                // Finished calls may still be on the list.
                inner.stale = true;
                self.schedule_write(&mut inner, shared);
            }
        }
        ends
    }

    /// Returns the calls without an in-progress ack for `time`, and resets their timers.
    pub(super) fn due_for_progress(&self, time: Duration) -> Vec<Arc<Received>> {
        let mut inner = self.inner();
        let old =
            inner.tracked.values_mut().filter(|tracked| tracked.last_progress.elapsed() >= time);
        old.map(|tracked| {
            tracked.last_progress = Instant::now();
            Arc::clone(&tracked.received)
        })
        .collect()
    }

    /// Publishes an empty list: this process executes no more calls.
    pub(in crate::jetstream) async fn publish_empty(&self, shared: &Shared) {
        if !self.inner().list_not_empty {
            return;
        }
        if let Err(error) = self.publish_list(shared, &RunningList::default(), &[]).await {
            tracing::debug!(%error, "Cannot publish an empty list of running calls");
        }
    }

    /// Publishes the list again if it would expire, or if the connection has changed.
    pub(super) async fn republish_if_old(&self, shared: &Arc<Shared>, age: Duration) {
        let connection = shared.api.wait_connected().await.ok();
        let mut inner = self.inner();
        let listed = inner.tracked.values().any(|tracked| tracked.claimed_at.is_some());
        let fresh = inner
            .last_write
            .is_some_and(|(at, used)| at.elapsed() < age && Some(used) == connection);
        if listed && !fresh {
            inner.stale = true;
            self.schedule_write(&mut inner, shared);
        }
    }
}

impl Inner {
    fn running_list(&self) -> RunningList {
        let mut list = RunningList::default();
        for TrackedCall { received, claimed_at, .. } in self.tracked.values() {
            if let Some(claimed_at) = claimed_at {
                list.add(&received.consumer, received.call_ref(), *claimed_at);
            }
        }
        list
    }

    /// Adds a call to the list.
    fn add_to_list(&mut self, claim_id: u64) -> CallRef {
        // The caller of a claim that is no longer tracked is gone.
        let Some(tracked) = self.tracked.get_mut(&claim_id) else { return CallRef::single(0) };
        tracked.claimed_at = Some(now());
        tracked.received.call_ref()
    }
}
