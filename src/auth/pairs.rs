//! The credentials that hold, and those that they replaced. No I/O.
//!
//! A changed Secret reaches the pods of a cluster at different times, up to two minutes apart. Until a provider has read
//! the change it accepts the previous credentials alone; until this process has, it sends them itself. So the previous
//! ones are kept for a while, and only between gateway and provider: clients of the API need the current ones at once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderValue;
use subtle::ConstantTimeEq;

/// For so long replaced credentials are offered to a provider that refuses the current ones. One that reads its files
/// only when it starts must be restarted by then.
pub(super) const OFFERED: Duration = Duration::from_secs(3600);
/// For so long our own provider accepts replaced credentials.
pub(super) const ACCEPTED: Duration = Duration::from_secs(300);
/// Replaced credentials that are kept, however fast they change.
const MOST_REPLACED: usize = 3;

/// User and password.
pub(super) struct Pair {
    /// `user:password`
    plain: String,
    header: HeaderValue,
}

/// All pairs that are known.
#[derive(Clone)]
pub(super) struct Pairs {
    current: Arc<Pair>,
    /// The newest first, each with the time at which it was replaced.
    replaced: Vec<(Arc<Pair>, Instant)>,
    /// The one of `replaced` that the provider accepts, as long as it refuses the current one.
    preferred: Option<Arc<Pair>>,
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.plain == other.plain
    }
}

impl Pair {
    /// `None` if no header can hold the two.
    pub(super) fn new(user: &str, password: &str) -> Option<Self> {
        let plain = format!("{user}:{password}");
        let header = HeaderValue::from_str(&format!("Basic {}", STANDARD.encode(&plain)));
        let mut header = header.ok()?;
        header.set_sensitive(true);
        Some(Self { plain, header })
    }

    pub(super) fn header(&self) -> &HeaderValue {
        &self.header
    }

    /// Takes the same time for all wrong ones of one length.
    fn is(&self, given: &[u8]) -> bool {
        bool::from(given.ct_eq(self.plain.as_bytes()))
    }
}

impl Pairs {
    pub(super) fn new(current: Pair) -> Self {
        Self { current: Arc::new(current), replaced: Vec::new(), preferred: None }
    }

    pub(super) fn current(&self) -> &Arc<Pair> {
        &self.current
    }

    /// Whether `given` is the current pair.
    pub(super) fn admit(&self, given: &[u8]) -> bool {
        self.current.is(given)
    }

    /// Whether `given` is the current pair, or one that was replaced less than [`ACCEPTED`] ago.
    pub(super) fn admit_recent(&self, given: &[u8], now: Instant) -> bool {
        let recent = self.replaced.iter().filter(|(_, at)| now.duration_since(*at) < ACCEPTED);
        // Each is compared, so that the time says nothing about which one it was.
        recent.fold(self.admit(given), |admitted, (pair, _)| admitted | pair.is(given))
    }

    /// What is to be sent to a provider: what it accepted last, then the current pair, then the replaced ones.
    pub(super) fn offered(&self, now: Instant) -> Vec<Arc<Pair>> {
        let mut offered = Vec::with_capacity(1 + self.replaced.len());
        let kept = self.replaced.iter().filter(|(_, at)| now.duration_since(*at) < OFFERED);
        let kept: Vec<_> = kept.map(|(pair, _)| pair).collect();
        offered.extend(self.preferred.iter().filter(|pair| kept.contains(pair)).cloned());
        for pair in std::iter::once(&self.current).chain(kept) {
            if !offered.contains(pair) {
                offered.push(Arc::clone(pair));
            }
        }
        offered
    }

    /// The same pairs once the files have `pair`.
    pub(super) fn changed_to(&self, pair: &Arc<Pair>, now: Instant) -> Self {
        let mut replaced = vec![(Arc::clone(&self.current), now)];
        replaced.extend(self.replaced.iter().filter(|(old, _)| old != pair).cloned());
        replaced.truncate(MOST_REPLACED);
        Self { current: Arc::clone(pair), replaced, preferred: None }
    }

    /// The same pairs without those that nobody is offered any more; `None` if none is to go.
    pub(super) fn without_old(&self, now: Instant) -> Option<Self> {
        let is_kept = |(_, at): &(_, Instant)| now.duration_since(*at) < OFFERED;
        if self.replaced.iter().all(is_kept) {
            return None;
        }
        let replaced: Vec<_> = self.replaced.iter().filter(|&old| is_kept(old)).cloned().collect();
        let preferred = self.preferred.clone();
        let preferred = preferred.filter(|pair| replaced.iter().any(|(kept, _)| kept == pair));
        Some(Self { current: Arc::clone(&self.current), replaced, preferred })
    }

    /// Whether a provider accepts a replaced pair only.
    pub(super) fn is_behind(&self) -> bool {
        self.preferred.is_some()
    }

    /// The same pairs once a provider has accepted `pair`; `None` if nothing changes by that.
    pub(super) fn accepted(&self, pair: &Arc<Pair>) -> Option<Self> {
        let is_known = self.replaced.iter().any(|(replaced, _)| replaced == pair);
        let preferred = Some(pair).filter(|pair| **pair != self.current && is_known);
        (preferred != self.preferred.as_ref())
            .then(|| Self { preferred: preferred.cloned(), ..self.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(password: &str) -> Arc<Pair> {
        Arc::new(Pair::new("admin", password).unwrap())
    }

    fn changed(first: &str, second: &str, at: Instant) -> Pairs {
        Pairs::new(Pair::new("admin", first).unwrap()).changed_to(&pair(second), at)
    }

    fn offered(pairs: &Pairs, now: Instant) -> Vec<String> {
        pairs.offered(now).iter().map(|pair| pair.plain.replace("admin:", "")).collect()
    }

    fn after(start: Instant, time: Duration) -> Instant {
        start + time - Duration::from_nanos(1)
    }

    #[test]
    fn replaced_pairs_are_offered_for_an_hour_and_accepted_for_five_minutes() {
        let start = Instant::now();
        let pairs = changed("old", "new", start);
        assert!(pairs.admit(b"admin:new") && !pairs.admit(b"admin:old"));
        for (time, holds) in [(ACCEPTED, true), (ACCEPTED + Duration::from_nanos(1), false)] {
            assert_eq!(pairs.admit_recent(b"admin:old", after(start, time)), holds);
        }
        assert!(pairs.admit_recent(b"admin:new", start + 2 * OFFERED));
        assert!(!pairs.admit_recent(b"admin:older", start));
        assert_eq!(offered(&pairs, after(start, OFFERED)), ["new", "old"]);
        assert_eq!(offered(&pairs, start + OFFERED), ["new"]);
        assert!(pairs.without_old(after(start, OFFERED)).is_none());
        assert!(pairs.without_old(start + OFFERED).unwrap().replaced.is_empty());
    }

    #[test]
    fn what_was_accepted_last_is_offered_first() {
        let start = Instant::now();
        let pairs = changed("old", "new", start);
        let [new, old] = pairs.offered(start).try_into().ok().unwrap();
        assert!(pairs.accepted(&new).is_none() && !pairs.is_behind());
        let behind = pairs.accepted(&old).unwrap();
        assert!(behind.is_behind() && behind.accepted(&old).is_none());
        assert_eq!(offered(&behind, start), ["old", "new"]);
        // A pair that is not kept any more is not preferred either.
        assert_eq!(offered(&behind, start + OFFERED), ["new"]);
        assert!(!behind.without_old(start + OFFERED).unwrap().is_behind());
        assert_eq!(offered(&behind.accepted(&new).unwrap(), start), ["new", "old"]);
        assert_eq!(offered(&behind.changed_to(&pair("3"), start), start), ["3", "new", "old"]);
    }

    #[test]
    fn a_pair_that_comes_back_is_there_once_and_few_are_kept() {
        let start = Instant::now();
        let pairs = changed("a", "b", start).changed_to(&pair("a"), start);
        assert_eq!(offered(&pairs, start), ["a", "b"]);
        let many = (0..9).fold(pairs, |pairs, n| pairs.changed_to(&pair(&n.to_string()), start));
        assert_eq!(offered(&many, start), ["8", "7", "6", "5"]);
    }
}
