//! Alerts of functions that are scaled by their load: they are ignored, which is said once for each.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use crate::autoscale::policy;
use crate::function::Function;
use crate::provider::types::FunctionSummary;

/// Functions that something was said of.
const MOST: usize = 10_000;

/// Tells which alerts mean nothing. One for the process, where functions are scaled by their load.
#[derive(Debug, Default)]
pub struct Ignored {
    told: Mutex<HashSet<Function>>,
}

impl Ignored {
    /// Whether an alert of `function` is to be ignored.
    pub fn ignores(&self, function: &Function, status: &FunctionSummary) -> bool {
        if !status.labels.as_ref().is_some_and(policy::owns) {
            return false;
        }
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.len() < MOST && told.insert(function.clone()) {
            tracing::info!(
                function = %function,
                "Alerts of {function} are ignored: it is scaled by its load"
            );
        }
        true
    }
}
