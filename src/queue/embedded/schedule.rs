//! Which call is next: fair between functions, and no sooner than its time. No I/O.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use crate::queue::call::UnixMillis;
use crate::queue::fair_share::may_start;

/// A call's number: calls are numbered as they are taken in.
pub(super) type Number = u64;

/// The numbers of all calls that wait, in memory: 8 to 16 bytes each.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    functions: Vec<Line>,
    /// Places in `functions` that no function has.
    free: Vec<usize>,
    by_label: HashMap<Arc<str>, usize>,
    /// Functions with calls that can be made now, each once, in turn.
    turn: VecDeque<usize>,
    /// Calls whose time has not come.
    delayed: BinaryHeap<Reverse<(UnixMillis, Number, u32)>>,
    /// Waiting calls that were taken back. They are skipped when their turn comes.
    dropped: HashSet<Number>,
    /// What is due by now is in its line, what is due later is delayed.
    clock: UnixMillis,
    /// Calls that have a place.
    placed: usize,
    waiting: usize,
    /// How many functions had calls when that was last looked at.
    kept: usize,
}

/// So many functions are kept though they may have no calls.
const MANY: usize = 1024;

/// The calls of one function.
#[derive(Debug, Default)]
struct Line {
    label: Arc<str>,
    ready: VecDeque<Number>,
    /// So many of `ready` were taken back.
    dropped: usize,
    /// Calls whose time has not come, without those that were taken back.
    delayed: usize,
    running: usize,
    /// So many of those that run have a place; the others have been made, and that is being noted.
    placed: usize,
    in_turn: bool,
}

impl Line {
    fn is_empty(&self) -> bool {
        self.ready.is_empty() && self.delayed == 0 && self.running == 0 && !self.in_turn
    }
}

/// A call that was picked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Picked {
    pub(super) number: Number,
    pub(super) line: usize,
}

impl Schedule {
    /// The line of the function called `label`.
    pub(super) fn line(&mut self, label: &str) -> usize {
        if let Some(line) = self.by_label.get(label) {
            return *line;
        }
        // Names are not checked while the provider is away: they must not add up for ever.
        if self.by_label.len() >= MANY.max(2 * self.kept) {
            self.forget_empty();
        }
        let label: Arc<str> = label.into();
        let line = Line { label: Arc::clone(&label), ..Line::default() };
        let place = match self.free.pop() {
            Some(place) => {
                self.functions[place] = line;
                place
            }
            None => {
                self.functions.push(line);
                self.functions.len() - 1
            }
        };
        self.by_label.insert(label, place);
        place
    }

    /// Lets go of functions without calls.
    fn forget_empty(&mut self) {
        let (functions, free) = (&self.functions, &mut self.free);
        self.by_label.retain(|_, place| {
            let keep = !functions[*place].is_empty();
            if !keep {
                free.push(*place);
            }
            keep
        });
        self.kept = self.by_label.len();
    }

    /// Adds a call that can be made from `due` on.
    pub(super) fn add(&mut self, line: usize, number: Number, due: UnixMillis, now: UnixMillis) {
        self.ripen(now);
        self.waiting += 1;
        if due > self.clock {
            self.functions[line].delayed += 1;
            self.delayed.push(Reverse((due, number, u32::try_from(line).unwrap_or(u32::MAX))));
        } else {
            self.functions[line].ready.push_back(number);
            self.queue_up(line);
        }
    }

    /// Has the calls of each function be made in the order in which they were numbered.
    pub(super) fn put_in_order(&mut self) {
        for line in &mut self.functions {
            line.ready.make_contiguous().sort_unstable();
        }
    }

    /// A call that does not run any more comes back, since it was not made: it is first in its line.
    pub(super) fn give_back(&mut self, picked: Picked) {
        self.waiting += 1;
        self.functions[picked.line].ready.push_front(picked.number);
        self.queue_up(picked.line);
    }

    /// A call that was picked leaves its place to another.
    pub(super) fn leaves(&mut self, line: usize) {
        self.placed -= 1;
        self.functions[line].placed -= 1;
    }

    /// A call that was picked, and has left its place, does not run any more.
    pub(super) fn ended(&mut self, line: usize) {
        self.functions[line].running -= 1;
    }

    /// Forgets all calls that wait; those that run go on.
    pub(super) fn clear(&mut self) {
        for line in &mut self.functions {
            line.ready.clear();
            (line.dropped, line.delayed, line.in_turn) = (0, 0, false);
        }
        self.turn.clear();
        self.delayed.clear();
        self.dropped.clear();
        self.waiting = 0;
    }

    /// A call that waits, and was to be made from `due` on, is not to be made.
    pub(super) fn drop_waiting(&mut self, line: usize, number: Number, due: UnixMillis) {
        self.waiting = self.waiting.saturating_sub(1);
        self.dropped.insert(number);
        let line = &mut self.functions[line];
        if due > self.clock {
            line.delayed = line.delayed.saturating_sub(1);
        } else {
            line.dropped += 1;
        }
    }

    /// A call that was dropped is to be made after all.
    pub(super) fn restore(&mut self, line: usize, number: Number, due: UnixMillis) {
        if !self.dropped.remove(&number) {
            // Its turn has come meanwhile, and it was skipped.
            return self.add(line, number, due, self.clock);
        }
        self.waiting += 1;
        let line = &mut self.functions[line];
        if due > self.clock {
            line.delayed += 1;
        } else {
            line.dropped = line.dropped.saturating_sub(1);
        }
    }

    /// The next call to make, if any can be made at `now` by one who makes at most `places` at a time.
    ///
    /// The functions take turns, and each has its share of the places.
    pub(super) fn pick(&mut self, now: UnixMillis, places: usize) -> Option<Picked> {
        self.ripen(now);
        for _ in 0..self.turn.len() {
            let line = self.turn.pop_front()?;
            if !may_start(self.functions[line].placed, self.placed, places) {
                self.turn.push_back(line);
                continue;
            }
            let function = &mut self.functions[line];
            function.in_turn = false;
            let next = loop {
                match function.ready.pop_front() {
                    Some(number) if self.dropped.remove(&number) => {
                        function.dropped = function.dropped.saturating_sub(1);
                    }
                    next => break next,
                }
            };
            let more = !function.ready.is_empty();
            if more {
                self.queue_up(line);
            } else {
                self.functions[line].ready.shrink_to(64);
            }
            if let Some(number) = next {
                let function = &mut self.functions[line];
                function.running += 1;
                function.placed += 1;
                self.placed += 1;
                self.waiting = self.waiting.saturating_sub(1);
                return Some(Picked { number, line });
            }
        }
        None
    }

    /// When the next delayed call can be made.
    pub(super) fn next_due(&self) -> Option<UnixMillis> {
        self.delayed.peek().map(|Reverse((due, ..))| *due)
    }

    /// How many calls wait, delayed ones among them.
    pub(super) fn waiting(&self) -> usize {
        self.waiting
    }

    /// For each function: its label, calls that could be made, calls that are delayed, calls that run, and the oldest
    /// of the first.
    pub(super) fn counts(
        &self,
    ) -> impl Iterator<Item = (&str, usize, usize, usize, Option<Number>)> {
        self.by_label.values().map(|place| {
            let line = &self.functions[*place];
            let oldest = line.ready.iter().find(|number| !self.dropped.contains(number)).copied();
            let ready = line.ready.len().saturating_sub(line.dropped);
            (&*line.label, ready, line.delayed, line.running, oldest)
        })
    }

    fn ripen(&mut self, now: UnixMillis) {
        // The clock of the system may be set back; what has ripened stays so.
        self.clock = self.clock.max(now);
        while let Some(Reverse((due, number, line))) = self.delayed.peek().copied()
            && due <= self.clock
        {
            self.delayed.pop();
            let line = line as usize;
            if !self.dropped.remove(&number) {
                let delayed = &mut self.functions[line].delayed;
                *delayed = delayed.saturating_sub(1);
                self.functions[line].ready.push_back(number);
                self.queue_up(line);
            }
        }
    }

    fn queue_up(&mut self, line: usize) {
        if !self.functions[line].in_turn {
            self.functions[line].in_turn = true;
            self.turn.push_back(line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACES: usize = 8;

    fn picks(schedule: &mut Schedule, now: UnixMillis) -> Vec<Number> {
        std::iter::from_fn(|| schedule.pick(now, PLACES)).map(|picked| picked.number).collect()
    }

    #[test]
    fn functions_take_turns() {
        let mut schedule = Schedule::default();
        let (a, b) = (schedule.line("a"), schedule.line("b"));
        for number in [1, 2, 3] {
            schedule.add(a, number, 0, 0);
        }
        schedule.add(b, 4, 0, 0);
        assert_eq!(schedule.waiting(), 4);
        assert_eq!(picks(&mut schedule, 0), [1, 4, 2, 3]);
        assert_eq!(schedule.waiting(), 0);
    }

    #[test]
    fn names_without_calls_do_not_add_up() {
        let mut schedule = Schedule::default();
        let kept = schedule.line("kept");
        schedule.add(kept, 0, 1_000_000, 0);
        for number in 1..100_000 {
            let line = schedule.line(&number.to_string());
            schedule.add(line, number, 0, 0);
            assert_eq!(picks(&mut schedule, 0), [number]);
            schedule.leaves(line);
            schedule.ended(line);
        }
        assert!(schedule.functions.len() <= MANY + 1);
        let (label, .., delayed, _, _) = schedule.counts().find(|line| line.2 > 0).unwrap();
        assert_eq!((label, delayed), ("kept", 1));
        assert_eq!(picks(&mut schedule, 1_000_000), [0]);
    }

    #[test]
    fn one_function_never_takes_all_places() {
        let mut schedule = Schedule::default();
        let (slow, quick) = (schedule.line("slow"), schedule.line("quick"));
        for number in 0..100 {
            schedule.add(slow, number, 0, 0);
        }
        let taken = picks(&mut schedule, 0).len();
        assert!((PLACES / 2..PLACES).contains(&taken), "{taken}");
        schedule.add(quick, 100, 0, 0);
        assert_eq!(picks(&mut schedule, 0), [100]);
        // A place that is free again is kept for others, not for the one that has most.
        schedule.leaves(slow);
        assert_eq!(picks(&mut schedule, 0), [] as [Number; 0]);
        schedule.add(quick, 101, 0, 0);
        assert_eq!(picks(&mut schedule, 0), [101]);
        // Those that have left their places run until that is noted.
        let running = |schedule: &Schedule| schedule.counts().map(|line| line.3).sum::<usize>();
        assert_eq!(running(&schedule), taken + 2);
        schedule.ended(slow);
        assert_eq!(running(&schedule), taken + 1);
    }

    #[test]
    fn of_few_places_one_stays_free() {
        for places in 2..6 {
            let mut schedule = Schedule::default();
            let line = schedule.line("slow");
            for number in 0..10 {
                schedule.add(line, number, 0, 0);
            }
            let taken = std::iter::from_fn(|| schedule.pick(0, places)).count();
            assert!((places / 2..places).contains(&taken), "{taken} of {places}");
        }
    }

    #[test]
    fn a_call_that_is_taken_back_but_never_waited_upsets_no_count() {
        let mut schedule = Schedule::default();
        let line = schedule.line("a");
        schedule.drop_waiting(line, 1, 0);
        schedule.drop_waiting(line, 2, 50);
        assert_eq!(schedule.waiting(), 0);
        assert_eq!(schedule.counts().next().unwrap(), ("a", 0, 0, 0, None));
        schedule.add(line, 3, 0, 0);
        assert_eq!((schedule.waiting(), picks(&mut schedule, 0)), (1, vec![3]));
    }

    #[test]
    fn a_lone_place_is_used() {
        let mut schedule = Schedule::default();
        let line = schedule.line("a");
        schedule.add(line, 1, 0, 0);
        assert!(schedule.pick(0, 1).is_some());
    }

    #[test]
    fn a_delayed_call_waits_for_its_time() {
        let mut schedule = Schedule::default();
        let line = schedule.line("a");
        schedule.add(line, 1, 20, 10);
        schedule.add(line, 2, 15, 10);
        assert_eq!((picks(&mut schedule, 10), schedule.next_due()), (vec![], Some(15)));
        assert_eq!(picks(&mut schedule, 20), [2, 1]);
        assert_eq!(schedule.next_due(), None);
    }

    #[test]
    fn what_comes_back_is_first_and_what_was_dropped_is_skipped() {
        let mut schedule = Schedule::default();
        let line = schedule.line("a");
        for number in [1, 2, 3] {
            schedule.add(line, number, 0, 0);
        }
        schedule.add(line, 4, 50, 0);
        let first = schedule.pick(0, PLACES).unwrap();
        schedule.drop_waiting(line, 2, 0);
        schedule.drop_waiting(line, 4, 50);
        let (_, ready, delayed, running, oldest) = schedule.counts().next().unwrap();
        assert_eq!((ready, delayed, running, oldest), (1, 0, 1, Some(3)));
        schedule.leaves(line);
        schedule.ended(line);
        schedule.give_back(first);
        schedule.restore(line, 2, 0);
        schedule.drop_waiting(line, 2, 0);
        assert_eq!(picks(&mut schedule, 0), [1, 3]);
        schedule.restore(line, 2, 0);
        assert_eq!((schedule.waiting(), picks(&mut schedule, 0)), (1, vec![2]));
        assert_eq!(picks(&mut schedule, 60), [] as [Number; 0]);
        assert_eq!(schedule.waiting(), 0);
    }
}
