//! Decides which consumers to pull from, and which buffered call to execute next. No I/O.
//!
//! Each function has its own consumer on the server, so its calls do not wait behind those of other functions.
//! Concurrency is shared by the rule of all queue backends (`share`).

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use crate::fair_share::may_start;
use crate::jetstream::consume::rate::ArrivalRate;
use crate::jetstream::wire::batch::MAX_CALLS_PER_BATCH;
use gateway_base::function::Function;

/// Maximum number of calls per pull.
const MAX_PULL_CALLS: usize = 64;

/// Number of messages over which the mean batch size is averaged.
const BATCH_SIZE_SMOOTHING: f64 = 8.0;

/// Expiry of a pull on the server. For an active function it is shorter: messages have arrived by then, or were lost.
const PULL_EXPIRY: Duration = Duration::from_secs(5);
const ACTIVE_PULL_EXPIRY: Duration = Duration::from_secs(1);
/// Time after the expiry within which the end of the pull must arrive.
const RESPONSE_GRACE: Duration = Duration::from_millis(500);

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

/// A pull that has not ended.
struct PullRequest {
    number: u64,
    /// Number of messages that are still expected.
    remaining: usize,
    /// Time by which the pull has ended, or its end was lost.
    expires_at: Instant,
}

/// A pull to send.
pub(in crate::jetstream) struct WantedPull {
    pub(in crate::jetstream) function_index: usize,
    pub(in crate::jetstream) function: Function,
    /// Maximum number of messages.
    pub(in crate::jetstream) max_messages: usize,
    /// Number of the pull.
    pub(in crate::jetstream) number: u64,
    /// The function has had calls recently.
    pub(in crate::jetstream) active: bool,
}

impl WantedPull {
    /// Expiry of the pull on the server.
    pub(in crate::jetstream) fn expiry(&self) -> Duration {
        pull_expiry(self.active)
    }
}

fn pull_expiry(active: bool) -> Duration {
    if active { ACTIVE_PULL_EXPIRY } else { PULL_EXPIRY }
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

    /// Returns the pulls to send. An inactive function is asked for one message, an active one for its free slots and
    /// its prefetch.
    pub(in crate::jetstream) fn plan_pulls(
        &mut self,
        concurrency: usize,
        now: Instant,
    ) -> Vec<WantedPull> {
        let mut wanted = Vec::new();
        for index in 0..self.functions.len() {
            let function = &self.functions[index];
            let pending = function
                .pull
                .as_ref()
                .is_some_and(|pull| pull.remaining > 0 && pull.expires_at > now);
            if pending || function.retired {
                continue;
            }
            let (active, prefetch) = (function.rate.is_active(now), function.rate.prefetch(now));
            let slots =
                self.free_slots(index, concurrency, if active { MAX_PULL_CALLS } else { 1 });
            let target = (slots + prefetch).min(MAX_PULL_CALLS);
            let buffered = self.functions[index].buffered.len() + self.functions[index].selected;
            if buffered * 2 > target || target == 0 {
                continue;
            }
            self.pull_count += 1;
            let function = &mut self.functions[index];
            // Rounded down, since surplus calls of a batch must be returned one by one.
            let max = (((target - buffered) as f64 / function.mean_batch_size.unwrap_or(1.0))
                as usize)
                .max(1);
            let number = self.pull_count;
            function.pull = Some(PullRequest {
                number,
                remaining: max,
                expires_at: now + pull_expiry(active) + RESPONSE_GRACE,
            });
            wanted.push(WantedPull {
                function_index: index,
                function: function.function.clone(),
                max_messages: max,
                number,
                active,
            });
        }
        wanted
    }

    /// Removes the pull `number`: it has ended.
    pub(in crate::jetstream) fn pull_completed(&mut self, index: usize, number: u64) {
        if let Some(function) = self.functions.get_mut(index)
            && function.pull.as_ref().is_some_and(|pull| pull.number == number)
        {
            function.pull = None;
        }
    }

    /// Removes all pulls.
    pub(in crate::jetstream) fn reset_pulls(&mut self) {
        self.functions.iter_mut().for_each(|function| function.pull = None);
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
mod tests {
    use super::*;

    const TIME: Duration = Duration::from_secs(6);

    fn function(name: &str) -> Function {
        Function { name: name.to_owned(), namespace: "fn".to_owned() }
    }

    fn scheduler() -> PullScheduler<u32> {
        let mut scheduler = PullScheduler::new();
        assert!(scheduler.add(&function("a")) && scheduler.add(&function("b")));
        assert!(!scheduler.add(&function("a")));
        scheduler
    }

    fn select_all(
        scheduler: &mut PullScheduler<u32>,
        concurrency: usize,
        now: Instant,
    ) -> Vec<u32> {
        std::iter::from_fn(|| scheduler.select(concurrency, now)).map(|(_, call)| call).collect()
    }

    fn start_one(scheduler: &mut PullScheduler<u32>, index: usize, concurrency: usize) -> bool {
        let may = scheduler.has_slot(index, concurrency);
        if may {
            scheduler.occupy_slot(index);
        }
        may
    }

    /// Executes all calls of the first function that have a slot; returns their number.
    fn start_all(scheduler: &mut PullScheduler<u32>, concurrency: usize, now: Instant) -> usize {
        let selected = select_all(scheduler, concurrency, now).len();
        assert!((0..selected).all(|_| start_one(scheduler, 0, concurrency)));
        selected
    }

    fn planned(
        scheduler: &mut PullScheduler<u32>,
        concurrency: usize,
        now: Instant,
    ) -> Vec<(usize, usize)> {
        scheduler
            .plan_pulls(concurrency, now)
            .into_iter()
            .map(|wanted| (wanted.function_index, wanted.max_messages))
            .collect()
    }

    #[test]
    fn functions_take_turns() {
        let (mut scheduler, now) = (scheduler(), Instant::now());
        for call in 1..=3 {
            scheduler.push(0, call, now);
        }
        scheduler.push(1, 4, now);
        assert_eq!(select_all(&mut scheduler, 8, now), [1, 4, 2, 3]);
    }

    #[test]
    fn one_function_never_occupies_all_slots() {
        let (mut scheduler, now) = (scheduler(), Instant::now());
        for call in 0..100 {
            scheduler.push(0, call, now);
        }
        let started = start_all(&mut scheduler, 8, now);
        assert!((4..8).contains(&started), "{started}");
        // Only the other function is pulled.
        assert_eq!(planned(&mut scheduler, 8, now), [(1, 1)]);
        scheduler.push(1, 100, now);
        assert_eq!(scheduler.select(8, now), Some((1, 100)));
        assert!(start_one(&mut scheduler, 1, 8));
        scheduler.release_slot(0);
        assert_eq!(scheduler.select(8, now), None);
    }

    #[test]
    fn prefetched_calls_occupy_no_slot() {
        let (mut scheduler, start) = (scheduler(), Instant::now());
        let ms = Duration::from_millis;
        // Ten calls arrive every 10 ms.
        for step in 0..30 {
            scheduler.on_message(0, 10, start + ms(step * 10));
        }
        let now = start + ms(300);
        for call in 0..100 {
            scheduler.push(0, call, now);
        }
        let share = (0..).take_while(|running| may_start(*running, *running, 8)).count();
        assert_eq!(scheduler.runnable(8), 0);
        let selected = select_all(&mut scheduler, 8, now).len();
        assert!((20..64).contains(&(selected - share)), "{selected}");
        assert_eq!(scheduler.runnable(8), share);
        assert_eq!((0..selected).filter(|_| start_one(&mut scheduler, 0, 8)).count(), share);
        assert_eq!(scheduler.runnable(8), 0);
        // A slot is free for another function, and its call is selected.
        scheduler.push(1, 100, now);
        assert_eq!(scheduler.select(8, now), Some((1, 100)));
        assert_eq!(scheduler.runnable(8), 1);
        assert!(start_one(&mut scheduler, 1, 8));
        // A finished call frees a slot; a deselected call never had one.
        scheduler.release_slot(0);
        scheduler.release_slot(1);
        scheduler.deselect(0);
        assert!(start_one(&mut scheduler, 0, 8) && !start_one(&mut scheduler, 0, 8));
        assert!(!scheduler.should_write_outcomes(3) && scheduler.should_write_outcomes(4));
    }

    #[test]
    fn one_of_few_slots_stays_free() {
        for concurrency in 2..6 {
            let (mut scheduler, now) = (scheduler(), Instant::now());
            (0..10).for_each(|call| scheduler.push(0, call, now));
            let started = start_all(&mut scheduler, concurrency, now);
            assert!(
                (concurrency / 2..concurrency).contains(&started),
                "{started} of {concurrency}"
            );
        }
    }

    #[test]
    fn a_single_slot_is_used() {
        let (mut scheduler, now) = (scheduler(), Instant::now());
        assert_eq!(planned(&mut scheduler, 1, now), [(0, 1), (1, 1)]);
        assert_eq!(planned(&mut scheduler, 1, now), []);
        scheduler.push(0, 1, now);
        assert_eq!(scheduler.select(1, now), Some((0, 1)));
        assert!(
            start_one(&mut scheduler, 0, 1)
                && scheduler.should_write_outcomes(1)
                && !scheduler.should_write_outcomes(0)
        );
        scheduler.release_slot(0);
        assert!(scheduler.should_write_outcomes(0));
    }

    #[test]
    fn one_call_is_pulled_until_calls_arrive_and_then_as_many_as_can_run() {
        let (mut scheduler, now) = (scheduler(), Instant::now());
        assert_eq!(planned(&mut scheduler, 40, now), [(0, 1), (1, 1)]);
        scheduler.on_message(0, 1, now);
        let more = planned(&mut scheduler, 40, now);
        assert!(matches!(more[..], [(0, 20..=39)]), "{more:?}");
        // The pull is pending until all messages have arrived, it has ended, or it has expired.
        let max = more[0].1;
        (1..max).for_each(|_| scheduler.on_message(0, 1, now));
        assert_eq!(planned(&mut scheduler, 40, now), []);
        scheduler.on_message(0, 1, now);
        assert_eq!(planned(&mut scheduler, 40, now).len(), 1);
        let number = scheduler.functions[0].pull.as_ref().unwrap().number;
        scheduler.pull_completed(0, number - 1);
        assert_eq!(planned(&mut scheduler, 40, now), []);
        scheduler.pull_completed(0, number);
        assert_eq!(planned(&mut scheduler, 40, now).len(), 1);
        assert_eq!(planned(&mut scheduler, 40, now + TIME).len(), 2);
        scheduler.reset_pulls();
        assert_eq!(planned(&mut scheduler, 40, now + TIME).len(), 2);
        scheduler.on_consumer_created(&function("b"));
        assert_eq!(planned(&mut scheduler, 40, now + TIME), [(1, 1)]);
        scheduler.retire(0);
        assert_eq!(planned(&mut scheduler, 40, now + TIME * 2), [(1, 1)]);
        assert!(scheduler.add(&function("a")) && !scheduler.add(&function("a")));
        assert_eq!(planned(&mut scheduler, 40, now + TIME * 2), [(0, 1)]);
    }

    #[test]
    fn buffered_calls_can_be_removed() {
        let (mut scheduler, now) = (scheduler(), Instant::now());
        scheduler.push(0, 1, now);
        scheduler.push(0, 2, now + TIME);
        assert_eq!(scheduler.remove_older(now + TIME), [1]);
        assert!(!scheduler.is_empty());
        assert_eq!(scheduler.drain(), [2]);
        assert!(scheduler.is_empty());
    }
}
