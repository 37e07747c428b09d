//! Registry of existing functions and their readiness. A function is registered when the provider lists it or confirms
//! it in a response. Calls of unregistered functions count as `unknown`, so clients cannot create metric series.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::function::Function;

/// Time after its last listing or confirmation at which a function and its series are removed.
pub const FORGOTTEN_AFTER: Duration = Duration::from_secs(3600);
/// Maximum entries that confirmations may create. It bounds a provider that confirms every name.
const MAX_LEARNT: usize = 5_000;

/// The registered functions.
#[derive(Debug, Default)]
pub struct Known {
    functions: Mutex<HashMap<Function, Seen>>,
}

/// Readiness of a function. Shared by the process: every call reads it, and it is written only when it changes, which
/// is rare.
#[derive(Debug, Default)]
pub struct Warm(AtomicBool);

impl Warm {
    /// Returns whether the function had an available replica when the provider was last queried.
    pub fn is_warm(&self) -> bool {
        self.0.load(Relaxed)
    }
}

/// Entry of one function.
#[derive(Debug)]
struct Seen {
    /// Time of the last listing or confirmation; `None` if it has expired, or there was none.
    last: Option<Instant>,
    warm: Arc<Warm>,
    /// Time of the query that set `ready`. Results of older queries are ignored.
    as_of: Option<Instant>,
    /// Time of the last change of the function.
    changed: Option<Instant>,
    /// Reason of the last logged start failure.
    failure: Option<String>,
}

impl Seen {
    fn new(last: Option<Instant>) -> Self {
        Self { last, warm: Arc::default(), as_of: None, changed: None, failure: None }
    }

    /// Sets readiness from a query sent at `at`.
    fn found(&mut self, warm: bool, at: Instant) {
        if self.as_of.is_none_or(|as_of| at >= as_of) {
            self.as_of = Some(at);
            self.warm.0.store(warm, Relaxed);
            if warm {
                self.failure = None;
            }
        }
    }
}

impl Known {
    pub fn contains(&self, function: &Function) -> bool {
        self.functions().get(function).is_some_and(|seen| seen.last.is_some())
    }

    /// Registers `function`, which the provider has confirmed. Returns whether it is registered now.
    pub fn learn(&self, function: &Function) -> bool {
        let mut functions = self.functions();
        let has_room = functions.len() < MAX_LEARNT || functions.contains_key(function);
        if has_room {
            let seen = functions.entry(function.clone()).or_insert_with(|| Seen::new(None));
            seen.last = Some(Instant::now());
        }
        has_room
    }

    /// Applies the provider's complete list, queried at `at`: each function, and whether it has an available replica.
    pub fn listed(&self, listed: &HashMap<Function, bool>, at: Instant) {
        let mut functions = self.functions();
        for (function, warm) in listed {
            let seen = match functions.get_mut(function) {
                Some(seen) => seen,
                None => functions.entry(function.clone()).or_insert_with(|| Seen::new(None)),
            };
            seen.last = Some(at);
            seen.found(*warm, at);
        }
        functions.retain(|function, seen| {
            if !listed.contains_key(function) {
                seen.found(false, at);
            }
            let last = seen.last;
            seen.last = last.filter(|last| at.saturating_duration_since(*last) < FORGOTTEN_AFTER);
            // A shard that still uses the flag must get the same one when the function is listed again.
            seen.last.is_some() || Arc::strong_count(&seen.warm) > 1
        });
    }

    /// Returns the readiness flag of `function`.
    pub fn warm(&self, function: &Function) -> Arc<Warm> {
        let mut functions = self.functions();
        let seen = functions.entry(function.clone()).or_insert_with(|| Seen::new(None));
        Arc::clone(&seen.warm)
    }

    /// Sets readiness of `function` from a query sent at `at`. Has no effect on a function without an entry.
    pub fn found(&self, function: &Function, warm: bool, at: Instant) {
        if let Some(seen) = self.functions().get_mut(function) {
            seen.found(warm, at);
        }
    }

    /// Records that `function` does not start, because of `reason`. Returns whether this is new: the reason differs, or
    /// the function has been ready or changed since the last record.
    pub fn does_not_start(&self, function: &Function, reason: &str) -> bool {
        let mut functions = self.functions();
        let Some(seen) = functions.get_mut(function) else { return true };
        let is_news = seen.failure.as_deref() != Some(reason);
        if is_news {
            seen.failure = Some(reason.to_owned());
        }
        is_news
    }

    /// Clears the readiness of the functions called `name`, in any namespace, or of all functions without a name: they
    /// have just been changed.
    pub fn changed(&self, name: Option<&str>) {
        let now = Instant::now();
        for (function, seen) in &mut *self.functions() {
            if name.is_none_or(|name| function.name == name) {
                seen.changed = Some(now);
                seen.failure = None;
                seen.found(false, now);
            }
        }
    }

    /// Returns whether `function` has been invalidated since `at`.
    pub fn changed_since(&self, function: &Function, at: Instant) -> bool {
        let functions = self.functions();
        functions.get(function).and_then(|seen| seen.changed).is_some_and(|changed| changed >= at)
    }

    fn functions(&self) -> MutexGuard<'_, HashMap<Function, Seen>> {
        self.functions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(name: &str) -> Function {
        Function::parse(name, "fn").unwrap()
    }

    fn list(functions: &[(&str, bool)]) -> HashMap<Function, bool> {
        functions.iter().map(|(name, warm)| (function(name), *warm)).collect()
    }

    #[test]
    fn a_deleted_function_is_removed_after_an_hour() {
        let known = Known::default();
        let (echo, start) = (function("echo"), Instant::now());
        known.listed(&list(&[("echo", true)]), start);
        known.listed(&list(&[]), start + Duration::from_secs(3500));
        assert!(known.contains(&echo));
        known.listed(&list(&[]), start + Duration::from_secs(3700));
        assert!(!known.contains(&echo));
    }

    #[test]
    fn a_confirmation_registers_a_function() {
        let known = Known::default();
        let echo = function("echo");
        assert!(!known.contains(&echo));
        assert!(known.learn(&echo));
        assert!(known.contains(&echo));
    }

    #[test]
    fn the_number_of_confirmed_functions_is_bounded() {
        let known = Known::default();
        let numbered = |number: usize| function(&format!("f{number}"));
        assert!((0..MAX_LEARNT).all(|number| known.learn(&numbered(number))));
        assert!(!known.learn(&numbered(MAX_LEARNT)));
        assert!(!known.contains(&numbered(MAX_LEARNT)));
        assert!(known.learn(&numbered(0)));
    }

    #[test]
    fn readiness_follows_the_providers_list() {
        let known = Known::default();
        let start = Instant::now();
        known.listed(&list(&[("echo", true), ("idle", false)]), start);
        let (echo, idle) = (known.warm(&function("echo")), known.warm(&function("idle")));
        assert!(echo.is_warm() && !idle.is_warm());
        known.listed(&list(&[("idle", true)]), start + Duration::from_secs(5));
        assert!(!echo.is_warm() && idle.is_warm());
    }

    #[test]
    fn a_query_before_a_change_is_ignored() {
        let known = Known::default();
        let before = Instant::now();
        known.listed(&list(&[("echo", true)]), before);
        let (echo, warm) = (function("echo"), known.warm(&function("echo")));
        known.changed(Some("other"));
        assert!(warm.is_warm() && !known.changed_since(&echo, before));
        known.changed(Some("echo"));
        assert!(!warm.is_warm() && known.changed_since(&echo, before));
        known.listed(&list(&[("echo", true)]), before);
        known.found(&echo, true, before);
        assert!(!warm.is_warm());
        let after = Instant::now();
        known.found(&echo, true, after);
        assert!(warm.is_warm() && !known.changed_since(&echo, after + Duration::from_nanos(1)));
        known.changed(None);
        assert!(!warm.is_warm());
    }

    #[test]
    fn a_start_failure_is_new_once_until_a_start_or_a_change() {
        let (known, start) = (Known::default(), Instant::now());
        let echo = function("echo");
        known.learn(&echo);
        assert!(known.does_not_start(&echo, "exit status: 1"));
        assert!(!known.does_not_start(&echo, "exit status: 1"));
        known.found(&echo, false, start);
        assert!(!known.does_not_start(&echo, "exit status: 1"));
        assert!(known.does_not_start(&echo, "exit status: 2"));
        known.listed(&list(&[("echo", true)]), start + Duration::from_secs(1));
        assert!(known.does_not_start(&echo, "exit status: 2"));
        known.changed(Some("other"));
        assert!(!known.does_not_start(&echo, "exit status: 2"));
        known.changed(Some("echo"));
        assert!(known.does_not_start(&echo, "exit status: 2"));
    }

    #[test]
    fn a_function_that_is_listed_again_keeps_its_flag() {
        let known = Known::default();
        let start = Instant::now();
        known.listed(&list(&[("echo", true)]), start);
        let warm = known.warm(&function("echo"));
        known.listed(&list(&[]), start + Duration::from_secs(3700));
        assert!(!known.contains(&function("echo")) && !warm.is_warm());
        known.listed(&list(&[("echo", true)]), start + Duration::from_secs(3800));
        assert!(warm.is_warm());
    }
}
