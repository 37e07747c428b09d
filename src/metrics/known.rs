//! Which functions there are: those that the provider lists, and those it has answered for; and which of them can be
//! called without asking.
//! Whatever is not here is counted as `unknown`, so that strangers cannot grow the metrics.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::function::Function;

/// A function's series go this long after it was last listed or answered for.
pub const FORGOTTEN_AFTER: Duration = Duration::from_secs(3600);
/// Names learnt from answers alone: no provider should have more, whatever it answers.
const MAX_LEARNT: usize = 5_000;

/// The functions that exist, as far as this process knows.
#[derive(Debug, Default)]
pub struct Known {
    functions: Mutex<HashMap<Function, Seen>>,
}

/// Whether a function can be called without asking. One for the process, looked at by every call and written when that
/// changes, which is rare.
#[derive(Debug, Default)]
pub struct Warm(AtomicBool);

impl Warm {
    /// Whether the provider had a replica to call when it was heard of last.
    pub fn is_warm(&self) -> bool {
        self.0.load(Relaxed)
    }
}

/// What is known of one function.
#[derive(Debug)]
struct Seen {
    /// When the provider listed it last, or answered for it; `None` once that is forgotten, or never was.
    last: Option<Instant>,
    warm: Arc<Warm>,
    /// The time that `warm` is true to: what was found out before says nothing any more.
    as_of: Option<Instant>,
    /// When somebody changed the function last.
    changed: Option<Instant>,
    /// Why it does not start, as it was logged last.
    failure: Option<String>,
}

impl Seen {
    fn new(last: Option<Instant>) -> Self {
        Self { last, warm: Arc::default(), as_of: None, changed: None, failure: None }
    }

    /// The provider was asked at `at`, and it has replicas to call, or none.
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

    /// The provider has answered for `function`. Whether it is known from now on.
    pub fn learn(&self, function: &Function) -> bool {
        let mut functions = self.functions();
        let has_room = functions.len() < MAX_LEARNT || functions.contains_key(function);
        if has_room {
            let seen = functions.entry(function.clone()).or_insert_with(|| Seen::new(None));
            seen.last = Some(Instant::now());
        }
        has_room
    }

    /// The provider, asked at `at`, lists these functions and no others, each with replicas to call or without.
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
            // What a thread still counts under must be found again if the function comes back.
            seen.last.is_some() || Arc::strong_count(&seen.warm) > 1
        });
    }

    /// What tells whether `function` can be called without asking.
    pub fn warm(&self, function: &Function) -> Arc<Warm> {
        let mut functions = self.functions();
        let seen = functions.entry(function.clone()).or_insert_with(|| Seen::new(None));
        Arc::clone(&seen.warm)
    }

    /// The provider, asked at `at`, has replicas of `function` to call, or none. Names that are not known stay so.
    pub fn found(&self, function: &Function, warm: bool, at: Instant) {
        if let Some(seen) = self.functions().get_mut(function) {
            seen.found(warm, at);
        }
    }

    /// The provider says that `function` does not start, because of `reason`. Whether that is news: it has had replicas
    /// to call since it was said last, or was changed, or the reason is another.
    pub fn does_not_start(&self, function: &Function, reason: &str) -> bool {
        let mut functions = self.functions();
        let Some(seen) = functions.get_mut(function) else { return true };
        let is_news = seen.failure.as_deref() != Some(reason);
        if is_news {
            seen.failure = Some(reason.to_owned());
        }
        is_news
    }

    /// Somebody has just changed the functions called `name`, in whatever namespace; or, without a name, any: what was
    /// known of their replicas says nothing any more.
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

    /// Whether somebody has changed `function` since `at`.
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
    fn a_deleted_function_is_forgotten_after_an_hour() {
        let known = Known::default();
        let (echo, start) = (function("echo"), Instant::now());
        known.listed(&list(&[("echo", true)]), start);
        known.listed(&list(&[]), start + Duration::from_secs(3500));
        assert!(known.contains(&echo));
        known.listed(&list(&[]), start + Duration::from_secs(3700));
        assert!(!known.contains(&echo));
    }

    #[test]
    fn an_answer_makes_a_function_known() {
        let known = Known::default();
        let echo = function("echo");
        assert!(!known.contains(&echo));
        assert!(known.learn(&echo));
        assert!(known.contains(&echo));
    }

    #[test]
    fn a_provider_that_answers_for_anything_is_believed_so_often_only() {
        let known = Known::default();
        let numbered = |number: usize| function(&format!("f{number}"));
        assert!((0..MAX_LEARNT).all(|number| known.learn(&numbered(number))));
        assert!(!known.learn(&numbered(MAX_LEARNT)));
        assert!(!known.contains(&numbered(MAX_LEARNT)));
        assert!(known.learn(&numbered(0)));
    }

    #[test]
    fn a_function_is_warm_as_the_provider_lists_it() {
        let known = Known::default();
        let start = Instant::now();
        known.listed(&list(&[("echo", true), ("idle", false)]), start);
        let (echo, idle) = (known.warm(&function("echo")), known.warm(&function("idle")));
        assert!(echo.is_warm() && !idle.is_warm());
        known.listed(&list(&[("idle", true)]), start + Duration::from_secs(5));
        assert!(!echo.is_warm() && idle.is_warm());
    }

    #[test]
    fn what_is_older_than_a_change_says_nothing() {
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
    fn that_a_function_does_not_start_is_news_once_until_it_has_started_or_changed() {
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
    fn a_function_that_comes_back_is_told_to_whoever_remembers_it() {
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
