//! Decides which consumers to pull from, and which buffered call to execute next. No I/O.
//!
//! Each function has its own consumer on the server, so its calls do not wait behind those of other functions.
//! Concurrency is shared by the rule of all queue backends (`share`).

pub(in crate::jetstream) mod pulls;
use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use crate::fair_share::may_start;
use crate::jetstream::consume::pull_scheduler::pulls::PullRequest;
use crate::jetstream::consume::rate::ArrivalRate;
use crate::jetstream::wire::batch::MAX_CALLS_PER_BATCH;
use gateway_base::function::Function;

/// Maximum number of calls per pull.
const MAX_PULL_CALLS: usize = 64;

/// Number of messages over which the mean batch size is averaged.
const BATCH_SIZE_SMOOTHING: f64 = 8.0;

/// All functions with a consumer, and their buffered calls.
pub(in crate::jetstream) struct PullScheduler<A> {
    functions: Vec<FunctionPull<A>>,
    by_function: HashMap<Function, usize>,
    /// Index of the function that is next in the round robin.
    next_turn: usize,
    /// Number of executing calls, and the concurrency of the receiver.
    executing: usize,
    concurrency: usize,
    /// Number of pulls so far.
    pull_count: u64,
}

struct FunctionPull<A> {
    function: Function,
    /// Runnable calls, and the times of their arrival.
    buffered: VecDeque<(Instant, A)>,
    /// Number of selected calls that no receiver has yet.
    selected: usize,
    /// Number of executing calls.
    executing: usize,
    /// The function has no consumer.
    retired: bool,
    pull: Option<PullRequest>,
    rate: ArrivalRate,
    /// Moving average of the calls per message.
    mean_batch_size: Option<f64>,
}

impl<A> PullScheduler<A> {
    pub(in crate::jetstream) fn new() -> Self {
        Self {
            functions: Vec::new(),
            by_function: HashMap::new(),
            next_turn: 0,
            executing: 0,
            concurrency: 1,
            pull_count: 0,
        }
    }

    /// Adds a function; returns `false` if it is already active.
    pub(in crate::jetstream) fn add(&mut self, function: &Function) -> bool {
        if let Some(index) = self.by_function.get(function) {
            return std::mem::take(&mut self.functions[*index].retired);
        }
        self.by_function.insert(function.clone(), self.functions.len());
        self.functions.push(FunctionPull {
            function: function.clone(),
            buffered: VecDeque::new(),
            selected: 0,
            executing: 0,
            retired: false,
            pull: None,
            rate: ArrivalRate::default(),
            mean_batch_size: None,
        });
        true
    }

    pub(in crate::jetstream) fn index_of(&self, function: &Function) -> Option<usize> {
        self.by_function.get(function).copied()
    }

    pub(in crate::jetstream) fn function(&self, index: usize) -> Option<Function> {
        Some(self.functions.get(index)?.function.clone())
    }

    /// Records the arrival of a message, before its calls are decoded.
    pub(in crate::jetstream) fn on_message(&mut self, index: usize, calls: usize, now: Instant) {
        let function = &mut self.functions[index];
        (0..calls).for_each(|_| function.rate.record(now));
        let size = function.mean_batch_size.unwrap_or(calls as f64);
        function.mean_batch_size = Some(size + (calls as f64 - size) / BATCH_SIZE_SMOOTHING);
        if let Some(pull) = &mut function.pull {
            pull.remaining = pull.remaining.saturating_sub(1);
        }
    }

    /// Handles a new consumer of `function`: pulls from an earlier one deliver nothing.
    pub(in crate::jetstream) fn on_consumer_created(&mut self, function: &Function) {
        self.add(function);
        if let Some(index) = self.index_of(function) {
            self.functions[index].pull = None;
        }
    }

    /// Stops pulls of a function until it is added again.
    pub(in crate::jetstream) fn retire(&mut self, index: usize) {
        if let Some(function) = self.functions.get_mut(index) {
            (function.retired, function.pull) = (true, None);
        }
    }

    /// Buffers a runnable call.
    pub(in crate::jetstream) fn push(&mut self, index: usize, call: A, now: Instant) {
        self.functions[index].buffered.push_back((now, call));
    }

    /// Selects the next call to claim, for a receiver with this concurrency. Functions take turns. Of each
    /// function, calls are selected for its free slots, and for those expected to become free soon.
    pub(in crate::jetstream) fn select(
        &mut self,
        concurrency: usize,
        now: Instant,
    ) -> Option<(usize, A)> {
        self.concurrency = concurrency;
        for step in 0..self.functions.len() {
            let index = (self.next_turn + step) % self.functions.len();
            let function = &self.functions[index];
            if function.buffered.is_empty() {
                continue;
            }
            // Prefetched calls do not count against concurrency.
            let executing = (function.selected + 1).saturating_sub(function.rate.prefetch(now));
            if self.free_slots(index, concurrency, executing) < executing {
                continue;
            }
            if let Some((_, call)) = self.functions[index].buffered.pop_front() {
                self.functions[index].selected += 1;
                self.next_turn = index + 1;
                return Some((index, call));
            }
        }
        None
    }

    /// Returns whether a selected call has a free slot.
    pub(in crate::jetstream) fn has_slot(&self, index: usize, concurrency: usize) -> bool {
        self.free_slots(index, concurrency, 1) == 1
    }

    /// Gives a slot to a selected call.
    pub(in crate::jetstream) fn occupy_slot(&mut self, index: usize) {
        self.deselect(index);
        self.executing += 1;
        self.functions[index].executing += 1;
    }

    /// Drops a selected call without execution.
    pub(in crate::jetstream) fn deselect(&mut self, index: usize) {
        self.functions[index].selected -= 1;
    }

    /// Releases the slot of a call.
    pub(in crate::jetstream) fn release_slot(&mut self, index: usize) {
        self.executing -= 1;
        self.functions[index].executing -= 1;
    }

    /// Returns the number of selected calls that have a free slot.
    pub(in crate::jetstream) fn runnable(&self, concurrency: usize) -> usize {
        let selected =
            self.functions.iter().enumerate().filter(|(_, function)| function.selected > 0);
        selected
            .map(|(index, function)| self.free_slots(index, concurrency, function.selected))
            .sum()
    }

    /// Returns whether this number of outcomes that wait for others should be written now: no call is executing that
    /// could end soon, or they hold up at least half of a small concurrency.
    pub(in crate::jetstream) fn should_write_outcomes(&self, outcomes: usize) -> bool {
        self.concurrency < MAX_CALLS_PER_BATCH && outcomes * 2 >= self.concurrency
            || self.executing == 0 && self.functions.iter().all(|function| function.selected == 0)
    }

    pub(in crate::jetstream) fn is_empty(&self) -> bool {
        self.functions.iter().all(|function| function.buffered.is_empty())
    }

    /// Removes and returns the calls that arrived before `time`.
    pub(in crate::jetstream) fn remove_older(&mut self, time: Instant) -> Vec<A> {
        let mut old = Vec::new();
        for function in &mut self.functions {
            while function.buffered.front().is_some_and(|(arrived_at, _)| *arrived_at < time) {
                old.extend(function.buffered.pop_front().map(|(_, call)| call));
            }
        }
        old
    }

    /// Removes and returns all buffered calls.
    pub(in crate::jetstream) fn drain(&mut self) -> Vec<A> {
        let arrived = self.functions.iter_mut().flat_map(|function| function.buffered.drain(..));
        arrived.map(|(_, call)| call).collect()
    }

    /// Returns the number of free slots of a function, at most `max`.
    fn free_slots(&self, index: usize, concurrency: usize, max: usize) -> usize {
        let executing = self.functions[index].executing;
        (0..max)
            .take_while(|more| may_start(executing + more, self.executing + more, concurrency))
            .count()
    }
}

#[cfg(test)]
mod tests;
