//! Membership of gateways: their load reports, and which one is the leader. No I/O.
//!
//! Each gateway publishes a report twice a second. The one with the lowest id is the leader. Ids start with the start
//! time, so the leader stays the same while other gateways come and go.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde::{Deserialize, Serialize};

use crate::decide::MonotonicMillis;
use crate::loads::LoadSample;

/// A gateway without a report for this time is gone.
pub const PEER_TIMEOUT: MonotonicMillis = 3000;
/// Time for which a report is valid, if the next one is late.
const REPORT_TTL: MonotonicMillis = 1500;
/// Maximum number of gateways.
const MAX_PEERS: usize = 256;
/// Maximum number of functions per gateway.
const MAX_FUNCTIONS_PER_PEER: usize = 20_000;
/// Maximum number of functions per report: a NATS server accepts 1 MiB.
const MAX_FUNCTIONS_PER_REPORT: usize = 2000;
const MAX_ID_BYTES: usize = 64;

/// Report that a gateway publishes twice a second.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoadReport {
    pub id: String,
    /// Number of the sample; all parts of a split report have the same.
    #[serde(rename = "beat")]
    pub seq: u64,
    /// Another part of this report follows.
    pub more: bool,
    /// The sender never becomes the leader.
    #[serde(rename = "mute")]
    pub observer: bool,
    /// The sender stops, and sends no more reports.
    pub leaving: bool,
    /// Functions with load.
    pub loads: HashMap<String, LoadSample>,
}

/// The other gateways.
#[derive(Debug)]
pub struct Peers {
    own_id: String,
    /// Time since when this gateway receives reports.
    listening_since: MonotonicMillis,
    alive: BTreeMap<String, Peer>,
    /// Gateways that fell silent without an announcement, and when.
    missing: BTreeMap<String, MonotonicMillis>,
}

#[derive(Debug, Default)]
struct Peer {
    last_report: MonotonicMillis,
    observer: bool,
    /// Number and parts of an incomplete report.
    partial: (u64, HashMap<String, LoadSample>),
    loads: HashMap<String, LoadSample>,
    /// Functions that it has reported since the last `take_called`.
    called: HashSet<String>,
}

impl LoadReport {
    /// Splits a report into parts that a server accepts.
    pub fn split(template: &Self, loads: Vec<(String, LoadSample)>) -> Vec<Self> {
        let mut loads = loads.into_iter().take(MAX_FUNCTIONS_PER_PEER).peekable();
        let mut messages = Vec::new();
        loop {
            let part = loads.by_ref().take(MAX_FUNCTIONS_PER_REPORT).collect();
            let more = loads.peek().is_some();
            messages.push(Self { more, loads: part, ..template.clone() });
            if !more {
                return messages;
            }
        }
    }
}

impl Peers {
    pub fn new(own: String, now: MonotonicMillis) -> Self {
        Self { own_id: own, listening_since: now, alive: BTreeMap::new(), missing: BTreeMap::new() }
    }

    /// Restarts after a gap in which reports were lost.
    pub fn reset(&mut self, now: MonotonicMillis) {
        self.listening_since = now;
        for id in std::mem::take(&mut self.alive).into_keys() {
            self.mark_missing(id, now);
        }
    }

    pub fn on_report(&mut self, message: LoadReport, now: MonotonicMillis) {
        let LoadReport { id, seq, more, observer, leaving, loads } = message;
        if id == self.own_id || id.is_empty() || id.len() > MAX_ID_BYTES {
            return;
        }
        self.missing.remove(&id);
        if leaving {
            self.alive.remove(&id);
            return;
        }
        if self.alive.len() >= MAX_PEERS && !self.alive.contains_key(&id) {
            return;
        }
        let peer = self.alive.entry(id).or_default();
        (peer.last_report, peer.observer) = (now, observer);
        if peer.partial.0 != seq {
            peer.partial = (seq, HashMap::new());
        }
        let valid = loads.into_iter().filter(|(_, load)| load.is_valid() && load.is_active());
        let capacity = MAX_FUNCTIONS_PER_PEER.saturating_sub(peer.partial.1.len());
        peer.partial.1.extend(valid.take(capacity));
        if !more {
            peer.loads = std::mem::take(&mut peer.partial.1);
            if peer.called.len() < MAX_FUNCTIONS_PER_PEER {
                peer.called.extend(peer.loads.keys().cloned());
            }
        }
    }

    /// Removes silent gateways. They count as missing for `patience`, unless a report arrives.
    pub fn expire(&mut self, now: MonotonicMillis, patience: MonotonicMillis) {
        let silent = |peer: &Peer| now.saturating_sub(peer.last_report) >= PEER_TIMEOUT;
        let silent: Vec<String> =
            self.alive.iter().filter(|(_, peer)| silent(peer)).map(|(id, _)| id.clone()).collect();
        for id in silent {
            self.alive.remove(&id);
            self.mark_missing(id, now);
        }
        self.missing.retain(|_, at| now.saturating_sub(*at) < patience);
    }

    fn mark_missing(&mut self, id: String, now: MonotonicMillis) {
        if self.missing.len() < MAX_PEERS {
            self.missing.insert(id, now);
        }
    }

    /// Returns whether a gateway is missing: it may be alive and serve calls that are unknown here.
    pub fn has_missing(&self) -> bool {
        !self.missing.is_empty()
    }

    /// Returns the loads of recent reports. Older ones are ignored: the calls of a dead gateway may already arrive
    /// here.
    pub fn loads(&self, now: MonotonicMillis) -> impl Iterator<Item = (&str, &LoadSample)> {
        let is_recent = move |peer: &&Peer| now.saturating_sub(peer.last_report) < REPORT_TTL;
        let loads = self.alive.values().filter(is_recent).flat_map(|peer| peer.loads.iter());
        loads.map(|(label, load)| (label.as_str(), load))
    }

    /// Returns the functions that other gateways have reported since the last call.
    pub fn take_called(&mut self) -> HashSet<String> {
        self.alive.values_mut().flat_map(|peer| std::mem::take(&mut peer.called)).collect()
    }

    /// Returns whether this gateway is the leader. A new gateway first listens.
    pub fn is_leader(&self, now: MonotonicMillis) -> bool {
        let others = || self.alive.iter().filter(|(_, peer)| !peer.observer);
        now.saturating_sub(self.listening_since) >= PEER_TIMEOUT
            && others().all(|(id, _)| *id > self.own_id)
    }

    /// Returns the number of gateways including this one, without observers.
    pub fn member_count(&self) -> usize {
        1 + self.alive.values().filter(|peer| !peer.observer).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(id: &str, seq: u64, loads: &[(&str, f64)]) -> LoadReport {
        let load = |rps: f64| LoadSample { rps, ..LoadSample::default() };
        let loads = loads.iter().map(|(label, rps)| ((*label).to_owned(), load(*rps))).collect();
        LoadReport { id: id.to_owned(), seq, loads, ..LoadReport::default() }
    }

    fn rps(peers: &Peers, label: &str, now: MonotonicMillis) -> f64 {
        peers.loads(now).filter(|(l, _)| *l == label).map(|(_, load)| load.rps).sum()
    }

    #[test]
    fn the_lowest_id_that_is_alive_leads() {
        let mut b = Peers::new("b".to_owned(), 0);
        assert!(!b.is_leader(2999), "it listens first");
        assert!(b.is_leader(3000));
        b.on_report(message("c", 1, &[]), 3000);
        assert!(b.is_leader(3000));
        b.on_report(message("a", 1, &[]), 3500);
        assert!(!b.is_leader(3500));
        assert_eq!(b.member_count(), 3);
        // Gateway `a` falls silent, like `c` before.
        b.expire(5999, 10_000);
        assert!(!b.has_missing());
        b.expire(6500, 10_000);
        assert!(b.has_missing() && b.is_leader(6500));
        assert_eq!(b.member_count(), 1);
    }

    #[test]
    fn a_silent_gateway_is_missing_until_it_reports_or_expires() {
        let mut b = Peers::new("b".to_owned(), 0);
        let hear = |b: &mut Peers, now| b.on_report(message("a", 1, &[]), now);
        hear(&mut b, 1000);
        b.expire(4000, 10_000);
        assert!(b.has_missing());
        hear(&mut b, 5000);
        b.expire(5000, 10_000);
        assert!(!b.has_missing());
        b.expire(8000, 10_000);
        b.expire(17_999, 10_000);
        assert!(b.has_missing());
        b.expire(18_000, 10_000);
        assert!(!b.has_missing());
        // After a gap, all gateways are missing; an announcement of the stop may arrive late.
        hear(&mut b, 20_000);
        b.reset(20_000);
        assert!(b.has_missing());
        b.on_report(LoadReport { leaving: true, ..message("a", 2, &[]) }, 20_500);
        assert!(!b.has_missing());
    }

    #[test]
    fn a_leaving_gateway_is_removed_immediately() {
        let mut b = Peers::new("b".to_owned(), 0);
        b.on_report(message("a", 1, &[("echo", 5.0)]), 4000);
        b.on_report(LoadReport { leaving: true, ..message("a", 2, &[]) }, 4100);
        b.expire(4100, 10_000);
        assert!(b.is_leader(4100) && !b.has_missing());
        assert!(rps(&b, "echo", 4100).abs() < 1e-9);
    }

    #[test]
    fn an_observer_never_leads() {
        let mut b = Peers::new("b".to_owned(), 0);
        b.on_report(LoadReport { observer: true, ..message("a", 1, &[("echo", 5.0)]) }, 4000);
        assert!(b.is_leader(4000));
        assert_eq!(b.member_count(), 1);
        assert!((rps(&b, "echo", 4000) - 5.0).abs() < 1e-9);
    }

    #[test]
    fn valid_reports_are_summed() {
        let mut own = Peers::new("own".to_owned(), 0);
        own.on_report(message("a", 1, &[("echo", 5.0), ("env", 1.0)]), 0);
        own.on_report(message("b", 7, &[("echo", 2.0)]), 0);
        assert!((rps(&own, "echo", 0) - 7.0).abs() < 1e-9);
        own.on_report(message("a", 2, &[("echo", 1.0)]), 500);
        assert!((rps(&own, "echo", 500) - 3.0).abs() < 1e-9);
        assert!(rps(&own, "env", 500).abs() < 1e-9);
        // The report of the other gateway is late, and then missing.
        assert!((rps(&own, "echo", 1499) - 3.0).abs() < 1e-9);
        assert!((rps(&own, "echo", 1500) - 1.0).abs() < 1e-9);
        // A call is recorded even if the next report does not contain it.
        let called = own.take_called();
        assert!(called.contains("env") && called.contains("echo"));
        assert!(own.take_called().is_empty());
    }

    #[test]
    fn a_split_report_counts_when_complete() {
        let many: Vec<_> = (0..5000)
            .map(|number| (format!("f{number}"), LoadSample { rps: 1.0, ..LoadSample::default() }))
            .collect();
        let messages = LoadReport::split(&message("a", 3, &[]), many);
        assert_eq!(messages.iter().map(|m| m.more).collect::<Vec<_>>(), [true, true, false]);
        let mut own = Peers::new("own".to_owned(), 0);
        own.on_report(message("a", 2, &[("old", 1.0)]), 500);
        for message in messages {
            assert_eq!(own.loads(1000).count(), 1);
            own.on_report(message, 1000);
        }
        assert_eq!(own.loads(1000).count(), 5000);
        assert_eq!(LoadReport::split(&message("a", 4, &[]), Vec::new()).len(), 1);
    }

    #[test]
    fn invalid_reports_are_ignored() {
        let mut own = Peers::new("own".to_owned(), 0);
        own.on_report(message("own", 1, &[("echo", 5.0)]), 0);
        own.on_report(message("", 1, &[("echo", 5.0)]), 0);
        own.on_report(message(&"x".repeat(65), 1, &[("echo", 5.0)]), 0);
        own.on_report(message("a", 1, &[("echo", f64::NAN), ("env", -1.0)]), 0);
        assert_eq!(own.loads(0).count(), 0);
        for number in 0..2 * MAX_PEERS {
            own.on_report(message(&format!("p{number}"), 1, &[]), 0);
        }
        assert_eq!(own.member_count(), MAX_PEERS + 1);
    }
}
