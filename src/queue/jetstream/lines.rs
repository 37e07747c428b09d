//! Which function's calls are asked for, and which call is handed out next. No I/O.
//!
//! Every function has a consumer of its own on the server, so that no call waits behind those of another function.
//! The share of each function is that of every queue.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use crate::function::Function;
use crate::queue::fair_share::may_start;
use crate::queue::jetstream::bundle::TOGETHER;
use crate::queue::jetstream::pace::Pace;

/// At most so many calls of a function are asked for at once.
const MOST: usize = 64;

/// So many messages tell how many calls one has.
const LATELY: f64 = 8.0;

/// How long the server may keep one who asks waiting. Where calls come all the time, what was asked for has come much
/// sooner, or got lost.
const WAIT: Duration = Duration::from_secs(5);
const WAIT_FLOWING: Duration = Duration::from_secs(1);
/// Later than that no answer is on its way.
const ON_ITS_WAY: Duration = Duration::from_millis(500);

/// The functions with a consumer, and the calls that have come but were not handed out.
pub(super) struct Lines<A> {
    lines: Vec<Line<A>>,
    by_function: HashMap<Function, usize>,
    /// Whose turn it is.
    turn: usize,
    /// How many have a place, of how many there are.
    placed: usize,
    places: usize,
    /// How often was asked.
    asks: u64,
}

struct Line<A> {
    function: Function,
    /// Calls that have come, and when.
    arrived: VecDeque<(Instant, A)>,
    /// How many were picked that nobody has taken yet.
    begun: usize,
    /// How many have a place among those that are made.
    placed: usize,
    /// The function has no consumer.
    retired: bool,
    ask: Option<Ask>,
    pace: Pace,
    /// How many calls a message has, lately.
    size: Option<f64>,
}

/// What the server was asked for.
struct Ask {
    number: u64,
    /// So many messages are still to come.
    left: usize,
    /// Then it is answered, or lost.
    until: Instant,
}

/// A function to ask the server for.
pub(super) struct Wanted {
    pub(super) line: usize,
    pub(super) function: Function,
    /// So many messages have what can be handed out.
    pub(super) most: usize,
    /// Which ask this is.
    pub(super) number: u64,
    /// Calls come all the time.
    pub(super) flows: bool,
}

impl Wanted {
    /// For so long the server keeps the ask.
    pub(super) fn wait(&self) -> Duration {
        wait(self.flows)
    }
}

fn wait(flows: bool) -> Duration {
    if flows { WAIT_FLOWING } else { WAIT }
}

impl<A> Lines<A> {
    pub(super) fn new() -> Self {
        Self {
            lines: Vec::new(),
            by_function: HashMap::new(),
            turn: 0,
            placed: 0,
            places: 1,
            asks: 0,
        }
    }

    /// Adds the line of `function`; `false` if it is there.
    pub(super) fn add(&mut self, function: &Function) -> bool {
        if let Some(line) = self.by_function.get(function) {
            return std::mem::take(&mut self.lines[*line].retired);
        }
        self.by_function.insert(function.clone(), self.lines.len());
        self.lines.push(Line {
            function: function.clone(),
            arrived: VecDeque::new(),
            begun: 0,
            placed: 0,
            retired: false,
            ask: None,
            pace: Pace::default(),
            size: None,
        });
        true
    }

    pub(super) fn of(&self, function: &Function) -> Option<usize> {
        self.by_function.get(function).copied()
    }

    pub(super) fn function(&self, line: usize) -> Option<Function> {
        Some(self.lines.get(line)?.function.clone())
    }

    /// A message with so many calls that was asked for has come, whatever becomes of it.
    pub(super) fn came(&mut self, line: usize, calls: usize, now: Instant) {
        let line = &mut self.lines[line];
        (0..calls).for_each(|_| line.pace.came(now));
        let size = line.size.unwrap_or(calls as f64);
        line.size = Some(size + (calls as f64 - size) / LATELY);
        if let Some(ask) = &mut line.ask {
            ask.left = ask.left.saturating_sub(1);
        }
    }

    /// The consumer of `function` was made a moment ago: nothing comes of what was asked for before.
    pub(super) fn made(&mut self, function: &Function) {
        self.add(function);
        if let Some(line) = self.of(function) {
            self.lines[line].ask = None;
        }
    }

    /// Nothing is asked for any more, until the line is added again.
    pub(super) fn retire(&mut self, line: usize) {
        if let Some(line) = self.lines.get_mut(line) {
            (line.retired, line.ask) = (true, None);
        }
    }

    /// Keeps a call that can be handed out.
    pub(super) fn arrived(&mut self, line: usize, call: A, now: Instant) {
        self.lines[line].arrived.push_back((now, call));
    }

    /// The next call to begin, for one who makes at most `places` at a time. The functions take turns; of each is begun
    /// what has room in its share of the places, and what will have in the next moments.
    pub(super) fn pick(&mut self, places: usize, now: Instant) -> Option<(usize, A)> {
        self.places = places;
        for step in 0..self.lines.len() {
            let index = (self.turn + step) % self.lines.len();
            let line = &self.lines[index];
            if line.arrived.is_empty() {
                continue;
            }
            // Those that are not ahead have a place each.
            let placed = (line.begun + 1).saturating_sub(line.pace.ahead(now));
            if self.room(index, places, placed) < placed {
                continue;
            }
            if let Some((_, call)) = self.lines[index].arrived.pop_front() {
                self.lines[index].begun += 1;
                self.turn = index + 1;
                return Some((index, call));
            }
        }
        None
    }

    /// Whether there is a place for a call that was picked.
    pub(super) fn may_take(&self, line: usize, places: usize) -> bool {
        self.room(line, places, 1) == 1
    }

    /// A call that was picked gets a place.
    pub(super) fn take(&mut self, line: usize) {
        self.unpick(line);
        self.placed += 1;
        self.lines[line].placed += 1;
    }

    /// A call that was picked is not made.
    pub(super) fn unpick(&mut self, line: usize) {
        self.lines[line].begun -= 1;
    }

    /// A call leaves its place.
    pub(super) fn leaves(&mut self, line: usize) {
        self.placed -= 1;
        self.lines[line].placed -= 1;
    }

    /// How many calls that were picked could be taken at once.
    pub(super) fn takeable(&self, places: usize) -> usize {
        let begun = self.lines.iter().enumerate().filter(|(_, it)| it.begun > 0);
        begun.map(|(line, it)| self.room(line, places, it.begun)).sum()
    }

    /// Whether `ended` calls that wait for others to end should do so no longer: nothing was picked that could, or so few
    /// places are left meanwhile that they wait for this.
    pub(super) fn waits_for(&self, ended: usize) -> bool {
        self.places < TOGETHER && ended * 2 >= self.places
            || self.placed == 0 && self.lines.iter().all(|line| line.begun == 0)
    }

    /// The functions to ask for. Of a function that had no calls lately one is asked for; of
    /// others what can be handed out, and what will be in the next moments.
    pub(super) fn ask(&mut self, places: usize, now: Instant) -> Vec<Wanted> {
        let mut wanted = Vec::new();
        for line in 0..self.lines.len() {
            let it = &self.lines[line];
            let asked = it.ask.as_ref().is_some_and(|ask| ask.left > 0 && ask.until > now);
            if asked || it.retired {
                continue;
            }
            let (flows, ahead) = (it.pace.flows(now), it.pace.ahead(now));
            let room = self.room(line, places, if flows { MOST } else { 1 });
            let target = (room + ahead).min(MOST);
            let waiting = self.lines[line].arrived.len() + self.lines[line].begun;
            if waiting * 2 > target || target == 0 {
                continue;
            }
            self.asks += 1;
            let it = &mut self.lines[line];
            // A little less rather than more: what is not taken soon goes back call by call.
            let most = (((target - waiting) as f64 / it.size.unwrap_or(1.0)) as usize).max(1);
            let number = self.asks;
            it.ask = Some(Ask { number, left: most, until: now + wait(flows) + ON_ITS_WAY });
            wanted.push(Wanted { line, function: it.function.clone(), most, number, flows });
        }
        wanted
    }

    /// Nothing more comes of the ask `number`.
    pub(super) fn answered(&mut self, line: usize, number: u64) {
        if let Some(it) = self.lines.get_mut(line)
            && it.ask.as_ref().is_some_and(|ask| ask.number == number)
        {
            it.ask = None;
        }
    }

    /// Nothing more comes of any ask.
    pub(super) fn forget_asks(&mut self) {
        self.lines.iter_mut().for_each(|line| line.ask = None);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lines.iter().all(|line| line.arrived.is_empty())
    }

    /// Takes out the calls that came before `time`.
    pub(super) fn withdraw(&mut self, time: Instant) -> Vec<A> {
        let mut old = Vec::new();
        for line in &mut self.lines {
            while line.arrived.front().is_some_and(|(came, _)| *came < time) {
                old.extend(line.arrived.pop_front().map(|(_, call)| call));
            }
        }
        old
    }

    /// Takes out all calls that were not handed out.
    pub(super) fn clear(&mut self) -> Vec<A> {
        let arrived = self.lines.iter_mut().flat_map(|line| line.arrived.drain(..));
        arrived.map(|(_, call)| call).collect()
    }

    /// How many calls more the line may have, at most `most`.
    fn room(&self, line: usize, places: usize, most: usize) -> usize {
        let placed = self.lines[line].placed;
        (0..most).take_while(|more| may_start(placed + more, self.placed + more, places)).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIME: Duration = Duration::from_secs(6);

    fn function(name: &str) -> Function {
        Function { name: name.to_owned(), namespace: "fn".to_owned() }
    }

    fn lines() -> Lines<u32> {
        let mut lines = Lines::new();
        assert!(lines.add(&function("a")) && lines.add(&function("b")));
        assert!(!lines.add(&function("a")));
        lines
    }

    fn picks(lines: &mut Lines<u32>, places: usize, now: Instant) -> Vec<u32> {
        std::iter::from_fn(|| lines.pick(places, now)).map(|(_, call)| call).collect()
    }

    fn place(lines: &mut Lines<u32>, line: usize, places: usize) -> bool {
        let may = lines.may_take(line, places);
        if may {
            lines.take(line);
        }
        may
    }

    /// How many of the first function have a place.
    fn takes(lines: &mut Lines<u32>, places: usize, now: Instant) -> usize {
        let picked = picks(lines, places, now).len();
        assert!((0..picked).all(|_| place(lines, 0, places)));
        picked
    }

    fn asked(lines: &mut Lines<u32>, places: usize, now: Instant) -> Vec<(usize, usize)> {
        lines.ask(places, now).into_iter().map(|wanted| (wanted.line, wanted.most)).collect()
    }

    #[test]
    fn functions_take_turns() {
        let (mut lines, now) = (lines(), Instant::now());
        for call in 1..=3 {
            lines.arrived(0, call, now);
        }
        lines.arrived(1, 4, now);
        assert_eq!(picks(&mut lines, 8, now), [1, 4, 2, 3]);
    }

    #[test]
    fn one_function_never_takes_all_places() {
        let (mut lines, now) = (lines(), Instant::now());
        for call in 0..100 {
            lines.arrived(0, call, now);
        }
        let taken = takes(&mut lines, 8, now);
        assert!((4..8).contains(&taken), "{taken}");
        // The other one alone is asked for.
        assert_eq!(asked(&mut lines, 8, now), [(1, 1)]);
        lines.arrived(1, 100, now);
        assert_eq!(lines.pick(8, now), Some((1, 100)));
        assert!(place(&mut lines, 1, 8));
        lines.leaves(0);
        assert_eq!(lines.pick(8, now), None);
    }

    #[test]
    fn what_is_begun_ahead_has_no_place() {
        let (mut lines, start) = (lines(), Instant::now());
        let ms = Duration::from_millis;
        // Ten of them come every 10 ms.
        for step in 0..30 {
            lines.came(0, 10, start + ms(step * 10));
        }
        let now = start + ms(300);
        for call in 0..100 {
            lines.arrived(0, call, now);
        }
        let share = (0..).take_while(|running| may_start(*running, *running, 8)).count();
        assert_eq!(lines.takeable(8), 0);
        let begun = picks(&mut lines, 8, now).len();
        assert!((20..64).contains(&(begun - share)), "{begun}");
        assert_eq!(lines.takeable(8), share);
        assert_eq!((0..begun).filter(|_| place(&mut lines, 0, 8)).count(), share);
        assert_eq!(lines.takeable(8), 0);
        // There is a place for another function, and calls of it are begun.
        lines.arrived(1, 100, now);
        assert_eq!(lines.pick(8, now), Some((1, 100)));
        assert_eq!(lines.takeable(8), 1);
        assert!(place(&mut lines, 1, 8));
        // One that is made lets the next one in; one that is not made at all takes nobody's place.
        lines.leaves(0);
        lines.leaves(1);
        lines.unpick(0);
        assert!(place(&mut lines, 0, 8) && !place(&mut lines, 0, 8));
        assert!(!lines.waits_for(3) && lines.waits_for(4));
    }

    #[test]
    fn of_few_places_one_stays_free() {
        for places in 2..6 {
            let (mut lines, now) = (lines(), Instant::now());
            (0..10).for_each(|call| lines.arrived(0, call, now));
            let taken = takes(&mut lines, places, now);
            assert!((places / 2..places).contains(&taken), "{taken} of {places}");
        }
    }

    #[test]
    fn a_lone_place_is_used() {
        let (mut lines, now) = (lines(), Instant::now());
        assert_eq!(asked(&mut lines, 1, now), [(0, 1), (1, 1)]);
        assert_eq!(asked(&mut lines, 1, now), []);
        lines.arrived(0, 1, now);
        assert_eq!(lines.pick(1, now), Some((0, 1)));
        assert!(place(&mut lines, 0, 1) && lines.waits_for(1) && !lines.waits_for(0));
        lines.leaves(0);
        assert!(lines.waits_for(0));
    }

    #[test]
    fn one_is_asked_for_until_calls_come_and_then_what_can_be_made() {
        let (mut lines, now) = (lines(), Instant::now());
        assert_eq!(asked(&mut lines, 40, now), [(0, 1), (1, 1)]);
        lines.came(0, 1, now);
        let more = asked(&mut lines, 40, now);
        assert!(matches!(more[..], [(0, 20..=39)]), "{more:?}");
        // It stands until all has come, it is answered, or its time is over.
        let most = more[0].1;
        (1..most).for_each(|_| lines.came(0, 1, now));
        assert_eq!(asked(&mut lines, 40, now), []);
        lines.came(0, 1, now);
        assert_eq!(asked(&mut lines, 40, now).len(), 1);
        let number = lines.lines[0].ask.as_ref().unwrap().number;
        lines.answered(0, number - 1);
        assert_eq!(asked(&mut lines, 40, now), []);
        lines.answered(0, number);
        assert_eq!(asked(&mut lines, 40, now).len(), 1);
        assert_eq!(asked(&mut lines, 40, now + TIME).len(), 2);
        lines.forget_asks();
        assert_eq!(asked(&mut lines, 40, now + TIME).len(), 2);
        lines.made(&function("b"));
        assert_eq!(asked(&mut lines, 40, now + TIME), [(1, 1)]);
        lines.retire(0);
        assert_eq!(asked(&mut lines, 40, now + TIME * 2), [(1, 1)]);
        assert!(lines.add(&function("a")) && !lines.add(&function("a")));
        assert_eq!(asked(&mut lines, 40, now + TIME * 2), [(0, 1)]);
    }

    #[test]
    fn what_was_not_handed_out_is_taken_back() {
        let (mut lines, now) = (lines(), Instant::now());
        lines.arrived(0, 1, now);
        lines.arrived(0, 2, now + TIME);
        assert_eq!(lines.withdraw(now + TIME), [1]);
        assert!(!lines.is_empty());
        assert_eq!(lines.clear(), [2]);
        assert!(lines.is_empty());
    }
}
