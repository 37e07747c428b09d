//! How many replicas a function should have, from what was seen of it. No I/O and no clock: the same sight and memory
//! give the same decision.
//!
//! Load is that of all replicas together: what one has, times how many there are. So it does not matter how soon a
//! provider tells of replicas that have just begun.

use std::collections::VecDeque;
use std::time::Duration;

use crate::autoscale::policy::Policy;

/// Milliseconds since this process began to watch.
pub type Millis = u64;

/// A request is not repeated for so long while the provider does not show that it was heard.
const ASK_AGAIN: Millis = 10_000;

/// Nothing is asked for so long when a request has failed: a little less than a round, so that the next one asks.
const PAUSE: Millis = 1500;

/// What is seen of a function at one moment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seen {
    pub now: Millis,
    /// Replicas that the provider was told to have.
    pub wanted: u64,
    /// The mean load over the stable window; `None`: it is not known.
    pub stable: Option<f64>,
    /// The load of late: the mean over the panic window, or more if that has held for a moment.
    pub sudden: Option<f64>,
    /// Calls run, or wait to be made.
    pub busy: bool,
    /// For how long there has certainly been no call; `None`: that is not known.
    pub quiet: Option<Duration>,
    /// Every call has been seen, and what followed from it is remembered, for a stable window. Otherwise no replica is
    /// taken away, but for all of them when it is quiet.
    pub whole: bool,
}

/// What holds for all functions.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// The stable window.
    pub window: Millis,
    /// Something wakes functions that are at zero.
    pub may_zero: bool,
}

/// What is remembered of a function from one decision to the next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Load has doubled: no replica goes until then.
    panic_until: Millis,
    /// What was recommended and when, each less than the one before it.
    recommended: VecDeque<(Millis, u64)>,
    asked: Option<Asked>,
    /// The provider has not done as it was asked.
    failed: Option<Millis>,
}

/// A request to the provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Asked {
    at: Millis,
    from: u64,
    to: u64,
}

/// Why a function should have so many replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// It is at zero, and its next call will wake it.
    Asleep,
    /// It has more than its most, or less than its least.
    Bounds,
    /// It was not called for long enough.
    Idle,
    /// Its load over the stable window.
    Load,
    /// Its load has doubled.
    Panic,
    /// What would go stays, since it may be needed.
    Held,
}

/// What should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    pub desired: u64,
    pub reason: Reason,
    /// The provider is to be told.
    pub ask: bool,
}

impl Reason {
    /// As metrics and logs write it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Asleep => "asleep",
            Self::Bounds => "bounds",
            Self::Idle => "idle",
            Self::Load => "load",
            Self::Panic => "panic",
            Self::Held => "stabilization",
        }
    }
}

impl Memory {
    /// The provider has not done as it was asked.
    pub fn failed(&mut self, now: Millis) {
        (self.asked, self.failed) = (None, Some(now));
    }

    /// The provider was not asked after all.
    pub fn dropped(&mut self) {
        self.asked = None;
    }
}

/// Decides, and says what to remember for the next time.
pub fn decide(rules: Rules, policy: &Policy, seen: Seen, mut memory: Memory) -> (Decision, Memory) {
    if seen.wanted == 0 {
        // Waking is not done here. What was before does not matter then.
        let decision = Decision { desired: 0, reason: Reason::Asleep, ask: false };
        return (decision, Memory::default());
    }
    let (desired, reason) = match may_sleep(rules, policy, seen) {
        true => (0, Reason::Idle),
        false => by_load(rules, policy, seen, &mut memory),
    };
    let repeated = memory.asked.is_some_and(|asked| {
        (asked.from, asked.to) == (seen.wanted, desired)
            && seen.now.saturating_sub(asked.at) < ASK_AGAIN
    });
    let pausing = memory.failed.is_some_and(|at| seen.now.saturating_sub(at) < PAUSE);
    let ask = desired != seen.wanted && !repeated && !pausing;
    if ask {
        memory.asked = Some(Asked { at: seen.now, from: seen.wanted, to: desired });
    }
    (Decision { desired, reason, ask }, memory)
}

/// Whether it goes to zero: it may, and nobody has called it for long enough.
pub fn may_sleep(rules: Rules, policy: &Policy, seen: Seen) -> bool {
    let long_enough = |after| seen.quiet.is_some_and(|quiet| quiet >= after);
    rules.may_zero && !seen.busy && policy.zero_after.is_some_and(long_enough)
}

fn by_load(rules: Rules, policy: &Policy, seen: Seen, memory: &mut Memory) -> (u64, Reason) {
    let least = policy.min.max(1);
    let most = policy.max.max(least);
    let bounded = |replicas: u64| replicas.clamp(least, most);
    let wanted = bounded(seen.wanted);
    // Load that is not known changes nothing.
    let enough = |load: Option<f64>| bounded(load.map_or(wanted, |load| replicas(policy, load)));
    let (stable, sudden) = (enough(seen.stable), enough(seen.sudden));
    if seen.sudden.is_some() && sudden >= wanted.saturating_mul(2) {
        memory.panic_until = seen.now.saturating_add(rules.window);
    }
    let panicking = seen.now < memory.panic_until;
    let recommended = if panicking { stable.max(sudden) } else { stable };
    let highest = memory.recommend(seen.now, recommended, policy.down_window);
    let held = if panicking || !seen.whole { wanted } else { highest.min(wanted) };
    let desired = recommended.max(held);
    let reason = if desired == wanted && wanted != seen.wanted {
        Reason::Bounds
    } else if desired > recommended {
        Reason::Held
    } else if panicking && desired > stable {
        Reason::Panic
    } else {
        Reason::Load
    };
    (desired, reason)
}

/// So many that each has its proportion of the target at most.
fn replicas(policy: &Policy, load: f64) -> u64 {
    // A hair's breadth over a whole number is the arithmetic's, not the load's.
    const HAIR: f64 = 1e-9;
    let replicas = (load / (policy.target * policy.proportion) - HAIR).ceil();
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "what is out of range becomes the nearest that is in it"
    )]
    let whole = replicas as u64;
    whole
}

impl Memory {
    /// Notes what is recommended now; the highest within `window`, this one among them.
    fn recommend(&mut self, now: Millis, replicas: u64, window: Duration) -> u64 {
        // What is not above this one will never be the highest again.
        while self.recommended.back().is_some_and(|(_, earlier)| *earlier <= replicas) {
            self.recommended.pop_back();
        }
        self.recommended.push_back((now, replicas));
        let window = u64::try_from(window.as_millis()).unwrap_or(Millis::MAX);
        while self.recommended.front().is_some_and(|(at, _)| now.saturating_sub(*at) > window) {
            self.recommended.pop_front();
        }
        self.recommended.front().map_or(replicas, |(_, highest)| *highest)
    }
}

#[cfg(test)]
mod tests;
