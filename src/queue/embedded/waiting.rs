//! What is known in memory: what waits, what is being made, and by whom.

use std::collections::HashMap;
use std::sync::Arc;

use crate::queue::call::Millis;
use crate::queue::embedded::Shared;
use crate::queue::embedded::schedule::{Number, Picked, Schedule};
use crate::queue::embedded::store::Found;
use crate::queue::now;
use crate::queue::status::{Settlement, State, Status};

/// What is known in memory.
#[derive(Default)]
pub(super) struct Waiting {
    pub(super) schedule: Schedule,
    pub(super) running: HashMap<Number, Run>,
    /// How many times a call has been handed out.
    runs: u64,
    pub(super) dead: HashMap<String, u64>,
    /// Calls that were given back by a panic: how often, and when they are made again.
    panicked: HashMap<Number, (u32, Millis)>,
}

/// The pause after the first panic; it doubles with each.
const AFTER_PANIC: Millis = 1000;
/// So often it doubles.
const DOUBLINGS: u32 = 10;

/// A call that is being made.
pub(super) struct Run {
    /// Which time of all this is.
    run: u64,
    /// Not known yet while the call is read from the file.
    pub(super) status: Option<Status>,
}

/// A call that was taken. It is given back when this is dropped unsettled.
pub(in crate::queue) struct Lease {
    pub(super) shared: Arc<Shared>,
    pub(super) held: Held,
}

/// What a call that was taken is known by: the same call may be taken again, by another.
#[derive(Clone, Copy)]
pub(super) struct Held {
    pub(super) picked: Picked,
    run: u64,
}

impl Waiting {
    pub(super) fn add(&mut self, label: &str, number: Number, due: Millis) {
        let line = self.schedule.line(label);
        self.schedule.add(line, number, due, now());
    }

    /// Knows what `found` says, and nothing else but what runs.
    pub(super) fn rebuild(&mut self, found: Vec<Found>) {
        self.schedule.clear();
        self.dead.clear();
        self.panicked.clear();
        for call in found {
            if self.running.contains_key(&call.number) {
                continue;
            }
            match call.dead {
                true => *self.dead.entry(call.label).or_default() += 1,
                false => self.add(&call.label, call.number, call.due),
            }
        }
    }

    /// The next call to make. From here on it runs: nobody can take it back.
    pub(super) fn pick(&mut self, now: Millis, places: usize) -> Option<Held> {
        let picked = self.schedule.pick(now, places)?;
        self.runs += 1;
        self.running.insert(picked.number, Run { run: self.runs, status: None });
        Some(Held { picked, run: self.runs })
    }

    /// A call that was picked is made; `status` tells so.
    pub(super) fn begin(&mut self, held: Held, status: Status) {
        self.running.insert(held.picked.number, Run { run: held.run, status: Some(status) });
    }

    /// The call does not run any more; `false` if it did not already, or is another's.
    pub(super) fn ended(&mut self, held: Held) -> bool {
        let number = held.picked.number;
        let runs = self.running.get(&number).is_some_and(|running| running.run == held.run);
        if runs {
            self.running.remove(&number);
            self.schedule.ended(held.picked.line);
        }
        runs
    }

    /// The status of the call, while it is this holder's.
    pub(super) fn status(&self, held: Held) -> Option<Status> {
        let running = self.running.get(&held.picked.number)?;
        running.status.clone().filter(|_| running.run == held.run)
    }

    /// Takes a waiting call out; `false` if it runs.
    pub(super) fn withdraw(&mut self, number: Number, status: &Status) -> bool {
        let waits = !self.running.contains_key(&number);
        if waits {
            let line = self.schedule.line(&status.function);
            self.schedule.drop_waiting(line, number, self.due(number, status));
        }
        waits
    }

    /// A call that was taken out waits again.
    pub(super) fn restore(&mut self, number: Number, status: &Status) {
        let line = self.schedule.line(&status.function);
        self.schedule.restore(line, number, self.due(number, status));
    }

    /// From when on a waiting call can be made.
    fn due(&self, number: Number, status: &Status) -> Millis {
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
    pub(super) fn state(&self, number: Number, status: &Status) -> State {
        self.running.get(&number).map_or(status.state, |_| State::Running)
    }

    pub(super) fn settled(&mut self, held: Held, status: &Status, settlement: &Settlement) {
        // If it does not run, whoever had it was cut off, and it was given back before this was durable.
        let ran = self.ended(held);
        let picked = held.picked;
        if ran {
            self.panicked.remove(&picked.number);
        }
        match settlement {
            Settlement::Retry { at, .. } if ran => {
                self.schedule.add(picked.line, picked.number, *at, now());
            }
            Settlement::Dead { .. } => *self.dead.entry(status.function.clone()).or_default() += 1,
            Settlement::Retry { .. } | Settlement::Finished { .. } => {}
        }
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
