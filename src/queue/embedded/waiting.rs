//! What is known in memory: what waits, what is being made, and by whom.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;

use crate::queue::call::UnixMillis;
use crate::queue::embedded::Shared;
use crate::queue::embedded::rows::Recent;
use crate::queue::embedded::schedule::{Number, Picked, Schedule};
use crate::queue::embedded::store::Found;
use crate::queue::embedded::writer::Settled;
use crate::queue::now;
use crate::queue::status::{CallRecord, CallState};

/// What is known in memory.
#[derive(Default)]
pub(super) struct Waiting {
    pub(super) schedule: Schedule,
    pub(super) running: HashMap<Number, Run>,
    /// How many times a call has been handed out.
    runs: u64,
    pub(super) dead: HashMap<String, u64>,
    /// Calls that were given back by a panic: how often, and when they are made again.
    panicked: HashMap<Number, (u32, UnixMillis)>,
    /// Calls of which something is noted in the file: they have been made before.
    noted: HashSet<Number>,
    /// Calls that cannot be read: they stay in the file, and are not executed.
    pub(super) damaged: HashSet<Number>,
    pub(super) recent: Recent,
}

/// The pause after the first panic; it doubles with each.
const AFTER_PANIC: UnixMillis = 1000;
/// So often it doubles.
const DOUBLINGS: u32 = 10;

/// A call that is being made.
pub(super) struct Run {
    /// Which time of all this is.
    run: u64,
    /// It has left its place.
    answered: bool,
    /// Not known yet while the call is read from the file.
    pub(super) began: Option<Began>,
}

/// What is known of a call that is being made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Began {
    /// How often it has been made, this time among them.
    pub(super) attempts: u32,
    pub(super) at: UnixMillis,
}

impl Began {
    /// The status of the call, of which `noted` was known before.
    pub(super) fn of(self, noted: CallRecord) -> CallRecord {
        CallRecord {
            state: CallState::Running,
            attempts: self.attempts,
            started_at: Some(self.at),
            next_attempt_at: None,
            reason: None,
            finished_at: None,
            ..noted
        }
    }
}

/// A call that was taken. It is given back when this is dropped unsettled.
pub(in crate::queue) struct Lease {
    pub(super) shared: Arc<Shared>,
    pub(super) held: Held,
    /// Since when.
    pub(super) at: UnixMillis,
    /// How often the call was made before, and what the function said last.
    pub(super) before: (u32, Option<u16>),
}

impl Lease {
    pub(super) fn new(shared: Arc<Shared>, held: Held) -> Self {
        Self { shared, held, at: now(), before: (0, None) }
    }

    /// The call's place is free.
    pub(in crate::queue) fn release_slot(&self) {
        let news = self.shared.waiting().release_slot(self.held);
        if news {
            self.shared.ready.notify_one();
        }
    }
}

/// What a call that was taken is known by: the same call may be taken again, by another.
#[derive(Clone, Copy)]
pub(super) struct Held {
    pub(super) picked: Picked,
    /// Something is noted of it in the file.
    pub(super) noted: bool,
    run: u64,
}

impl Waiting {
    pub(super) fn add(&mut self, label: &str, number: Number, due: UnixMillis) {
        let line = self.schedule.line(label);
        self.schedule.add(line, number, due, now());
    }

    /// Knows what `found` says, and nothing else but what runs.
    pub(super) fn rebuild(&mut self, found: Vec<Found>) {
        self.schedule.clear();
        self.dead.clear();
        self.panicked.clear();
        self.recent.clear();
        self.noted.clear();
        self.damaged.clear();
        found.into_iter().for_each(|call| self.found(call));
        self.schedule.put_in_order();
    }

    /// Knows of a call that is in the file, unless it runs.
    pub(super) fn found(&mut self, call: Found) {
        if call.damaged {
            self.damaged.insert(call.number);
            return;
        }
        if call.noted && !call.dead {
            self.noted.insert(call.number);
        }
        if self.running.contains_key(&call.number) {
            return;
        }
        match call.dead {
            true => *self.dead.entry(call.label).or_default() += 1,
            false => self.add(&call.label, call.number, call.due),
        }
    }

    /// The next call to make, and what is stored of it if that is at hand. From here on it runs: nobody can take it back.
    pub(super) fn pick(&mut self, now: UnixMillis, places: usize) -> Option<(Held, Option<Bytes>)> {
        let picked = self.schedule.pick(now, places)?;
        self.runs += 1;
        let run = Run { run: self.runs, answered: false, began: None };
        self.running.insert(picked.number, run);
        let noted = self.is_noted(picked.number);
        Some((Held { picked, noted, run: self.runs }, self.recent.get(picked.number)))
    }

    /// A call that was picked is made.
    pub(super) fn begin(&mut self, held: Held, began: Began) {
        let run = Run { run: held.run, answered: false, began: Some(began) };
        self.running.insert(held.picked.number, run);
    }

    /// A call has been made, which is to be noted; whether that is news.
    fn release_slot(&mut self, held: Held) -> bool {
        let run = self.running.get_mut(&held.picked.number).filter(|run| run.run == held.run);
        let news = run.is_some_and(|run| !std::mem::replace(&mut run.answered, true));
        if news {
            self.schedule.leaves(held.picked.line);
        }
        news
    }

    /// The call does not run any more; `false` if it did not already, or is another's.
    pub(super) fn ended(&mut self, held: Held) -> bool {
        let number = held.picked.number;
        self.release_slot(held);
        let runs = self.is_held(held);
        if runs {
            self.running.remove(&number);
            self.schedule.ended(held.picked.line);
        }
        runs
    }

    /// Whether the call is this holder's.
    pub(super) fn is_held(&self, held: Held) -> bool {
        self.running.get(&held.picked.number).is_some_and(|running| running.run == held.run)
    }

    /// Takes a waiting call out; `false` if it runs.
    pub(super) fn withdraw(&mut self, number: Number, status: &CallRecord) -> bool {
        let waits = !self.running.contains_key(&number);
        // One that was set aside is in no line.
        if waits && !self.damaged.contains(&number) {
            let line = self.schedule.line(&status.function);
            self.schedule.drop_waiting(line, number, self.due(number, status));
        }
        waits
    }

    /// A call that was taken out waits again.
    pub(super) fn restore(&mut self, number: Number, status: &CallRecord) {
        if self.damaged.contains(&number) {
            return;
        }
        let line = self.schedule.line(&status.function);
        self.schedule.restore(line, number, self.due(number, status));
    }

    /// From when on a waiting call can be made.
    fn due(&self, number: Number, status: &CallRecord) -> UnixMillis {
        let panicked = self.panicked.get(&number).map(|(_, due)| *due);
        panicked.or(status.next_attempt_at).unwrap_or(0)
    }

    /// A call that does not run any more comes back. One that made its worker panic would do so again at once.
    fn give_back(&mut self, picked: Picked, panicking: bool) {
        if !panicking {
            return self.schedule.give_back(picked);
        }
        let (times, due) = self.panicked.entry(picked.number).or_default();
        let now = now();
        *due = now + (AFTER_PANIC << (*times).min(DOUBLINGS));
        *times += 1;
        self.schedule.add(picked.line, picked.number, *due, now);
    }

    /// The state of a call of which the file says `status`.
    pub(super) fn state(&self, number: Number, status: &CallRecord) -> CallState {
        self.running.get(&number).map_or(status.state, |_| CallState::Running)
    }

    /// A call was settled; `ended`: it is over by that.
    pub(super) fn settled(&mut self, held: Held, settled: &Settled, ended: bool) {
        // If it does not run, whoever had it was cut off, and it was given back before this was durable.
        let ran = self.ended(held);
        let picked = held.picked;
        if ran {
            self.panicked.remove(&picked.number);
        }
        self.noted.remove(&picked.number);
        if !ran && ended && !self.running.contains_key(&picked.number) {
            // It is over, so it need not be made again.
            let due = self.panicked.remove(&picked.number).map_or(0, |(_, due)| due);
            self.schedule.drop_waiting(picked.line, picked.number, due);
        }
        match settled {
            Settled::Retry { at, .. } => {
                self.noted.insert(picked.number);
                if ran {
                    self.schedule.add(picked.line, picked.number, *at, now());
                }
            }
            Settled::Dead { label, .. } => {
                *self.dead.entry(label.clone()).or_default() += 1;
                if !ran {
                    // Whoever has it by now may settle it otherwise.
                    self.noted.insert(picked.number);
                }
            }
            Settled::Over { .. } => {}
        }
    }

    /// Whether something is noted in the file of a call that is not over.
    pub(super) fn is_noted(&self, number: Number) -> bool {
        self.noted.contains(&number)
    }

    /// A call that waited, or was set aside, is cancelled or removed.
    pub(super) fn forget(&mut self, number: Number) {
        self.noted.remove(&number);
        self.damaged.remove(&number);
    }

    /// A dead call of the function called `label` is dead no more.
    pub(super) fn buried(&mut self, label: &str, was_dead: bool) {
        if was_dead && let Some(dead) = self.dead.get_mut(label) {
            *dead = dead.saturating_sub(1);
            if *dead == 0 {
                self.dead.remove(label);
            }
        }
    }
}

impl Drop for Lease {
    /// What still runs was not settled: it is given back.
    fn drop(&mut self) {
        let mut waiting = self.shared.waiting();
        if waiting.ended(self.held) {
            waiting.give_back(self.held.picked, std::thread::panicking());
            drop(waiting);
            self.shared.ready.notify_one();
        }
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Lease").field(&self.held.picked.number).finish()
    }
}
