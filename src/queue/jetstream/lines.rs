//! Which function's calls are asked for, and which call is handed out next. No I/O.
//!
//! Every function has a consumer of its own on the server, so that no call waits behind those of another function.
//! The share of each function is that of the embedded queue.

use std::collections::{HashMap, VecDeque};
use std::time::Instant;

use crate::function::Function;

/// At most so many calls of a function are asked for at once.
const AHEAD: usize = 8;

/// The functions with a consumer, and the calls that have come but were not handed out.
pub(super) struct Lines<A> {
    lines: Vec<Line<A>>,
    by_function: HashMap<Function, usize>,
    /// Whose turn it is.
    turn: usize,
    running: usize,
}

struct Line<A> {
    function: Function,
    /// Calls that have come, and when.
    arrived: VecDeque<(Instant, A)>,
    running: usize,
    asking: bool,
}

/// A function to ask the server for.
pub(super) struct Wanted {
    pub(super) line: usize,
    pub(super) function: Function,
    /// So many calls can be handed out.
    pub(super) most: usize,
}

impl<A> Lines<A> {
    pub(super) fn new() -> Self {
        Self { lines: Vec::new(), by_function: HashMap::new(), turn: 0, running: 0 }
    }

    /// Adds the line of `function`; `false` if it is there.
    pub(super) fn add(&mut self, function: &Function) -> bool {
        if self.by_function.contains_key(function) {
            return false;
        }
        self.by_function.insert(function.clone(), self.lines.len());
        self.lines.push(Line {
            function: function.clone(),
            arrived: VecDeque::new(),
            running: 0,
            asking: false,
        });
        true
    }

    pub(super) fn arrived(&mut self, line: usize, call: A) {
        self.lines[line].arrived.push_back((Instant::now(), call));
    }

    /// The next call to make, for one who makes at most `places` at a time. The functions take turns, and one may
    /// have three quarters of the places that the others leave free.
    pub(super) fn pick(&mut self, places: usize) -> Option<(usize, A)> {
        for step in 0..self.lines.len() {
            let index = (self.turn + step) % self.lines.len();
            if self.room(index, places, 1) == 0 {
                continue;
            }
            if let Some((_, call)) = self.lines[index].arrived.pop_front() {
                self.lines[index].running += 1;
                self.running += 1;
                self.turn = index + 1;
                return Some((index, call));
            }
        }
        None
    }

    /// A call that was picked does not run any more.
    pub(super) fn ended(&mut self, line: usize) {
        self.running -= 1;
        self.lines[line].running -= 1;
    }

    /// The functions to ask for, each until [`Self::asked`].
    pub(super) fn ask(&mut self, places: usize) -> Vec<Wanted> {
        let mut wanted = Vec::new();
        for line in 0..self.lines.len() {
            let most = self.room(line, places, AHEAD);
            let it = &mut self.lines[line];
            if !it.asking && it.arrived.is_empty() && most > 0 {
                it.asking = true;
                wanted.push(Wanted { line, function: it.function.clone(), most });
            }
        }
        wanted
    }

    pub(super) fn asked(&mut self, line: usize) {
        self.lines[line].asking = false;
    }

    /// Takes out the calls of `line` that came before `time`; whether any are left.
    pub(super) fn withdraw(&mut self, line: usize, time: Instant) -> (Vec<A>, bool) {
        let arrived = &mut self.lines[line].arrived;
        let mut old = Vec::new();
        while arrived.front().is_some_and(|(came, _)| *came < time) {
            old.extend(arrived.pop_front().map(|(_, call)| call));
        }
        (old, !arrived.is_empty())
    }

    /// Takes out all calls that were not handed out.
    pub(super) fn clear(&mut self) -> Vec<A> {
        self.lines
            .iter_mut()
            .flat_map(|line| line.arrived.drain(..))
            .map(|(_, call)| call)
            .collect()
    }

    /// How many calls more the line may have, at most `most`.
    fn room(&self, line: usize, places: usize, most: usize) -> usize {
        let may = |more: &usize| {
            let free = places.saturating_sub(self.running + more);
            self.lines[line].running + more <= free * 3
        };
        (0..most).take_while(may).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(name: &str) -> Function {
        Function { name: name.to_owned(), namespace: "fn".to_owned() }
    }

    fn lines() -> Lines<u32> {
        let mut lines = Lines::new();
        assert!(lines.add(&function("a")) && lines.add(&function("b")));
        assert!(!lines.add(&function("a")));
        lines
    }

    #[test]
    fn functions_take_turns() {
        let mut lines = lines();
        for call in 1..=3 {
            lines.arrived(0, call);
        }
        lines.arrived(1, 4);
        let picks: Vec<_> = std::iter::from_fn(|| lines.pick(8)).map(|(_, call)| call).collect();
        assert_eq!(picks, [1, 4, 2, 3]);
    }

    #[test]
    fn one_function_never_takes_all_places() {
        let mut lines = lines();
        for call in 0..100 {
            lines.arrived(0, call);
        }
        let taken = std::iter::from_fn(|| lines.pick(8)).count();
        assert!((4..8).contains(&taken), "{taken}");
        // The other one alone is asked for.
        let wanted: Vec<_> = lines.ask(8).into_iter().map(|wanted| wanted.line).collect();
        assert_eq!(wanted, [1]);
        lines.arrived(1, 100);
        assert_eq!(lines.pick(8), Some((1, 100)));
        lines.ended(0);
        assert_eq!(lines.pick(8), None);
    }

    #[test]
    fn a_lone_place_is_used() {
        let mut lines = lines();
        assert_eq!(lines.ask(1)[0].most, 1);
        assert_eq!(lines.ask(1).len(), 0);
        lines.arrived(0, 1);
        assert_eq!(lines.pick(1), Some((0, 1)));
    }

    #[test]
    fn what_was_not_handed_out_is_taken_back() {
        let mut lines = lines();
        lines.arrived(0, 1);
        let between = Instant::now();
        std::thread::sleep(std::time::Duration::from_millis(2));
        lines.arrived(0, 2);
        assert_eq!(
            lines.withdraw(0, between + std::time::Duration::from_millis(1)),
            (vec![1], true)
        );
        assert_eq!(lines.clear(), [2]);
    }
}
