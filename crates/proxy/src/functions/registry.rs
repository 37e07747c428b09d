//! Registry of existing functions, and what is known about each. A function is registered when the provider lists it or
//! confirms it in a response. Calls of unregistered functions count as `unknown`, so clients cannot create metric
//! series.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;

use crate::functions::policy::{FunctionPolicy, InvalidValue, PREFIX, Values};
use gateway_base::function::Function;
use gateway_base::sync::lock_unpoisoned;
use gateway_provider::types::FunctionSummary;

/// Time after its last listing or confirmation at which a function and its series are removed.
pub const RETENTION: Duration = Duration::from_secs(3600);
/// Maximum entries that confirmations may create. It bounds a provider that confirms every name.
const MAX_CONFIRMED_FUNCTIONS: usize = 5_000;

/// The registered functions.
#[derive(Debug, Default)]
pub struct FunctionRegistry {
    /// A leaf. It is locked under several others, so nothing may be locked under it. A call of a known function does
    /// not lock it.
    functions: Mutex<HashMap<Function, FunctionEntry>>,
}

/// What is known about a function. Shared by all threads, and by all calls of the function.
pub type FunctionHandle = Arc<FunctionState>;

/// State of a function. Every call reads it; it is written only when it changes, which is rare.
#[derive(Debug)]
pub struct FunctionState {
    pub function: Function,
    /// `function_name`: name and namespace.
    pub label: Arc<str>,
    ready: AtomicBool,
    policy: ArcSwapOption<FunctionPolicy>,
}

impl FunctionState {
    /// Creates the state of a function about which nothing is known.
    pub fn new(function: Function) -> FunctionHandle {
        let label = function.to_string().into();
        let (ready, policy) = (AtomicBool::new(false), ArcSwapOption::empty());
        Arc::new(Self { function, label, ready, policy })
    }

    /// Returns whether the function had an available replica when the provider was last queried.
    pub fn is_ready(&self) -> bool {
        self.ready.load(Relaxed)
    }

    /// Returns the policies of the function; `None` until the provider has reported its labels and annotations.
    pub fn policy(&self) -> Option<Arc<FunctionPolicy>> {
        self.policy.load_full()
    }
}

/// Entry of one function.
#[derive(Debug)]
struct FunctionEntry {
    /// Time of the last listing or confirmation; `None` if it has expired, or there was none.
    confirmed_at: Option<Instant>,
    handle: FunctionHandle,
    /// Labels and annotations that the policies were read from.
    policy_source: Option<[Values; 2]>,
    /// Time of the query that set the readiness. Results of older queries are ignored.
    ready_as_of: Option<Instant>,
    /// Time of the last change of the function.
    invalidated_at: Option<Instant>,
    /// Reason of the last logged start failure.
    start_failure: Option<String>,
}

impl FunctionEntry {
    fn new(function: &Function) -> Self {
        Self {
            confirmed_at: None,
            handle: FunctionState::new(function.clone()),
            policy_source: None,
            ready_as_of: None,
            invalidated_at: None,
            start_failure: None,
        }
    }

    /// Sets readiness from a query sent at `at`.
    fn set_ready(&mut self, ready: bool, at: Instant) {
        if self.ready_as_of.is_none_or(|ready_as_of| at >= ready_as_of) {
            self.ready_as_of = Some(at);
            self.handle.ready.store(ready, Relaxed);
            if ready {
                self.start_failure = None;
            }
        }
    }

    /// Reads the policies of the function, if its labels or annotations have changed. Returns the invalid values of a
    /// change.
    fn set_policy(&mut self, summary: &FunctionSummary) -> Vec<InvalidValue> {
        let values = [&summary.labels, &summary.annotations];
        let is_same = |old: &[Values; 2]| {
            let pairs = old.iter().zip(values);
            pairs.into_iter().all(|(old, new)| old.iter().eq(known_values(new.as_ref())))
        };
        if self.policy_source.as_ref().is_some_and(is_same) {
            return Vec::new();
        }
        let [labels, annotations] = values.map(|values| {
            let values = known_values(values.as_ref());
            values.map(|(name, value)| (name.clone(), value.clone())).collect::<Values>()
        });
        let (policy, invalid) = FunctionPolicy::parse(&labels, &annotations);
        self.handle.policy.store(Some(Arc::new(policy)));
        self.policy_source = Some([labels, annotations]);
        invalid
    }
}

/// Returns the values whose names have a meaning for the gateway.
fn known_values(values: Option<&Values>) -> impl Iterator<Item = (&String, &String)> {
    values.into_iter().flatten().filter(|(name, _)| name.starts_with(PREFIX))
}

fn log_invalid(function: &Function, invalid: &[InvalidValue]) {
    for InvalidValue { kind, name, value, expected, fallback } in invalid {
        tracing::warn!(
            function = %function, label = name, value,
            "{kind} {name} of {function} is {value:?}, expected {expected}: using {fallback}"
        );
    }
}

impl FunctionRegistry {
    /// Returns whether `function` is registered.
    pub fn contains(&self, function: &Function) -> bool {
        self.functions().get(function).is_some_and(|entry| entry.confirmed_at.is_some())
    }

    /// Registers `function`, which the provider has confirmed. Returns whether it is registered now.
    pub fn confirm(&self, function: &Function) -> bool {
        self.confirm_in(&mut self.functions(), function).is_some()
    }

    fn confirm_in<'a>(
        &self,
        functions: &'a mut HashMap<Function, FunctionEntry>,
        function: &Function,
    ) -> Option<&'a mut FunctionEntry> {
        if functions.len() >= MAX_CONFIRMED_FUNCTIONS && !functions.contains_key(function) {
            return None;
        }
        let entry =
            functions.entry(function.clone()).or_insert_with(|| FunctionEntry::new(function));
        entry.confirmed_at = Some(Instant::now());
        Some(entry)
    }

    /// Applies the provider's complete list, queried at `at`.
    pub fn apply_listing(&self, listed: &BTreeMap<Function, &FunctionSummary>, at: Instant) {
        let mut invalid = Vec::new();
        let mut functions = self.functions();
        for (function, summary) in listed {
            let entry = match functions.get_mut(function) {
                Some(entry) => entry,
                None => functions
                    .entry(function.clone())
                    .or_insert_with(|| FunctionEntry::new(function)),
            };
            entry.confirmed_at = Some(at);
            entry.set_ready(summary.available_replicas > 0, at);
            let values = entry.set_policy(summary);
            if !values.is_empty() {
                invalid.push((function, values));
            }
        }
        functions.retain(|function, entry| {
            if !listed.contains_key(function) {
                entry.set_ready(false, at);
            }
            let confirmed_at = entry.confirmed_at;
            entry.confirmed_at = confirmed_at
                .filter(|confirmed_at| at.saturating_duration_since(*confirmed_at) < RETENTION);
            // A shard that still uses the handle must get the same one when the function is listed again.
            entry.confirmed_at.is_some() || Arc::strong_count(&entry.handle) > 1
        });
        drop(functions);
        invalid.iter().for_each(|(function, values)| log_invalid(function, values));
    }

    /// Registers `function`, which the provider has described. Returns its policies.
    pub fn record_status(
        &self,
        function: &Function,
        summary: &FunctionSummary,
    ) -> Arc<FunctionPolicy> {
        let mut functions = self.functions();
        let Some(entry) = self.confirm_in(&mut functions, function) else {
            drop(functions);
            let mut entry = FunctionEntry::new(function);
            entry.set_policy(summary);
            return entry.handle.policy().unwrap_or_default();
        };
        let invalid = entry.set_policy(summary);
        let policy = entry.handle.policy().unwrap_or_default();
        drop(functions);
        log_invalid(function, &invalid);
        policy
    }

    /// Returns the policies of `function`; `None` until the provider has reported its labels and annotations.
    pub fn policy(&self, function: &Function) -> Option<Arc<FunctionPolicy>> {
        self.functions().get(function)?.handle.policy()
    }

    /// Returns the handle of `function`.
    pub fn handle(&self, function: &Function) -> FunctionHandle {
        let mut functions = self.functions();
        let entry =
            functions.entry(function.clone()).or_insert_with(|| FunctionEntry::new(function));
        Arc::clone(&entry.handle)
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

    /// Applies a list of functions, each with whether it has a replica.
    fn apply(registry: &FunctionRegistry, functions: &[(&str, bool)], at: Instant) {
        let summaries: Vec<FunctionSummary> = functions
            .iter()
            .map(|(_, ready)| FunctionSummary {
                available_replicas: u64::from(*ready),
                ..FunctionSummary::default()
            })
            .collect();
        let names = functions.iter().map(|(name, _)| function(name));
        registry.apply_listing(&names.zip(&summaries).collect(), at);
    }

    #[test]
    fn a_deleted_function_is_removed_after_an_hour() {
        let registry = FunctionRegistry::default();
        let (echo, start) = (function("echo"), Instant::now());
        apply(&registry, &[("echo", true)], start);
        apply(&registry, &[], start + Duration::from_secs(3500));
        assert!(registry.contains(&echo));
        apply(&registry, &[], start + Duration::from_secs(3700));
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
        apply(&registry, &[("echo", true), ("idle", false)], start);
        let (echo, idle) = (registry.handle(&function("echo")), registry.handle(&function("idle")));
        assert!(echo.is_ready() && !idle.is_ready());
        apply(&registry, &[("idle", true)], start + Duration::from_secs(5));
        assert!(!echo.is_ready() && idle.is_ready());
    }

    #[test]
    fn a_query_before_a_change_is_ignored() {
        let registry = FunctionRegistry::default();
        let before = Instant::now();
        apply(&registry, &[("echo", true)], before);
        let (echo, ready) = (function("echo"), registry.handle(&function("echo")));
        registry.invalidate(Some("other"));
        assert!(ready.is_ready() && !registry.invalidated_since(&echo, before));
        registry.invalidate(Some("echo"));
        assert!(!ready.is_ready() && registry.invalidated_since(&echo, before));
        apply(&registry, &[("echo", true)], before);
        registry.set_ready(&echo, true, before);
        assert!(!ready.is_ready());
        let after = Instant::now();
        registry.set_ready(&echo, true, after);
        assert!(
            ready.is_ready() && !registry.invalidated_since(&echo, after + Duration::from_nanos(1))
        );
        registry.invalidate(None);
        assert!(!ready.is_ready());
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
        apply(&registry, &[("echo", true)], start + Duration::from_secs(1));
        assert!(registry.record_start_failure(&echo, "exit status: 2"));
        registry.invalidate(Some("other"));
        assert!(!registry.record_start_failure(&echo, "exit status: 2"));
        registry.invalidate(Some("echo"));
        assert!(registry.record_start_failure(&echo, "exit status: 2"));
    }

    #[test]
    fn a_function_that_is_listed_again_keeps_its_handle() {
        let registry = FunctionRegistry::default();
        let start = Instant::now();
        apply(&registry, &[("echo", true)], start);
        let ready = registry.handle(&function("echo"));
        apply(&registry, &[], start + Duration::from_secs(3700));
        assert!(!registry.contains(&function("echo")) && !ready.is_ready());
        apply(&registry, &[("echo", true)], start + Duration::from_secs(3800));
        assert!(ready.is_ready());
    }

    #[test]
    fn policies_follow_the_labels_and_annotations() {
        let registry = FunctionRegistry::default();
        let (echo, name) = (function("echo"), |name: &str| format!("com.openfaas.{name}"));
        let handle = registry.handle(&echo);
        assert_eq!(handle.policy(), None);
        let mut summary = FunctionSummary {
            labels: Some(Values::from([(name("scale.min"), "3".to_owned())])),
            ..FunctionSummary::default()
        };
        assert_eq!(registry.record_status(&echo, &summary).scaling.min, 3);
        let first = handle.policy().unwrap();
        summary.labels.get_or_insert_default().insert("other".to_owned(), "x".to_owned());
        assert!(Arc::ptr_eq(&registry.record_status(&echo, &summary), &first));
        summary.annotations = Some(Values::from([(name("retry.attempts"), "7".to_owned())]));
        registry.apply_listing(&BTreeMap::from([(echo, &summary)]), Instant::now());
        let changed = handle.policy().unwrap();
        assert_eq!((changed.scaling.min, changed.retry.attempts), (3, 7));
    }
}
