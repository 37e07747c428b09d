//! Suppresses alerts for functions that are scaled by load; logs that once per function.

use std::collections::HashSet;
use std::sync::Mutex;

use gateway_base::function::Function;
use gateway_base::sync::lock_unpoisoned;
use gateway_proxy::functions::policy::FunctionPolicy;

/// Maximum number of functions for which the suppression is logged.
const MAX_LOGGED_FUNCTIONS: usize = 10_000;

/// Decides which alerts are ignored. One per process, only if functions are scaled by load.
#[derive(Debug, Default)]
pub struct AlertFilter {
    /// Functions whose suppression has been logged. A leaf.
    logged: Mutex<HashSet<Function>>,
}

impl AlertFilter {
    /// Returns whether an alert of `function` is ignored.
    pub fn ignores(&self, function: &Function, policy: &FunctionPolicy) -> bool {
        if !policy.scaled_by_load {
            return false;
        }
        let mut logged = lock_unpoisoned(&self.logged);
        if logged.len() < MAX_LOGGED_FUNCTIONS && logged.insert(function.clone()) {
            tracing::info!(
                function = %function,
                "Alerts for {function} are ignored: it is scaled by load"
            );
        }
        true
    }
}
