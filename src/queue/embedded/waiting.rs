//! What is known in memory: what waits, what is being made, and by whom.

use std::collections::HashMap;
use std::sync::Arc;

use crate::queue::call::Millis;
use crate::queue::embedded::schedule::{Number, Picked, Schedule};
use crate::queue::embedded::{Shared, now};
use crate::queue::status::{Settlement, State, Status};

/// What is known in memory.
#[derive(Default)]
pub(super) struct Waiting {
    pub(super) schedule: Schedule,
    pub(super) running: HashMap<Number, Run>,
    /// How many times a call has been handed out.
    pub(super) runs: u64,
    pub(super) dead: HashMap<String, u64>,
    pub(super) more_to_expire: bool,
    pub(super) now: Millis,
}

/// A call that is being made.
pub(super) struct Run {
    /// Which time of all this is: the same call may be handed out again.
    pub(super) run: u64,
    /// Not known yet while the call is read from the file.
    pub(super) status: Option<Status>,
}

/// A call that was taken. It is given back when this is dropped unsettled.
pub(in crate::queue) struct Lease {
    pub(super) shared: Arc<Shared>,
    pub(super) picked: Picked,
    pub(super) run: u64,
}

impl Waiting {
    pub(super) fn add(&mut self, label: &str, number: Number, due: Millis) {
        let line = self.schedule.line(label);
        let now = if due == 0 { self.now } else { now() };
        self.schedule.add(line, number, due, now);
    }

    /// The next call to make, and which time of all this is. From here on it runs: nobody can take it back.
    pub(super) fn pick(&mut self, now: Millis, places: usize) -> Option<(Picked, u64)> {
        self.now = now;
        let picked = self.schedule.pick(now, places)?;
        self.runs += 1;
        self.running.insert(picked.number, Run { run: self.runs, status: None });
        Some((picked, self.runs))
    }

    /// The call that `lease` is for is made; `status` tells so.
    pub(super) fn begin(&mut self, lease: &Lease, status: Status) {
        let run = Run { run: lease.run, status: Some(status) };
        self.running.insert(lease.picked.number, run);
    }

    /// The call that `lease` is for does not run any more; `false` if it was not its any more.
    pub(super) fn ended(&mut self, lease: &Lease) -> bool {
        let number = lease.picked.number;
        let runs = self.running.get(&number).is_some_and(|running| running.run == lease.run);
        if runs {
            self.running.remove(&number);
            self.schedule.ended(lease.picked.line);
        }
        runs
    }

    /// The status of the call that `lease` is for, while it is.
    pub(super) fn status(&self, lease: &Lease) -> Option<Status> {
        let running = self.running.get(&lease.picked.number)?;
        running.status.clone().filter(|_| running.run == lease.run)
    }

    /// Takes a waiting call out; `false` if it runs.
    pub(super) fn withdraw(&mut self, number: Number, status: &Status) -> bool {
        let waits = !self.running.contains_key(&number);
        if waits {
            let line = self.schedule.line(&status.function);
            self.schedule.drop_waiting(line, number, status.next_attempt_at.unwrap_or(0));
        }
        waits
    }

    /// A call that was taken out waits again.
    pub(super) fn restore(&mut self, number: Number, status: &Status) {
        let line = self.schedule.line(&status.function);
        self.schedule.restore(line, number, status.next_attempt_at.unwrap_or(0));
    }

    /// The state of a call of which the file says `status`.
    pub(super) fn state(&self, number: Number, status: &Status) -> State {
        self.running.get(&number).map_or(status.state, |_| State::Running)
    }

    pub(super) fn settled(&mut self, picked: Picked, status: &Status, settlement: &Settlement) {
        // If it does not run, whoever had it was cut off, and it was given back before this was durable.
        let ran = self.running.remove(&picked.number).is_some();
        if ran {
            self.schedule.ended(picked.line);
        }
        match settlement {
            Settlement::Retry { at, .. } if ran => {
                self.schedule.add(picked.line, picked.number, *at, now());
            }
            Settlement::Dead { .. } => *self.dead.entry(status.function.clone()).or_default() += 1,
            Settlement::Retry { .. } | Settlement::Finished { .. } | Settlement::GivenBack => {}
        }
    }

    /// A dead call of the function called `label` is dead no more.
    pub(super) fn buried(&mut self, label: &str, was_dead: bool) {
        if was_dead && let Some(dead) = self.dead.get_mut(label) {
            *dead = dead.saturating_sub(1);
        }
    }
}

impl Drop for Lease {
    /// What still runs was not settled: it is given back.
    fn drop(&mut self) {
        let mut waiting = self.shared.waiting();
        if waiting.ended(self) {
            waiting.schedule.give_back(self.picked);
            drop(waiting);
            self.shared.ready.notify_one();
        }
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Lease").field(&self.picked.number).finish()
    }
}
