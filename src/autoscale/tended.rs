//! A function that is scaled here: what is remembered of it, and what was said of it in the log.

use std::collections::{HashSet, VecDeque};

use crate::autoscale::decide::{Decision, Memory, Millis, Rules, Seen};
use crate::autoscale::policy::{BadLabel, Policy};
use crate::error::Error;
use crate::function::Function;

/// A function that is scaled here.
#[derive(Debug, Default)]
pub(super) struct Tended {
    pub(super) label: String,
    pub(super) policy: Policy,
    pub(super) wanted: u64,
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
    /// The mean of what was told since.
    pub(super) fn cpu_since(&self, since: Millis) -> Option<f64> {
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
                    function.name = %function, label = it.label, value = it.value,
                    "Label {} of {function} is {:?}, not {}: {} holds",
                    it.label, it.value, it.expected, it.instead
                );
            });
        }
        if self.policy.zero_after.is_some() && !rules.may_zero {
            self.complain(Complaint::NeverZero, || {
                tracing::warn!(
                    function.name = %function,
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
                    function.name = %function, from, to, reason,
                    load = seen.stable, load_now = seen.sudden,
                    scaling_type = self.policy.kind.word(),
                    target = self.policy.target * self.policy.proportion,
                    "Scaled {function} from {from} to {to}"
                );
            }
            Err(error) => self.complain(Complaint::Refused, || {
                tracing::warn!(
                    function.name = %function, from, to, reason, %error,
                    "{function} cannot be scaled from {from} to {to}"
                );
            }),
        }
    }
}
