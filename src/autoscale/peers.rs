//! The other gateways: what each says it sees, and which one acts. No I/O.
//!
//! Each tells the others twice a second. The one with the lowest id acts; ids begin with the time of the start, so that
//! the one that acts stays the same while others come and go.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde::{Deserialize, Serialize};

use crate::autoscale::decide::Millis;
use crate::autoscale::loads::Load;

/// A gateway that has not been heard of for so long is gone.
pub const GONE: Millis = 3000;
/// What was said holds until the next time; for so long, if that is late.
const HOLDS: Millis = 1500;
/// Gateways that are listened to.
const MOST_PEERS: usize = 256;
/// Functions that one gateway can say something about.
const MOST_FUNCTIONS: usize = 20_000;
/// Functions in one message: a server takes 1 MiB.
const IN_MESSAGE: usize = 2000;
const LONGEST_ID: usize = 64;

/// What a gateway says twice a second.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Message {
    pub id: String,
    /// Counts the samples; what is said in several messages has the same number.
    pub beat: u64,
    /// Another message belongs to this one.
    pub more: bool,
    /// It only tells; it never acts.
    pub mute: bool,
    /// It goes, and will not be heard of again.
    pub leaving: bool,
    /// Functions that did something.
    pub loads: HashMap<String, Load>,
}

/// Those that are heard of.
#[derive(Debug)]
pub struct Peers {
    own: String,
    /// When it began to listen.
    since: Millis,
    heard: BTreeMap<String, Peer>,
    /// Those that have fallen silent without taking their leave, and when.
    missing: BTreeMap<String, Millis>,
}

#[derive(Debug, Default)]
struct Peer {
    last: Millis,
    mute: bool,
    /// Part of what it says now.
    coming: (u64, HashMap<String, Load>),
    loads: HashMap<String, Load>,
    /// Functions that it has seen called since this was asked.
    called: HashSet<String>,
}

impl Message {
    /// What is to be said of `loads`, in messages that a server takes.
    pub fn split(whole: &Self, loads: Vec<(String, Load)>) -> Vec<Self> {
        let mut loads = loads.into_iter().take(MOST_FUNCTIONS).peekable();
        let mut messages = Vec::new();
        loop {
            let part = loads.by_ref().take(IN_MESSAGE).collect();
            let more = loads.peek().is_some();
            messages.push(Self { more, loads: part, ..whole.clone() });
            if !more {
                return messages;
            }
        }
    }
}

impl Peers {
    pub fn new(own: String, now: Millis) -> Self {
        Self { own, since: now, heard: BTreeMap::new(), missing: BTreeMap::new() }
    }

    /// Listens as if for the first time: what was said meanwhile was not heard.
    pub fn begin_anew(&mut self, now: Millis) {
        self.since = now;
        for id in std::mem::take(&mut self.heard).into_keys() {
            self.misses(id, now);
        }
    }

    pub fn hear(&mut self, message: Message, now: Millis) {
        let Message { id, beat, more, mute, leaving, loads } = message;
        if id == self.own || id.is_empty() || id.len() > LONGEST_ID {
            return;
        }
        self.missing.remove(&id);
        if leaving {
            self.heard.remove(&id);
            return;
        }
        if self.heard.len() >= MOST_PEERS && !self.heard.contains_key(&id) {
            return;
        }
        let peer = self.heard.entry(id).or_default();
        (peer.last, peer.mute) = (now, mute);
        if peer.coming.0 != beat {
            peer.coming = (beat, HashMap::new());
        }
        let sound = loads.into_iter().filter(|(_, load)| load.is_sound() && load.is_some());
        let room = MOST_FUNCTIONS.saturating_sub(peer.coming.1.len());
        peer.coming.1.extend(sound.take(room));
        if !more {
            peer.loads = std::mem::take(&mut peer.coming.1);
            if peer.called.len() < MOST_FUNCTIONS {
                peer.called.extend(peer.loads.keys().cloned());
            }
        }
    }

    /// Lets go of those that have fallen silent. They are missing for `patience`, unless they are heard again.
    pub fn expire(&mut self, now: Millis, patience: Millis) {
        let silent = |peer: &Peer| now.saturating_sub(peer.last) >= GONE;
        let silent: Vec<String> =
            self.heard.iter().filter(|(_, it)| silent(it)).map(|(id, _)| id.clone()).collect();
        for id in silent {
            self.heard.remove(&id);
            self.misses(id, now);
        }
        self.missing.retain(|_, at| now.saturating_sub(*at) < patience);
    }

    fn misses(&mut self, id: String, now: Millis) {
        if self.missing.len() < MOST_PEERS {
            self.missing.insert(id, now);
        }
    }

    /// Whether somebody is missing: it may be alive and carry calls, only that nobody hears of them.
    pub fn misses_any(&self) -> bool {
        !self.missing.is_empty()
    }

    /// What the others have said last, if that was just now: a dead one's calls may have come here meanwhile.
    pub fn loads(&self, now: Millis) -> impl Iterator<Item = (&str, &Load)> {
        let fresh = move |peer: &&Peer| now.saturating_sub(peer.last) < HOLDS;
        let loads = self.heard.values().filter(fresh).flat_map(|peer| peer.loads.iter());
        loads.map(|(label, load)| (label.as_str(), load))
    }

    /// Functions that others have seen called since this was asked last.
    pub fn take_called(&mut self) -> HashSet<String> {
        self.heard.values_mut().flat_map(|peer| std::mem::take(&mut peer.called)).collect()
    }

    /// Whether this gateway is the one that acts. One that has just come listens first.
    pub fn acts(&self, now: Millis) -> bool {
        let others = || self.heard.iter().filter(|(_, peer)| !peer.mute);
        now.saturating_sub(self.since) >= GONE && others().all(|(id, _)| *id > self.own)
    }

    /// How many gateways there are, this one among them.
    pub fn count(&self) -> usize {
        1 + self.heard.values().filter(|peer| !peer.mute).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(id: &str, beat: u64, loads: &[(&str, f64)]) -> Message {
        let load = |rps: f64| Load { rps, ..Load::default() };
        let loads = loads.iter().map(|(label, rps)| ((*label).to_owned(), load(*rps))).collect();
        Message { id: id.to_owned(), beat, loads, ..Message::default() }
    }

    fn rps(peers: &Peers, label: &str, now: Millis) -> f64 {
        peers.loads(now).filter(|(l, _)| *l == label).map(|(_, load)| load.rps).sum()
    }

    #[test]
    fn the_lowest_that_is_alive_acts() {
        let mut b = Peers::new("b".to_owned(), 0);
        assert!(!b.acts(2999), "it listens first");
        assert!(b.acts(3000));
        b.hear(message("c", 1, &[]), 3000);
        assert!(b.acts(3000));
        b.hear(message("a", 1, &[]), 3500);
        assert!(!b.acts(3500));
        assert_eq!(b.count(), 3);
        // It falls silent, as the other does.
        b.expire(5999, 10_000);
        assert!(!b.misses_any());
        b.expire(6500, 10_000);
        assert!(b.misses_any() && b.acts(6500));
        assert_eq!(b.count(), 1);
    }

    #[test]
    fn one_that_falls_silent_is_missing_until_it_is_heard_or_given_up() {
        let mut b = Peers::new("b".to_owned(), 0);
        let hear = |b: &mut Peers, now| b.hear(message("a", 1, &[]), now);
        hear(&mut b, 1000);
        b.expire(4000, 10_000);
        assert!(b.misses_any());
        hear(&mut b, 5000);
        b.expire(5000, 10_000);
        assert!(!b.misses_any());
        b.expire(8000, 10_000);
        b.expire(17_999, 10_000);
        assert!(b.misses_any());
        b.expire(18_000, 10_000);
        assert!(!b.misses_any());
        // Whom nobody could hear for a while is missing, too; it may take its leave late.
        hear(&mut b, 20_000);
        b.begin_anew(20_000);
        assert!(b.misses_any());
        b.hear(Message { leaving: true, ..message("a", 2, &[]) }, 20_500);
        assert!(!b.misses_any());
    }

    #[test]
    fn one_that_takes_its_leave_is_gone_at_once() {
        let mut b = Peers::new("b".to_owned(), 0);
        b.hear(message("a", 1, &[("echo", 5.0)]), 4000);
        b.hear(Message { leaving: true, ..message("a", 2, &[]) }, 4100);
        b.expire(4100, 10_000);
        assert!(b.acts(4100) && !b.misses_any());
        assert!(rps(&b, "echo", 4100).abs() < 1e-9);
    }

    #[test]
    fn one_that_only_tells_never_acts() {
        let mut b = Peers::new("b".to_owned(), 0);
        b.hear(Message { mute: true, ..message("a", 1, &[("echo", 5.0)]) }, 4000);
        assert!(b.acts(4000));
        assert_eq!(b.count(), 1);
        assert!((rps(&b, "echo", 4000) - 5.0).abs() < 1e-9);
    }

    #[test]
    fn what_each_said_last_is_added_up_while_it_holds() {
        let mut own = Peers::new("own".to_owned(), 0);
        own.hear(message("a", 1, &[("echo", 5.0), ("env", 1.0)]), 0);
        own.hear(message("b", 7, &[("echo", 2.0)]), 0);
        assert!((rps(&own, "echo", 0) - 7.0).abs() < 1e-9);
        own.hear(message("a", 2, &[("echo", 1.0)]), 500);
        assert!((rps(&own, "echo", 500) - 3.0).abs() < 1e-9);
        assert!(rps(&own, "env", 500).abs() < 1e-9);
        // The other one is late, and then says nothing any more.
        assert!((rps(&own, "echo", 1499) - 3.0).abs() < 1e-9);
        assert!((rps(&own, "echo", 1500) - 1.0).abs() < 1e-9);
        // A call that the next message does not tell of any more was a call.
        let called = own.take_called();
        assert!(called.contains("env") && called.contains("echo"));
        assert!(own.take_called().is_empty());
    }

    #[test]
    fn what_comes_in_parts_counts_when_it_is_whole() {
        let many: Vec<_> = (0..5000)
            .map(|number| (format!("f{number}"), Load { rps: 1.0, ..Load::default() }))
            .collect();
        let messages = Message::split(&message("a", 3, &[]), many);
        assert_eq!(messages.iter().map(|m| m.more).collect::<Vec<_>>(), [true, true, false]);
        let mut own = Peers::new("own".to_owned(), 0);
        own.hear(message("a", 2, &[("old", 1.0)]), 500);
        for message in messages {
            assert_eq!(own.loads(1000).count(), 1);
            own.hear(message, 1000);
        }
        assert_eq!(own.loads(1000).count(), 5000);
        assert_eq!(Message::split(&message("a", 4, &[]), Vec::new()).len(), 1);
    }

    #[test]
    fn nonsense_is_not_heard() {
        let mut own = Peers::new("own".to_owned(), 0);
        own.hear(message("own", 1, &[("echo", 5.0)]), 0);
        own.hear(message("", 1, &[("echo", 5.0)]), 0);
        own.hear(message(&"x".repeat(65), 1, &[("echo", 5.0)]), 0);
        own.hear(message("a", 1, &[("echo", f64::NAN), ("env", -1.0)]), 0);
        assert_eq!(own.loads(0).count(), 0);
        for number in 0..2 * MOST_PEERS {
            own.hear(message(&format!("p{number}"), 1, &[]), 0);
        }
        assert_eq!(own.count(), MOST_PEERS + 1);
    }
}
