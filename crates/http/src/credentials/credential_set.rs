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
pub(super) const REPLACED_OFFER_PERIOD: Duration = Duration::from_secs(3600);
/// Time for which the process provider accepts replaced credentials.
pub(super) const REPLACED_ACCEPT_PERIOD: Duration = Duration::from_secs(300);
/// Maximum replaced credentials that are kept.
const MAX_REPLACED: usize = 3;

/// User and password.
pub(super) struct BasicCredentials {
    /// `user:password`
    user_password: String,
    header: HeaderValue,
}

/// All known credentials.
#[derive(Clone)]
pub(super) struct CredentialSet {
    current: Arc<BasicCredentials>,
    /// Newest first, with the time of the replacement.
    replaced: Vec<(Arc<BasicCredentials>, Instant)>,
    /// The one of `replaced` that the provider accepts while it rejects the current one.
    preferred: Option<Arc<BasicCredentials>>,
}

impl PartialEq for BasicCredentials {
    fn eq(&self, other: &Self) -> bool {
        self.user_password == other.user_password
    }
}

impl BasicCredentials {
    /// Returns `None` if they have characters that are not allowed in a header.
    pub(super) fn new(user: &str, password: &str) -> Option<Self> {
        let user_password = format!("{user}:{password}");
        let header = HeaderValue::from_str(&format!("Basic {}", STANDARD.encode(&user_password)));
        let mut header = header.ok()?;
        header.set_sensitive(true);
        Some(Self { user_password, header })
    }

    pub(super) fn header(&self) -> &HeaderValue {
        &self.header
    }

    /// Constant time for wrong credentials of the same length.
    fn matches(&self, given: &[u8]) -> bool {
        bool::from(given.ct_eq(self.user_password.as_bytes()))
    }
}

impl CredentialSet {
    pub(super) fn new(current: BasicCredentials) -> Self {
        Self { current: Arc::new(current), replaced: Vec::new(), preferred: None }
    }

    pub(super) fn current(&self) -> &Arc<BasicCredentials> {
        &self.current
    }

    /// Returns whether `given` is the current pair.
    pub(super) fn verify(&self, given: &[u8]) -> bool {
        self.current.matches(given)
    }

    /// Returns whether `given` is the current pair, or one replaced less than [`REPLACED_ACCEPT_PERIOD`] ago.
    pub(super) fn verify_recent(&self, given: &[u8], now: Instant) -> bool {
        let recent =
            self.replaced.iter().filter(|(_, at)| now.duration_since(*at) < REPLACED_ACCEPT_PERIOD);
        // Compares with each of them, so that the duration does not reveal which one matched.
        recent.fold(self.verify(given), |verified, (pair, _)| verified | pair.matches(given))
    }

    /// Returns the credentials to try with a provider: the one it accepted last, then the current one, then the
    /// replaced ones.
    pub(super) fn candidates(&self, now: Instant) -> Vec<Arc<BasicCredentials>> {
        let mut candidates = Vec::with_capacity(1 + self.replaced.len());
        let kept =
            self.replaced.iter().filter(|(_, at)| now.duration_since(*at) < REPLACED_OFFER_PERIOD);
        let kept: Vec<_> = kept.map(|(pair, _)| pair).collect();
        candidates.extend(self.preferred.iter().filter(|pair| kept.contains(pair)).cloned());
        for pair in std::iter::once(&self.current).chain(kept) {
            if !candidates.contains(pair) {
                candidates.push(Arc::clone(pair));
            }
        }
        candidates
    }

    /// Returns the set with `pair` as the current credentials.
    pub(super) fn with_current(&self, pair: &Arc<BasicCredentials>, now: Instant) -> Self {
        let mut replaced = vec![(Arc::clone(&self.current), now)];
        replaced.extend(self.replaced.iter().filter(|(old, _)| old != pair).cloned());
        replaced.truncate(MAX_REPLACED);
        Self { current: Arc::clone(pair), replaced, preferred: None }
    }

    /// Returns the set without expired credentials; `None` if none has expired.
    pub(super) fn without_expired(&self, now: Instant) -> Option<Self> {
        let is_kept = |(_, at): &(_, Instant)| now.duration_since(*at) < REPLACED_OFFER_PERIOD;
        if self.replaced.iter().all(is_kept) {
            return None;
        }
        let replaced: Vec<_> = self.replaced.iter().filter(|&old| is_kept(old)).cloned().collect();
        let preferred = self.preferred.clone();
        let preferred = preferred.filter(|pair| replaced.iter().any(|(kept, _)| kept == pair));
        Some(Self { current: Arc::clone(&self.current), replaced, preferred })
    }

    /// Returns whether the provider accepts only replaced credentials.
    pub(super) fn prefers_replaced(&self) -> bool {
        self.preferred.is_some()
    }

    /// Returns the set after a provider has accepted `pair`; `None` if it does not change.
    pub(super) fn with_accepted(&self, pair: &Arc<BasicCredentials>) -> Option<Self> {
        let is_known = self.replaced.iter().any(|(replaced, _)| replaced == pair);
        let preferred = Some(pair).filter(|pair| **pair != self.current && is_known);
        (preferred != self.preferred.as_ref())
            .then(|| Self { preferred: preferred.cloned(), ..self.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(password: &str) -> Arc<BasicCredentials> {
        Arc::new(BasicCredentials::new("admin", password).unwrap())
    }

    fn changed(first: &str, second: &str, at: Instant) -> CredentialSet {
        CredentialSet::new(BasicCredentials::new("admin", first).unwrap())
            .with_current(&pair(second), at)
    }

    fn candidates(set: &CredentialSet, now: Instant) -> Vec<String> {
        set.candidates(now).iter().map(|pair| pair.user_password.replace("admin:", "")).collect()
    }

    fn after(start: Instant, time: Duration) -> Instant {
        start + time - Duration::from_nanos(1)
    }

    #[test]
    fn replaced_credentials_are_tried_for_an_hour_and_accepted_for_five_minutes() {
        let start = Instant::now();
        let set = changed("old", "new", start);
        assert!(set.verify(b"admin:new") && !set.verify(b"admin:old"));
        for (time, holds) in [
            (REPLACED_ACCEPT_PERIOD, true),
            (REPLACED_ACCEPT_PERIOD + Duration::from_nanos(1), false),
        ] {
            assert_eq!(set.verify_recent(b"admin:old", after(start, time)), holds);
        }
        assert!(set.verify_recent(b"admin:new", start + 2 * REPLACED_OFFER_PERIOD));
        assert!(!set.verify_recent(b"admin:older", start));
        assert_eq!(candidates(&set, after(start, REPLACED_OFFER_PERIOD)), ["new", "old"]);
        assert_eq!(candidates(&set, start + REPLACED_OFFER_PERIOD), ["new"]);
        assert!(set.without_expired(after(start, REPLACED_OFFER_PERIOD)).is_none());
        assert!(set.without_expired(start + REPLACED_OFFER_PERIOD).unwrap().replaced.is_empty());
    }

    #[test]
    fn the_last_accepted_credentials_are_tried_first() {
        let start = Instant::now();
        let set = changed("old", "new", start);
        let [new, old] = set.candidates(start).try_into().ok().unwrap();
        assert!(set.with_accepted(&new).is_none() && !set.prefers_replaced());
        let behind = set.with_accepted(&old).unwrap();
        assert!(behind.prefers_replaced() && behind.with_accepted(&old).is_none());
        assert_eq!(candidates(&behind, start), ["old", "new"]);
        // Expired credentials are not preferred.
        assert_eq!(candidates(&behind, start + REPLACED_OFFER_PERIOD), ["new"]);
        assert!(!behind.without_expired(start + REPLACED_OFFER_PERIOD).unwrap().prefers_replaced());
        assert_eq!(candidates(&behind.with_accepted(&new).unwrap(), start), ["new", "old"]);
        assert_eq!(candidates(&behind.with_current(&pair("3"), start), start), ["3", "new", "old"]);
    }

    #[test]
    fn credentials_are_distinct_and_bounded_in_number() {
        let start = Instant::now();
        let set = changed("a", "b", start).with_current(&pair("a"), start);
        assert_eq!(candidates(&set, start), ["a", "b"]);
        let many = (0..9).fold(set, |set, n| set.with_current(&pair(&n.to_string()), start));
        assert_eq!(candidates(&many, start), ["8", "7", "6", "5"]);
    }
}
