//! Selects the next call to execute: fair between functions, and not before the call is due. No I/O.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use crate::call::UnixMillis;
use crate::fair_share::may_start;

/// Sequence number of a call, in the order of enqueueing.
pub(super) type CallSeq = u64;

/// The numbers of all pending calls, in memory: 8 to 16 bytes each.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    functions: Vec<FunctionQueue>,
    /// Unused indexes of `functions`.
    free_indexes: Vec<usize>,
    by_label: HashMap<Arc<str>, usize>,
    /// Indexes of functions with runnable calls, each at most once, in round-robin order.
    round_robin: VecDeque<usize>,
    /// Calls that are not due yet.
    delayed: BinaryHeap<Reverse<(UnixMillis, CallSeq, u32)>>,
    /// Cancelled calls. They are skipped when they are selected.
    tombstones: HashSet<CallSeq>,
    /// The latest time seen. Calls due by then are in the queue of their function, others are delayed.
    clock: UnixMillis,
    /// Execution slots in use.
    used_slots: usize,
    pending: usize,
    /// Number of functions with calls at the last garbage collection.
    busy_functions: usize,
}

/// Number of functions below which none are removed, even without calls.
const MIN_FUNCTIONS_BEFORE_GC: usize = 1024;

/// The calls of one function.
#[derive(Debug, Default)]
struct FunctionQueue {
    label: Arc<str>,
    ready: VecDeque<CallSeq>,
    /// Number of cancelled calls in `ready`.
    tombstoned: usize,
    /// Calls that are not due yet, without cancelled ones.
    delayed: usize,
    running: usize,
    /// Execution slots in use. Running calls without a slot have been executed and are being settled.
    used_slots: usize,
    in_round_robin: bool,
}

impl FunctionQueue {
    fn is_empty(&self) -> bool {
        self.ready.is_empty() && self.delayed == 0 && self.running == 0 && !self.in_round_robin
    }
}

/// A call selected for execution.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Selected {
    pub(super) number: CallSeq,
    pub(super) queue: usize,
}

impl Schedule {
    /// Returns the index of the queue of the function `label`, which is created if necessary.
    pub(super) fn queue_index(&mut self, label: &str) -> usize {
        if let Some(index) = self.by_label.get(label) {
            return *index;
        }
        // Function names are not validated while the provider is unavailable, so unused ones must be removed.
        if self.by_label.len() >= MIN_FUNCTIONS_BEFORE_GC.max(2 * self.busy_functions) {
            self.remove_idle_functions();
        }
        let label: Arc<str> = label.into();
        let queue = FunctionQueue { label: Arc::clone(&label), ..FunctionQueue::default() };
        let index = match self.free_indexes.pop() {
            Some(index) => {
                self.functions[index] = queue;
                index
            }
            None => {
                self.functions.push(queue);
                self.functions.len() - 1
            }
        };
        self.by_label.insert(label, index);
        index
    }

    /// Removes functions without calls.
    fn remove_idle_functions(&mut self) {
        let (functions, free) = (&self.functions, &mut self.free_indexes);
        self.by_label.retain(|_, index| {
            let keep = !functions[*index].is_empty();
            if !keep {
                free.push(*index);
            }
            keep
        });
        self.busy_functions = self.by_label.len();
    }

    /// Adds a call that is due at `due`.
    pub(super) fn add(&mut self, index: usize, number: CallSeq, due: UnixMillis, now: UnixMillis) {
        self.promote_due(now);
        self.pending += 1;
        if due > self.clock {
            self.functions[index].delayed += 1;
            self.delayed.push(Reverse((due, number, u32::try_from(index).unwrap_or(u32::MAX))));
        } else {
            self.functions[index].ready.push_back(number);
            self.mark_runnable(index);
        }
    }

    /// Sorts the runnable calls of each function by number.
    pub(super) fn sort_by_number(&mut self) {
        for queue in &mut self.functions {
            queue.ready.make_contiguous().sort_unstable();
        }
    }

    /// Requeues a call that was selected but not executed, as the first of its function.
    pub(super) fn requeue_first(&mut self, selected: Selected) {
        self.pending += 1;
        self.functions[selected.queue].ready.push_front(selected.number);
        self.mark_runnable(selected.queue);
    }

    /// Releases the slot of a running call.
    pub(super) fn release_slot(&mut self, index: usize) {
        self.used_slots -= 1;
        self.functions[index].used_slots -= 1;
    }

    /// Ends a running call whose slot has been released.
    pub(super) fn finish_execution(&mut self, index: usize) {
        self.functions[index].running -= 1;
    }

    /// Removes all pending calls. Running ones are not affected.
    pub(super) fn clear(&mut self) {
        for queue in &mut self.functions {
            queue.ready.clear();
            (queue.tombstoned, queue.delayed, queue.in_round_robin) = (0, 0, false);
        }
        self.round_robin.clear();
        self.delayed.clear();
        self.tombstones.clear();
        self.pending = 0;
    }

    /// Removes a pending call that was due at `due`.
    pub(super) fn tombstone(&mut self, index: usize, number: CallSeq, due: UnixMillis) {
        self.pending = self.pending.saturating_sub(1);
        self.tombstones.insert(number);
        let queue = &mut self.functions[index];
        if due > self.clock {
            queue.delayed = queue.delayed.saturating_sub(1);
        } else {
            queue.tombstoned += 1;
        }
    }

    /// Restores a call that was removed by [`Self::tombstone`].
    pub(super) fn restore(&mut self, index: usize, number: CallSeq, due: UnixMillis) {
        if !self.tombstones.remove(&number) {
            // The call was skipped and its tombstone removed meanwhile.
            return self.add(index, number, due, self.clock);
        }
        self.pending += 1;
        let queue = &mut self.functions[index];
        if due > self.clock {
            queue.delayed += 1;
        } else {
            queue.tombstoned = queue.tombstoned.saturating_sub(1);
        }
    }

    /// Selects the next call that is runnable at `now`, for a receiver with `concurrency` slots.
    ///
    /// Functions take turns, and each has its fair share of the slots.
    pub(super) fn select(&mut self, now: UnixMillis, concurrency: usize) -> Option<Selected> {
        self.promote_due(now);
        for _ in 0..self.round_robin.len() {
            let index = self.round_robin.pop_front()?;
            if !may_start(self.functions[index].used_slots, self.used_slots, concurrency) {
                self.round_robin.push_back(index);
                continue;
            }
            let queue = &mut self.functions[index];
            queue.in_round_robin = false;
            let next = loop {
                match queue.ready.pop_front() {
                    Some(number) if self.tombstones.remove(&number) => {
                        queue.tombstoned = queue.tombstoned.saturating_sub(1);
                    }
                    next => break next,
                }
            };
            let more = !queue.ready.is_empty();
            if more {
                self.mark_runnable(index);
            } else {
                self.functions[index].ready.shrink_to(64);
            }
            if let Some(number) = next {
                let queue = &mut self.functions[index];
                queue.running += 1;
                queue.used_slots += 1;
                self.used_slots += 1;
                self.pending = self.pending.saturating_sub(1);
                return Some(Selected { number, queue: index });
            }
        }
        None
    }

    /// Due time of the next delayed call.
    pub(super) fn next_due(&self) -> Option<UnixMillis> {
        self.delayed.peek().map(|Reverse((due, ..))| *due)
    }

    /// Number of pending calls, including delayed ones.
    pub(super) fn pending(&self) -> usize {
        self.pending
    }

    /// For each function: its label, the numbers of runnable, delayed and running calls, and the oldest runnable call.
    pub(super) fn function_counts(
        &self,
    ) -> impl Iterator<Item = (&str, usize, usize, usize, Option<CallSeq>)> {
        self.by_label.values().map(|index| {
            let queue = &self.functions[*index];
            let oldest =
                queue.ready.iter().find(|number| !self.tombstones.contains(number)).copied();
            let ready = queue.ready.len().saturating_sub(queue.tombstoned);
            (&*queue.label, ready, queue.delayed, queue.running, oldest)
        })
    }

    fn promote_due(&mut self, now: UnixMillis) {
        // The system clock may be set back. Calls that were due stay due.
        self.clock = self.clock.max(now);
        while let Some(Reverse((due, number, index))) = self.delayed.peek().copied()
            && due <= self.clock
        {
            self.delayed.pop();
            let index = index as usize;
            if !self.tombstones.remove(&number) {
                let delayed = &mut self.functions[index].delayed;
                *delayed = delayed.saturating_sub(1);
                self.functions[index].ready.push_back(number);
                self.mark_runnable(index);
            }
        }
    }

    fn mark_runnable(&mut self, index: usize) {
        if !self.functions[index].in_round_robin {
            self.functions[index].in_round_robin = true;
            self.round_robin.push_back(index);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONCURRENCY: usize = 8;

    fn select_all(schedule: &mut Schedule, now: UnixMillis) -> Vec<CallSeq> {
        std::iter::from_fn(|| schedule.select(now, CONCURRENCY))
            .map(|selected| selected.number)
            .collect()
    }

    #[test]
    fn functions_take_turns() {
        let mut schedule = Schedule::default();
        let (a, b) = (schedule.queue_index("a"), schedule.queue_index("b"));
        for number in [1, 2, 3] {
            schedule.add(a, number, 0, 0);
        }
        schedule.add(b, 4, 0, 0);
        assert_eq!(schedule.pending(), 4);
        assert_eq!(select_all(&mut schedule, 0), [1, 4, 2, 3]);
        assert_eq!(schedule.pending(), 0);
    }

    #[test]
    fn functions_without_calls_are_removed() {
        let mut schedule = Schedule::default();
        let kept = schedule.queue_index("kept");
        schedule.add(kept, 0, 1_000_000, 0);
        for number in 1..100_000 {
            let index = schedule.queue_index(&number.to_string());
            schedule.add(index, number, 0, 0);
            assert_eq!(select_all(&mut schedule, 0), [number]);
            schedule.release_slot(index);
            schedule.finish_execution(index);
        }
        assert!(schedule.functions.len() <= MIN_FUNCTIONS_BEFORE_GC + 1);
        let (label, .., delayed, _, _) =
            schedule.function_counts().find(|counts| counts.2 > 0).unwrap();
        assert_eq!((label, delayed), ("kept", 1));
        assert_eq!(select_all(&mut schedule, 1_000_000), [0]);
    }

    #[test]
    fn one_function_never_uses_all_slots() {
        let mut schedule = Schedule::default();
        let (slow, quick) = (schedule.queue_index("slow"), schedule.queue_index("quick"));
        for number in 0..100 {
            schedule.add(slow, number, 0, 0);
        }
        let taken = select_all(&mut schedule, 0).len();
        assert!((CONCURRENCY / 2..CONCURRENCY).contains(&taken), "{taken}");
        schedule.add(quick, 100, 0, 0);
        assert_eq!(select_all(&mut schedule, 0), [100]);
        // A free slot is kept for other functions, not given to the one that uses most.
        schedule.release_slot(slow);
        assert_eq!(select_all(&mut schedule, 0), [] as [CallSeq; 0]);
        schedule.add(quick, 101, 0, 0);
        assert_eq!(select_all(&mut schedule, 0), [101]);
        // Calls whose slot was released count as running until they are settled.
        let running =
            |schedule: &Schedule| schedule.function_counts().map(|counts| counts.3).sum::<usize>();
        assert_eq!(running(&schedule), taken + 2);
        schedule.finish_execution(slow);
        assert_eq!(running(&schedule), taken + 1);
    }

    #[test]
    fn one_of_few_slots_stays_free() {
        for concurrency in 2..6 {
            let mut schedule = Schedule::default();
            let index = schedule.queue_index("slow");
            for number in 0..10 {
                schedule.add(index, number, 0, 0);
            }
            let taken = std::iter::from_fn(|| schedule.select(0, concurrency)).count();
            assert!((concurrency / 2..concurrency).contains(&taken), "{taken} of {concurrency}");
        }
    }

    #[test]
    fn a_tombstone_for_an_unknown_call_leaves_counts_intact() {
        let mut schedule = Schedule::default();
        let index = schedule.queue_index("a");
        schedule.tombstone(index, 1, 0);
        schedule.tombstone(index, 2, 50);
        assert_eq!(schedule.pending(), 0);
        assert_eq!(schedule.function_counts().next().unwrap(), ("a", 0, 0, 0, None));
        schedule.add(index, 3, 0, 0);
        assert_eq!((schedule.pending(), select_all(&mut schedule, 0)), (1, vec![3]));
    }

    #[test]
    fn a_single_slot_is_used() {
        let mut schedule = Schedule::default();
        let index = schedule.queue_index("a");
        schedule.add(index, 1, 0, 0);
        assert!(schedule.select(0, 1).is_some());
    }

    #[test]
    fn a_delayed_call_waits_until_it_is_due() {
        let mut schedule = Schedule::default();
        let index = schedule.queue_index("a");
        schedule.add(index, 1, 20, 10);
        schedule.add(index, 2, 15, 10);
        assert_eq!((select_all(&mut schedule, 10), schedule.next_due()), (vec![], Some(15)));
        assert_eq!(select_all(&mut schedule, 20), [2, 1]);
        assert_eq!(schedule.next_due(), None);
    }

    #[test]
    fn requeued_calls_are_first_and_cancelled_ones_are_skipped() {
        let mut schedule = Schedule::default();
        let index = schedule.queue_index("a");
        for number in [1, 2, 3] {
            schedule.add(index, number, 0, 0);
        }
        schedule.add(index, 4, 50, 0);
        let first = schedule.select(0, CONCURRENCY).unwrap();
        schedule.tombstone(index, 2, 0);
        schedule.tombstone(index, 4, 50);
        let (_, ready, delayed, running, oldest) = schedule.function_counts().next().unwrap();
        assert_eq!((ready, delayed, running, oldest), (1, 0, 1, Some(3)));
        schedule.release_slot(index);
        schedule.finish_execution(index);
        schedule.requeue_first(first);
        schedule.restore(index, 2, 0);
        schedule.tombstone(index, 2, 0);
        assert_eq!(select_all(&mut schedule, 0), [1, 3]);
        schedule.restore(index, 2, 0);
        assert_eq!((schedule.pending(), select_all(&mut schedule, 0)), (1, vec![2]));
        assert_eq!(select_all(&mut schedule, 60), [] as [CallSeq; 0]);
        assert_eq!(schedule.pending(), 0);
    }
}
