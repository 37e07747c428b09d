//! The current credentials and those that they replaced. No I/O.
//!
//! A changed Secret reaches the pods of a cluster at different times, up to two minutes apart. Until a provider has
//! loaded the change, it accepts only the previous credentials; until this process has, it sends them. So previous
//! credentials are kept for a while, but only between gateway and provider: clients of the API need the current ones
//! immediately.

use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderValue;
use subtle::ConstantTimeEq;

/// Time for which replaced credentials are tried with a provider that rejects the current ones. A provider that reads
/// its files only at its start must be restarted in this time.
pub(super) const OFFERED: Duration = Duration::from_secs(3600);
/// Time for which the process provider accepts replaced credentials.
pub(super) const ACCEPTED: Duration = Duration::from_secs(300);
/// Maximum replaced credentials that are kept.
const MOST_REPLACED: usize = 3;

/// User and password.
pub(super) struct Pair {
    /// `user:password`
    plain: String,
    header: HeaderValue,
}

/// All known credentials.
#[derive(Clone)]
pub(super) struct Pairs {
    current: Arc<Pair>,
    /// Newest first, with the time of the replacement.
    replaced: Vec<(Arc<Pair>, Instant)>,
    /// The one of `replaced` that the provider accepts while it rejects the current one.
    preferred: Option<Arc<Pair>>,
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.plain == other.plain
    }
}

impl Pair {
    /// Returns `None` if they have characters that are not allowed in a header.
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

    /// Constant time for wrong credentials of the same length.
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

    /// Returns whether `given` is the current pair.
    pub(super) fn admit(&self, given: &[u8]) -> bool {
        self.current.is(given)
    }

    /// Returns whether `given` is the current pair, or one replaced less than [`REPLACED_ACCEPT_PERIOD`] ago.
    pub(super) fn admit_recent(&self, given: &[u8], now: Instant) -> bool {
        let recent = self.replaced.iter().filter(|(_, at)| now.duration_since(*at) < ACCEPTED);
        // Compares with each of them, so that the duration does not reveal which one matched.
        recent.fold(self.admit(given), |admitted, (pair, _)| admitted | pair.is(given))
    }

    /// Returns the credentials to try with a provider: the one it accepted last, then the current one, then the
    /// replaced ones.
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

    /// Returns the set with `pair` as the current credentials.
    pub(super) fn changed_to(&self, pair: &Arc<Pair>, now: Instant) -> Self {
        let mut replaced = vec![(Arc::clone(&self.current), now)];
        replaced.extend(self.replaced.iter().filter(|(old, _)| old != pair).cloned());
        replaced.truncate(MOST_REPLACED);
        Self { current: Arc::clone(pair), replaced, preferred: None }
    }

    /// Returns the set without expired credentials; `None` if none has expired.
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

    /// Returns whether the provider accepts only replaced credentials.
    pub(super) fn is_behind(&self) -> bool {
        self.preferred.is_some()
    }

    /// Returns the set after a provider has accepted `pair`; `None` if it does not change.
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
    fn replaced_credentials_are_tried_for_an_hour_and_accepted_for_five_minutes() {
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
    fn the_last_accepted_credentials_are_tried_first() {
        let start = Instant::now();
        let pairs = changed("old", "new", start);
        let [new, old] = pairs.offered(start).try_into().ok().unwrap();
        assert!(pairs.accepted(&new).is_none() && !pairs.is_behind());
        let behind = pairs.accepted(&old).unwrap();
        assert!(behind.is_behind() && behind.accepted(&old).is_none());
        assert_eq!(offered(&behind, start), ["old", "new"]);
        // Expired credentials are not preferred.
        assert_eq!(offered(&behind, start + OFFERED), ["new"]);
        assert!(!behind.without_old(start + OFFERED).unwrap().is_behind());
        assert_eq!(offered(&behind.accepted(&new).unwrap(), start), ["new", "old"]);
        assert_eq!(offered(&behind.changed_to(&pair("3"), start), start), ["3", "new", "old"]);
    }

    #[test]
    fn credentials_are_distinct_and_bounded_in_number() {
        let start = Instant::now();
        let pairs = changed("a", "b", start).changed_to(&pair("a"), start);
        assert_eq!(offered(&pairs, start), ["a", "b"]);
        let many = (0..9).fold(pairs, |pairs, n| pairs.changed_to(&pair(&n.to_string()), start));
        assert_eq!(offered(&many, start), ["8", "7", "6", "5"]);
    }
}
