//! A function that is scaled here: what is remembered of it, and what was said of it in the log.

use std::collections::{HashSet, VecDeque};

use crate::autoscale::decide::{Decision, Memory, Millis, Rules, Seen};
use crate::autoscale::policy::{BadLabel, Policy};
use crate::autoscale::view::Subject;
use crate::error::Error;
use crate::function::Function;

/// A function that is not listed any more is remembered for so long: a namespace that cannot be listed comes back.
const KEPT: Millis = 10 * 60_000;
/// One that was not listed for so long may be another one when it comes back.
const ABSENCE: Millis = 10_000;

/// A function that is scaled here.
#[derive(Debug, Default)]
pub(super) struct Tended {
    pub(super) label: String,
    pub(super) policy: Policy,
    pub(super) wanted: u64,
    /// Since when it is known, and nobody else has changed its replicas.
    pub(super) since: Millis,
    /// Replicas that were listed last.
    listed: Option<u64>,
    /// Replicas that the provider was asked for and does not list yet.
    expected: Option<u64>,
    /// Since when it is not listed any more.
    missing_since: Option<Millis>,
    pub(super) memory: Memory,
    /// Millicores of all replicas, as they were told.
    pub(super) cpu: VecDeque<(Millis, f64)>,
    /// What was said of it in the log, and need not be said again.
    pub(super) complaints: HashSet<Complaint>,
}

/// What is said once.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Complaint {
    Label(BadLabel),
    NeverZero,
    NoUsage,
    Refused,
}

/// A change that is to be made.
pub(super) struct Change {
    pub(super) function: Function,
    pub(super) seen: Seen,
    pub(super) decision: Decision,
}

impl Tended {
    /// The provider lists it, with so many replicas.
    pub(super) fn is_listed(&mut self, replicas: u64, now: Millis) {
        let missed = self.missing_since.take().is_some_and(|at| now.saturating_sub(at) >= ABSENCE);
        let expected = self.expected == Some(replicas);
        if expected {
            self.expected = None;
        }
        // A provider may take its time to show what it was asked for.
        if missed || (self.listed != Some(replicas) && !expected) {
            self.since = now;
        }
        (self.listed, self.wanted) = (Some(replicas), replicas);
    }

    /// The provider does not list it. Whether it is still to be remembered.
    pub(super) fn is_missing(&mut self, now: Millis) -> bool {
        now.saturating_sub(*self.missing_since.get_or_insert(now)) < KEPT
    }

    /// Whether it is there to be scaled.
    pub(super) fn is_present(&self) -> bool {
        self.missing_since.is_none()
    }

    /// The provider is asked for so many replicas; it may do so even when it says that it does not.
    pub(super) fn expect(&mut self, replicas: u64) {
        self.expected = Some(replicas);
    }

    /// The provider has told what it uses.
    pub(super) fn uses(&mut self, cpu: f64, now: Millis) {
        if self.cpu.is_empty() {
            // What was before is not known; one moment alone says little.
            self.since = now;
        }
        self.cpu.push_back((now, cpu));
    }

    /// It as the view is to see it. `sudden`: how long the panic window is.
    pub(super) fn subject(&self, sudden: Millis, now: Millis) -> Subject<'_> {
        let cpu = (self.cpu_since(0), self.cpu_since(now.saturating_sub(sudden)));
        let Self { label, policy, wanted, since, .. } = self;
        Subject { label, policy, wanted: *wanted, cpu, since: *since }
    }

    /// The mean of what was told since.
    fn cpu_since(&self, since: Millis) -> Option<f64> {
        let told = || self.cpu.iter().filter(|(at, _)| *at >= since).map(|(_, cpu)| *cpu);
        let count = u32::try_from(told().count()).unwrap_or(u32::MAX);
        (count > 0).then(|| told().sum::<f64>() / f64::from(count))
    }

    pub(super) fn complain(&mut self, complaint: Complaint, log: impl FnOnce()) {
        if self.complaints.insert(complaint) {
            log();
        }
    }

    pub(super) fn complain_of_labels(
        &mut self,
        function: &Function,
        bad: Vec<BadLabel>,
        rules: Rules,
    ) {
        // One that was mended may be broken again.
        self.complaints.retain(|it| match it {
            Complaint::Label(label) => bad.contains(label),
            _ => true,
        });
        for it in bad {
            self.complain(Complaint::Label(it.clone()), || {
                tracing::warn!(
                    function = %function, label = it.label, value = it.value,
                    "Label {} of {function} is {:?}, not {}: {} holds",
                    it.label, it.value, it.expected, it.instead
                );
            });
        }
        if self.policy.zero_after.is_some() && !rules.may_zero {
            self.complain(Complaint::NeverZero, || {
                tracing::warn!(
                    function = %function,
                    "{function} is not scaled to zero: without scale_from_zero nothing wakes it"
                );
            });
        }
    }

    /// Says what was done, or that it could not be.
    pub(super) fn log(&mut self, change: &Change, result: Result<(), Error>) {
        let Change { function, seen, decision } = change;
        let (from, to, reason) = (seen.wanted, decision.desired, decision.reason.word());
        match result {
            Ok(()) => {
                self.complaints.remove(&Complaint::Refused);
                // Where it is known, the next list will say the same.
                self.wanted = to;
                tracing::info!(
                    function = %function, from, to, reason,
                    load = seen.stable, load_now = seen.sudden,
                    scaling_type = self.policy.kind.word(),
                    target = self.policy.target * self.policy.proportion,
                    "Scaled {function} from {from} to {to}"
                );
            }
            Err(error) => self.complain(Complaint::Refused, || {
                tracing::warn!(
                    function = %function, from, to, reason, %error,
                    "{function} cannot be scaled from {from} to {to}"
                );
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(all: &[(Millis, u64)]) -> Tended {
        let mut it = Tended::default();
        all.iter().for_each(|(now, replicas)| it.is_listed(*replicas, *now));
        it
    }

    #[test]
    fn what_somebody_else_changes_begins_anew() {
        assert_eq!(listed(&[(1000, 1), (3000, 1)]).since, 1000);
        assert_eq!(listed(&[(1000, 1), (3000, 2), (5000, 2)]).since, 3000);
        assert_eq!(listed(&[(1000, 0), (3000, 1)]).since, 3000);
    }

    #[test]
    fn what_the_provider_was_asked_for_is_no_change_however_late_it_shows_it() {
        let mut it = listed(&[(1000, 1)]);
        it.expect(3);
        for (now, replicas, since) in [(3000, 1, 1000), (5000, 3, 1000), (7000, 1, 7000)] {
            it.is_listed(replicas, now);
            assert_eq!(it.since, since, "{now}");
        }
        // That it was asked for this before is no reason for another change.
        it.is_listed(3, 9000);
        assert_eq!(it.since, 9000);
    }

    #[test]
    fn what_is_not_listed_for_a_while_is_remembered() {
        let mut it = listed(&[(1000, 1)]);
        assert!(it.is_present() && it.is_missing(3000) && it.is_missing(5000) && !it.is_present());
        it.is_listed(1, 7000);
        assert!(it.is_present());
        assert_eq!(it.since, 1000);
        // For so long that it may have been deleted, and deployed again.
        assert!(it.is_missing(10_000) && it.is_missing(600_000));
        it.is_listed(1, 601_000);
        assert_eq!(it.since, 601_000);
        assert!(it.is_missing(700_000) && !it.is_missing(1_300_000));
    }

    #[test]
    fn cpu_counts_from_its_first_sample_on() {
        let mut it = listed(&[(1000, 1)]);
        it.uses(500.0, 9000);
        it.uses(300.0, 11_000);
        assert_eq!(it.subject(2000, 12_000).cpu, (Some(400.0), Some(300.0)));
        assert_eq!(it.since, 9000);
    }
}
