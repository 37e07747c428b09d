//! Registry of existing functions and their readiness. A function is registered when the provider lists it or confirms
//! it in a response. Calls of unregistered functions count as `unknown`, so clients cannot create metric series.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use gateway_base::function::Function;
use gateway_base::sync::lock_unpoisoned;

/// Time after its last listing or confirmation at which a function and its series are removed.
pub const RETENTION: Duration = Duration::from_secs(3600);
/// Maximum entries that confirmations may create. It bounds a provider that confirms every name.
const MAX_CONFIRMED_FUNCTIONS: usize = 5_000;

/// The registered functions.
#[derive(Debug, Default)]
pub struct FunctionRegistry {
    functions: Mutex<HashMap<Function, FunctionEntry>>,
}

/// Readiness of a function. Shared by the process: every call reads it, and it is written only when it changes, which
/// is rare.
#[derive(Debug, Default)]
pub struct ReadyFlag(AtomicBool);

impl ReadyFlag {
    /// Returns whether the function had an available replica when the provider was last queried.
    pub fn is_warm(&self) -> bool {
        self.0.load(Relaxed)
    }
}

/// Entry of one function.
#[derive(Debug)]
struct FunctionEntry {
    /// Time of the last listing or confirmation; `None` if it has expired, or there was none.
    confirmed_at: Option<Instant>,
    ready: Arc<ReadyFlag>,
    /// Time of the query that set `ready`. Results of older queries are ignored.
    ready_as_of: Option<Instant>,
    /// Time of the last change of the function.
    invalidated_at: Option<Instant>,
    /// Reason of the last logged start failure.
    start_failure: Option<String>,
}

impl FunctionEntry {
    fn new(confirmed_at: Option<Instant>) -> Self {
        Self {
            confirmed_at,
            ready: Arc::default(),
            ready_as_of: None,
            invalidated_at: None,
            start_failure: None,
        }
    }

    /// Sets readiness from a query sent at `at`.
    fn set_ready(&mut self, ready: bool, at: Instant) {
        if self.ready_as_of.is_none_or(|ready_as_of| at >= ready_as_of) {
            self.ready_as_of = Some(at);
            self.ready.0.store(ready, Relaxed);
            if ready {
                self.start_failure = None;
            }
        }
    }
}

impl FunctionRegistry {
    /// Returns whether `function` is registered.
    pub fn contains(&self, function: &Function) -> bool {
        self.functions().get(function).is_some_and(|entry| entry.confirmed_at.is_some())
    }

    /// Registers `function`, which the provider has confirmed. Returns whether it is registered now.
    pub fn confirm(&self, function: &Function) -> bool {
        let mut functions = self.functions();
        let has_capacity =
            functions.len() < MAX_CONFIRMED_FUNCTIONS || functions.contains_key(function);
        if has_capacity {
            let entry =
                functions.entry(function.clone()).or_insert_with(|| FunctionEntry::new(None));
            entry.confirmed_at = Some(Instant::now());
        }
        has_capacity
    }

    /// Applies the provider's complete list, queried at `at`: each function, and whether it has an available replica.
    pub fn apply_listing(&self, listed: &HashMap<Function, bool>, at: Instant) {
        let mut functions = self.functions();
        for (function, ready) in listed {
            let entry = match functions.get_mut(function) {
                Some(entry) => entry,
                None => {
                    functions.entry(function.clone()).or_insert_with(|| FunctionEntry::new(None))
                }
            };
            entry.confirmed_at = Some(at);
            entry.set_ready(*ready, at);
        }
        functions.retain(|function, entry| {
            if !listed.contains_key(function) {
                entry.set_ready(false, at);
            }
            let confirmed_at = entry.confirmed_at;
            entry.confirmed_at = confirmed_at
                .filter(|confirmed_at| at.saturating_duration_since(*confirmed_at) < RETENTION);
            // A shard that still uses the flag must get the same one when the function is listed again.
            entry.confirmed_at.is_some() || Arc::strong_count(&entry.ready) > 1
        });
    }

    /// Returns the readiness flag of `function`.
    pub fn ready_flag(&self, function: &Function) -> Arc<ReadyFlag> {
        let mut functions = self.functions();
        let entry = functions.entry(function.clone()).or_insert_with(|| FunctionEntry::new(None));
        Arc::clone(&entry.ready)
    }

    /// Sets readiness of `function` from a query sent at `at`. Has no effect on a function without an entry.
    pub fn set_ready(&self, function: &Function, ready: bool, at: Instant) {
        if let Some(entry) = self.functions().get_mut(function) {
            entry.set_ready(ready, at);
        }
    }

    /// Records that `function` does not start, because of `reason`. Returns whether this is new: the reason differs, or
    /// the function has been ready or changed since the last record.
    pub fn record_start_failure(&self, function: &Function, reason: &str) -> bool {
        let mut functions = self.functions();
        let Some(entry) = functions.get_mut(function) else { return true };
        let is_new = entry.start_failure.as_deref() != Some(reason);
        if is_new {
            entry.start_failure = Some(reason.to_owned());
        }
        is_new
    }

    /// Clears the readiness of the functions called `name`, in any namespace, after a change. `None` clears all functions.
    pub fn invalidate(&self, name: Option<&str>) {
        let now = Instant::now();
        for (function, entry) in &mut *self.functions() {
            if name.is_none_or(|name| function.name == name) {
                entry.invalidated_at = Some(now);
                entry.start_failure = None;
                entry.set_ready(false, now);
            }
        }
    }

    /// Returns whether `function` has been invalidated since `at`.
    pub fn invalidated_since(&self, function: &Function, at: Instant) -> bool {
        let functions = self.functions();
        functions
            .get(function)
            .and_then(|entry| entry.invalidated_at)
            .is_some_and(|invalidated_at| invalidated_at >= at)
    }

    fn functions(&self) -> MutexGuard<'_, HashMap<Function, FunctionEntry>> {
        lock_unpoisoned(&self.functions)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function(name: &str) -> Function {
        Function::parse(name, "fn").unwrap()
    }

    fn list(functions: &[(&str, bool)]) -> HashMap<Function, bool> {
        functions.iter().map(|(name, ready)| (function(name), *ready)).collect()
    }

    #[test]
    fn a_deleted_function_is_removed_after_an_hour() {
        let registry = FunctionRegistry::default();
        let (echo, start) = (function("echo"), Instant::now());
        registry.apply_listing(&list(&[("echo", true)]), start);
        registry.apply_listing(&list(&[]), start + Duration::from_secs(3500));
        assert!(registry.contains(&echo));
        registry.apply_listing(&list(&[]), start + Duration::from_secs(3700));
        assert!(!registry.contains(&echo));
    }

    #[test]
    fn a_confirmation_registers_a_function() {
        let registry = FunctionRegistry::default();
        let echo = function("echo");
        assert!(!registry.contains(&echo));
        assert!(registry.confirm(&echo));
        assert!(registry.contains(&echo));
    }

    #[test]
    fn the_number_of_confirmed_functions_is_bounded() {
        let registry = FunctionRegistry::default();
        let numbered = |number: usize| function(&format!("f{number}"));
        assert!((0..MAX_CONFIRMED_FUNCTIONS).all(|number| registry.confirm(&numbered(number))));
        assert!(!registry.confirm(&numbered(MAX_CONFIRMED_FUNCTIONS)));
        assert!(!registry.contains(&numbered(MAX_CONFIRMED_FUNCTIONS)));
        assert!(registry.confirm(&numbered(0)));
    }

    #[test]
    fn readiness_follows_the_providers_list() {
        let registry = FunctionRegistry::default();
        let start = Instant::now();
        registry.apply_listing(&list(&[("echo", true), ("idle", false)]), start);
        let (echo, idle) =
            (registry.ready_flag(&function("echo")), registry.ready_flag(&function("idle")));
        assert!(echo.is_warm() && !idle.is_warm());
        registry.apply_listing(&list(&[("idle", true)]), start + Duration::from_secs(5));
        assert!(!echo.is_warm() && idle.is_warm());
    }

    #[test]
    fn a_query_before_a_change_is_ignored() {
        let registry = FunctionRegistry::default();
        let before = Instant::now();
        registry.apply_listing(&list(&[("echo", true)]), before);
        let (echo, ready) = (function("echo"), registry.ready_flag(&function("echo")));
        registry.invalidate(Some("other"));
        assert!(ready.is_warm() && !registry.invalidated_since(&echo, before));
        registry.invalidate(Some("echo"));
        assert!(!ready.is_warm() && registry.invalidated_since(&echo, before));
        registry.apply_listing(&list(&[("echo", true)]), before);
        registry.set_ready(&echo, true, before);
        assert!(!ready.is_warm());
        let after = Instant::now();
        registry.set_ready(&echo, true, after);
        assert!(
            ready.is_warm() && !registry.invalidated_since(&echo, after + Duration::from_nanos(1))
        );
        registry.invalidate(None);
        assert!(!ready.is_warm());
    }

    #[test]
    fn a_start_failure_is_new_once_until_a_start_or_a_change() {
        let (registry, start) = (FunctionRegistry::default(), Instant::now());
        let echo = function("echo");
        registry.confirm(&echo);
        assert!(registry.record_start_failure(&echo, "exit status: 1"));
        assert!(!registry.record_start_failure(&echo, "exit status: 1"));
        registry.set_ready(&echo, false, start);
        assert!(!registry.record_start_failure(&echo, "exit status: 1"));
        assert!(registry.record_start_failure(&echo, "exit status: 2"));
        registry.apply_listing(&list(&[("echo", true)]), start + Duration::from_secs(1));
        assert!(registry.record_start_failure(&echo, "exit status: 2"));
        registry.invalidate(Some("other"));
        assert!(!registry.record_start_failure(&echo, "exit status: 2"));
        registry.invalidate(Some("echo"));
        assert!(registry.record_start_failure(&echo, "exit status: 2"));
    }

    #[test]
    fn a_function_that_is_listed_again_keeps_its_flag() {
        let registry = FunctionRegistry::default();
        let start = Instant::now();
        registry.apply_listing(&list(&[("echo", true)]), start);
        let ready = registry.ready_flag(&function("echo"));
        registry.apply_listing(&list(&[]), start + Duration::from_secs(3700));
        assert!(!registry.contains(&function("echo")) && !ready.is_warm());
        registry.apply_listing(&list(&[("echo", true)]), start + Duration::from_secs(3800));
        assert!(ready.is_warm());
    }
}
