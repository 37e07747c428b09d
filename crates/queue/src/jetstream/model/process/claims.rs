//! The running list of a worker process, and the leases of the calls on it.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use crate::jetstream::decide::claim::SeenMarkers;
use crate::jetstream::model::process::{Process, Received};
use crate::jetstream::model::server::{Fault, LEASE, Payload, Subject};
use crate::jetstream::model::world::{Ack, wait_for};
use crate::jetstream::wire::call_ref::CallRef;
use crate::jetstream::wire::claims::RunningList;

/// A call that a process holds.
struct Tracked {
    call_ref: CallRef,
    claimed: bool,
    last_progress: Instant,
}

/// Receives whether a claim was accepted.
type Claimed = Rc<Cell<Option<Result<bool, Fault>>>>;

#[derive(Default)]
pub(super) struct Claims {
    tracked: BTreeMap<u64, Tracked>,
    last_id: u64,
    pending: Vec<(u64, Claimed)>,
    writing: bool,
    stale: bool,
    last_write: Option<Instant>,
    markers: SeenMarkers,
}

impl Claims {
    pub(super) fn count(&self) -> usize {
        self.tracked.len()
    }

    /// Returns whether the process holds a call of the message `sequence`.
    pub(super) fn holds(&self, sequence: u64) -> bool {
        self.tracked.values().any(|held| held.call_ref.sequence == sequence)
    }
}

/// Extends the leases of all held calls, and publishes the list again before it expires.
pub(super) async fn extend_leases(process: Rc<Process>) {
    loop {
        process.world.sleep(Duration::from_millis(500)).await;
        let now = process.world.now();
        let (mut due, mut republish) = (Vec::new(), false);
        {
            let mut claims = process.claims.borrow_mut();
            for tracked in claims.tracked.values_mut() {
                if now - tracked.last_progress >= LEASE / 3 {
                    tracked.last_progress = now;
                    due.push(tracked.call_ref.sequence);
                }
            }
            let is_old = claims.last_write.is_none_or(|at| now - at >= LEASE / 3);
            if is_old && claims.tracked.values().any(|tracked| tracked.claimed) {
                (claims.stale, republish) = (true, true);
            }
        }
        for sequence in due {
            process.world.ack(sequence, Ack::Progress).await;
        }
        if republish {
            process.schedule_list();
        }
    }
}

impl Process {
    pub(super) fn track(&self, received: &Received) -> u64 {
        let mut claims = self.claims.borrow_mut();
        claims.last_id += 1;
        let (call_ref, last_progress) = (received.call_ref(), self.world.now());
        let id = claims.last_id;
        claims.tracked.insert(id, Tracked { call_ref, claimed: false, last_progress });
        id
    }

    pub(super) fn is_tracked(&self, claim_id: u64) -> bool {
        self.claims.borrow().tracked.contains_key(&claim_id)
    }

    pub(super) fn untrack(self: &Rc<Self>, claim_id: u64, finished: bool) {
        let listed =
            self.claims.borrow_mut().tracked.remove(&claim_id).is_some_and(|held| held.claimed);
        if listed && !finished {
            self.claims.borrow_mut().stale = true;
            self.schedule_list();
        }
    }

    /// Adds a call to the list. Returns `false` if the call is being cancelled.
    pub(super) async fn add_to_list(self: &Rc<Self>, claim_id: u64) -> Result<bool, Fault> {
        let done = Rc::new(Cell::new(None));
        self.claims.borrow_mut().pending.push((claim_id, Rc::clone(&done)));
        self.schedule_list();
        wait_for(|| done.get()).await
    }

    fn schedule_list(self: &Rc<Self>) {
        if !std::mem::replace(&mut self.claims.borrow_mut().writing, true) {
            let this = Rc::clone(self);
            self.spawn(async move { this.write_list().await });
        }
    }

    async fn write_list(&self) {
        loop {
            let (pending, new, list) = {
                let mut claims = self.claims.borrow_mut();
                let pending = std::mem::take(&mut claims.pending);
                if pending.is_empty() && !claims.stale {
                    claims.writing = false;
                    return;
                }
                claims.stale = false;
                let mut new = Vec::new();
                for (claim_id, _) in &pending {
                    let Some(held) = claims.tracked.get_mut(claim_id) else {
                        new.push(CallRef::single(0));
                        continue;
                    };
                    held.claimed = true;
                    new.push(held.call_ref);
                }
                let mut list = RunningList::default();
                for held in claims.tracked.values().filter(|held| held.claimed) {
                    list.add("fn,echo", held.call_ref, 1);
                }
                (pending, new, list)
            };
            let cancelled = self.publish_list(list, &new).await;
            for ((_, done), call_ref) in pending.into_iter().zip(new) {
                let accepted = cancelled.as_ref().map(|cancelled| !cancelled.contains(&call_ref));
                done.set(Some(accepted.map_err(|fault| *fault)));
            }
        }
    }

    /// Publishes the list. Returns those of the new calls that are being cancelled.
    async fn publish_list(
        &self,
        list: RunningList,
        new: &[CallRef],
    ) -> Result<Vec<CallRef>, Fault> {
        let world = &self.world;
        let list = Payload::List(list);
        let stored = world.publish(Subject::List(self.number), list, None).await?;
        self.claims.borrow_mut().last_write = Some(world.now());
        let must_read = self.claims.borrow().markers.must_read(stored);
        if new.is_empty() && must_read {
            return Ok(Vec::new());
        }
        if must_read {
            let latest = world.request(|server, now| Ok(server.latest_marker(now))).await?;
            self.claims.borrow_mut().markers.on_read(latest, world.now());
        }
        let mut cancelled = Vec::new();
        if self.claims.borrow_mut().markers.may_be_cancelled(stored, world.now()) {
            for call_ref in new {
                if world.get(Subject::Marker(*call_ref)).await?.is_some() {
                    cancelled.push(*call_ref);
                }
            }
        }
        Ok(cancelled)
    }
}
