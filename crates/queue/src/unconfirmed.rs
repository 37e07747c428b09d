//! Names of functions for which calls were enqueued while the provider was unavailable.
//!
//! Calls are accepted while the provider is unavailable. But each function name costs resources: a queue of its own,
//! on JetStream a consumer on the server, and requests to the provider. So the number of different unconfirmed names
//! is limited. No I/O.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard};

use gateway_base::function::Function;
use gateway_base::sync::lock_unpoisoned;

/// Maximum number of different names until the provider answers again. New functions are rarely called for the first
/// time while it is unavailable.
pub const MAX_UNCONFIRMED: usize = 1000;

/// The unconfirmed names since the provider's last response. One for the process. The lock is a leaf.
#[derive(Debug, Default)]
pub struct UnconfirmedFunctions(Mutex<HashSet<Function>>);

impl UnconfirmedFunctions {
    /// Accepts `function` without confirmation; returns `false` if [`MAX_UNCONFIRMED`] other names have been accepted.
    pub fn admit(&self, function: &Function) -> bool {
        let mut names = self.names();
        if names.len() >= MAX_UNCONFIRMED && !names.contains(function) {
            return false;
        }
        names.insert(function.clone());
        true
    }

    /// Removes all names, because the provider has answered.
    pub fn clear(&self) {
        self.names().clear();
    }

    fn names(&self) -> MutexGuard<'_, HashSet<Function>> {
        lock_unpoisoned(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_unconfirmed_names_is_limited_until_the_provider_answers() {
        let unconfirmed = UnconfirmedFunctions::default();
        let numbered = |number: usize| Function::parse(&format!("f{number}"), "fn").unwrap();
        let admits = |number| unconfirmed.admit(&numbered(number));
        assert!((0..MAX_UNCONFIRMED).all(admits));
        assert!(!admits(MAX_UNCONFIRMED) && admits(0));
        unconfirmed.clear();
        assert!(admits(MAX_UNCONFIRMED));
    }
}
