//! Which functions there are: those that the provider lists, and those it has answered for.
//! Whatever is not here is counted as `unknown`, so that strangers cannot grow the metrics.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::function::Function;

/// A function's series go this long after it was last listed or answered for.
pub const FORGOTTEN_AFTER: Duration = Duration::from_secs(3600);
/// Names learnt from answers alone: no provider should have more, whatever it answers.
const MAX_LEARNT: usize = 5_000;

/// The functions that exist, as far as this process knows.
#[derive(Debug, Default)]
pub struct Known {
    last_seen: Mutex<HashMap<Function, Instant>>,
}

impl Known {
    pub fn contains(&self, function: &Function) -> bool {
        self.functions().contains_key(function)
    }

    /// The provider has answered for `function`. Whether it is known from now on.
    pub fn learn(&self, function: &Function) -> bool {
        let mut functions = self.functions();
        let has_room = functions.len() < MAX_LEARNT || functions.contains_key(function);
        if has_room {
            functions.insert(function.clone(), Instant::now());
        }
        has_room
    }

    /// The provider lists `functions` at `now`.
    pub fn listed(&self, functions: &HashSet<Function>, now: Instant) {
        let mut last_seen = self.functions();
        for function in functions {
            match last_seen.get_mut(function) {
                Some(seen) => *seen = now,
                None => {
                    last_seen.insert(function.clone(), now);
                }
            }
        }
        last_seen.retain(|_, seen| now.saturating_duration_since(*seen) < FORGOTTEN_AFTER);
    }

    fn functions(&self) -> MutexGuard<'_, HashMap<Function, Instant>> {
        self.last_seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deleted_function_is_forgotten_after_an_hour() {
        let known = Known::default();
        let echo = Function::parse("echo", "fn").unwrap();
        let start = Instant::now();
        known.listed(&HashSet::from([echo.clone()]), start);
        known.listed(&HashSet::new(), start + Duration::from_secs(3500));
        assert!(known.contains(&echo));
        known.listed(&HashSet::new(), start + Duration::from_secs(3700));
        assert!(!known.contains(&echo));
    }

    #[test]
    fn an_answer_makes_a_function_known() {
        let known = Known::default();
        let echo = Function::parse("echo", "fn").unwrap();
        assert!(!known.contains(&echo));
        assert!(known.learn(&echo));
        assert!(known.contains(&echo));
    }

    #[test]
    fn a_provider_that_answers_for_anything_is_believed_so_often_only() {
        let known = Known::default();
        let function = |number: usize| Function::parse(&format!("f{number}"), "fn").unwrap();
        assert!((0..MAX_LEARNT).all(|number| known.learn(&function(number))));
        assert!(!known.learn(&function(MAX_LEARNT)));
        assert!(!known.contains(&function(MAX_LEARNT)));
        assert!(known.learn(&function(0)));
    }
}
