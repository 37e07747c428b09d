//! The state of the queue in memory: pending and running calls.

use std::collections::{HashMap, HashSet};

use bytes::Bytes;

use crate::call::UnixMillis;
use crate::embedded::packed::BatchCache;
use crate::embedded::schedule::{CallSeq, Schedule, Selected};
use crate::embedded::settle_write::SettleWrite;
use crate::embedded::store::RecoveredCall;
use crate::status::{CallRecord, CallState};
use crate::{PANIC_BACKOFF, now};

/// The state of the queue in memory.
#[derive(Default)]
pub(super) struct QueueState {
    pub(super) schedule: Schedule,
    pub(super) executions: HashMap<CallSeq, Execution>,
    /// Number of executions so far; the id of the latest one.
    last_execution_id: u64,
    pub(super) dead_letters: HashMap<String, u64>,
    /// Calls that were released by a panic: how often, and when each is due again.
    panic_backoff: HashMap<CallSeq, (u32, UnixMillis)>,
    /// Calls with a record in the file: they have been executed before.
    recorded: HashSet<CallSeq>,
    /// Calls that cannot be decoded. They stay in the file and are not executed.
    pub(super) damaged: HashSet<CallSeq>,
    pub(super) batch_cache: BatchCache,
}

/// A running call.
pub(super) struct Execution {
    /// Distinguishes executions of the same call.
    execution_id: u64,
    /// The call's concurrency slot has been released.
    slot_released: bool,
    /// `None` while the call is read from the file.
    pub(super) start: Option<AttemptStart>,
}

/// Start of an attempt.
#[derive(Clone, Copy, Debug)]
pub(super) struct AttemptStart {
    /// Number of attempts, including this one.
    pub(super) attempts: u32,
    pub(super) started_at: UnixMillis,
}

impl AttemptStart {
    /// Returns `record`, updated for the running attempt.
    pub(super) fn apply_to(self, record: CallRecord) -> CallRecord {
        CallRecord {
            state: CallState::Running,
            attempts: self.attempts,
            started_at: Some(self.started_at),
            next_attempt_at: None,
            reason: None,
            finished_at: None,
            ..record
        }
    }
}

/// Identifies one execution of a call, since the same call may be executed again by another worker.
#[derive(Clone, Copy)]
pub(super) struct Claim {
    pub(super) selected: Selected,
    /// The call has a record in the file.
    pub(super) has_record: bool,
    execution_id: u64,
}

impl QueueState {
    pub(super) fn enqueue(&mut self, label: &str, number: CallSeq, due: UnixMillis) {
        let queue = self.schedule.queue_index(label);
        self.schedule.add(queue, number, due, now());
    }

    /// Replaces all state, except for running calls, by what was read from the file.
    pub(super) fn rebuild(&mut self, calls: Vec<RecoveredCall>) {
        self.schedule.clear();
        self.dead_letters.clear();
        self.panic_backoff.clear();
        self.batch_cache.clear();
        self.recorded.clear();
        self.damaged.clear();
        calls.into_iter().for_each(|call| self.restore_call(call));
        self.schedule.sort_by_number();
    }

    /// Adds a call that was read from the file, unless it runs.
    pub(super) fn restore_call(&mut self, call: RecoveredCall) {
        if call.damaged {
            self.damaged.insert(call.number);
            return;
        }
        if call.has_record && !call.dead {
            self.recorded.insert(call.number);
        }
        if self.executions.contains_key(&call.number) {
            return;
        }
        match call.dead {
            true => *self.dead_letters.entry(call.label).or_default() += 1,
            false => self.enqueue(&call.label, call.number, call.due),
        }
    }

    /// Selects the next call, with its encoded form if that is cached. From here on the call runs and cannot be
    /// cancelled.
    pub(super) fn select(
        &mut self,
        now: UnixMillis,
        concurrency: usize,
    ) -> Option<(Claim, Option<Bytes>)> {
        let selected = self.schedule.select(now, concurrency)?;
        self.last_execution_id += 1;
        let run =
            Execution { execution_id: self.last_execution_id, slot_released: false, start: None };
        self.executions.insert(selected.number, run);
        let has_record = self.has_record(selected.number);
        Some((
            Claim { selected, has_record, execution_id: self.last_execution_id },
            self.batch_cache.get(selected.number),
        ))
    }

    /// Starts an attempt of a selected call.
    pub(super) fn start_attempt(&mut self, claim: Claim, start: AttemptStart) {
        let run = Execution {
            execution_id: claim.execution_id,
            slot_released: false,
            start: Some(start),
        };
        self.executions.insert(claim.selected.number, run);
    }

    /// Releases the slot of a call. Returns `false` if it had been released before.
    pub(super) fn release_slot(&mut self, claim: Claim) -> bool {
        let run = self
            .executions
            .get_mut(&claim.selected.number)
            .filter(|run| run.execution_id == claim.execution_id);
        let released = run.is_some_and(|run| !std::mem::replace(&mut run.slot_released, true));
        if released {
            self.schedule.release_slot(claim.selected.queue);
        }
        released
    }

    /// Ends an execution. Returns `false` if it had already ended or is not the current one.
    pub(super) fn end_execution(&mut self, claim: Claim) -> bool {
        let number = claim.selected.number;
        self.release_slot(claim);
        let runs = self.owns(claim);
        if runs {
            self.executions.remove(&number);
            self.schedule.finish_execution(claim.selected.queue);
        }
        runs
    }

    /// Returns whether `claim` is the current execution of its call.
    pub(super) fn owns(&self, claim: Claim) -> bool {
        self.executions
            .get(&claim.selected.number)
            .is_some_and(|running| running.execution_id == claim.execution_id)
    }

    /// Removes a pending call. Returns `false` if it runs.
    pub(super) fn cancel_pending(&mut self, number: CallSeq, status: &CallRecord) -> bool {
        let waits = !self.executions.contains_key(&number);
        // A damaged call is in no queue.
        if waits && !self.damaged.contains(&number) {
            let queue = self.schedule.queue_index(&status.function);
            self.schedule.tombstone(queue, number, self.due_at(number, status));
        }
        waits
    }

    /// Restores a call whose cancellation was not committed.
    pub(super) fn undo_cancel(&mut self, number: CallSeq, status: &CallRecord) {
        if self.damaged.contains(&number) {
            return;
        }
        let queue = self.schedule.queue_index(&status.function);
        self.schedule.restore(queue, number, self.due_at(number, status));
    }

    /// Due time of a pending call.
    fn due_at(&self, number: CallSeq, status: &CallRecord) -> UnixMillis {
        let panicked = self.panic_backoff.get(&number).map(|(_, due)| *due);
        panicked.or(status.next_attempt_at).unwrap_or(0)
    }

    /// Requeues a call whose execution ended unsettled. After a panic it is delayed, since it may make the worker panic
    /// again.
    pub(super) fn requeue(&mut self, selected: Selected, panicking: bool) {
        if !panicking {
            return self.schedule.requeue_first(selected);
        }
        let (times, due) = self.panic_backoff.entry(selected.number).or_default();
        let now = now();
        *times = times.saturating_add(1);
        *due = now
            + UnixMillis::try_from(PANIC_BACKOFF.after(*times).as_millis())
                .unwrap_or(UnixMillis::MAX / 2);
        self.schedule.add(selected.queue, selected.number, *due, now);
    }

    /// The current state of a call whose record in the file is `status`.
    pub(super) fn call_state(&self, number: CallSeq, status: &CallRecord) -> CallState {
        self.executions.get(&number).map_or(status.state, |_| CallState::Running)
    }

    /// Applies a committed settlement. `ended`: the call was pending in the file until then.
    pub(super) fn apply_settlement(&mut self, claim: Claim, settled: &SettleWrite, ended: bool) {
        // If the call does not run, its worker was interrupted and the call was requeued before this commit.
        let ran = self.end_execution(claim);
        let selected = claim.selected;
        if ran {
            self.panic_backoff.remove(&selected.number);
        }
        self.recorded.remove(&selected.number);
        if !ran && ended && !self.executions.contains_key(&selected.number) {
            // The call is finished and need not be executed again.
            let due = self.panic_backoff.remove(&selected.number).map_or(0, |(_, due)| due);
            self.schedule.tombstone(selected.queue, selected.number, due);
        }
        match settled {
            SettleWrite::Retry { at, .. } => {
                self.recorded.insert(selected.number);
                if ran {
                    self.schedule.add(selected.queue, selected.number, *at, now());
                }
            }
            SettleWrite::DeadLetter { label, .. } => {
                *self.dead_letters.entry(label.clone()).or_default() += 1;
                if !ran {
                    // The worker that executes the call by now may settle it differently.
                    self.recorded.insert(selected.number);
                }
            }
            SettleWrite::Finished { .. } => {}
        }
    }

    /// Returns whether a call that is not finished has a record in the file.
    pub(super) fn has_record(&self, number: CallSeq) -> bool {
        self.recorded.contains(&number)
    }

    /// Forgets a call that was cancelled or deleted while pending or damaged.
    pub(super) fn forget_record(&mut self, number: CallSeq) {
        self.recorded.remove(&number);
        self.damaged.remove(&number);
    }

    /// Removes one dead letter of the function `label` from the counter.
    pub(super) fn remove_dead_letter(&mut self, label: &str, was_dead: bool) {
        if was_dead && let Some(dead) = self.dead_letters.get_mut(label) {
            *dead = dead.saturating_sub(1);
            if *dead == 0 {
                self.dead_letters.remove(label);
            }
        }
    }
}
