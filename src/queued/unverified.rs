//! Names that calls are queued under while nobody says whether there are such functions.
//!
//! A provider that is away is no reason to refuse a call. But each name is kept: it becomes a line of the queue, on
//! JetStream a consumer on the server, and something to ask the provider about. So strangers may make up so many, and
//! no more. No I/O.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::Error;
use crate::function::Function;

/// Different names until the provider answers again. More functions than that are hardly called for the first time
/// while it is away.
const MOST: usize = 1000;

/// The names since the provider answered last. One for the process.
#[derive(Debug, Default)]
pub(super) struct Unverified(Mutex<HashSet<Function>>);

impl Unverified {
    /// Takes `function` on trust, since the provider does not answer.
    ///
    /// # Errors
    /// `Unverified` when as many others have been taken so as may be.
    pub(super) fn admit(&self, function: &Function) -> Result<(), Error> {
        let mut names = self.names();
        if names.len() >= MOST && !names.contains(function) {
            return Err(Error::UnconfirmedLimit(function.clone(), MOST));
        }
        names.insert(function.clone());
        Ok(())
    }

    /// The provider answers.
    pub(super) fn forget(&self) {
        self.names().clear();
    }

    fn names(&self) -> MutexGuard<'_, HashSet<Function>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_names_are_taken_on_trust_until_the_provider_answers() {
        let unverified = Unverified::default();
        let numbered = |number: usize| Function::parse(&format!("f{number}"), "fn").unwrap();
        let admits = |number| unverified.admit(&numbered(number)).is_ok();
        assert!((0..MOST).all(admits));
        assert!(!admits(MOST) && admits(0));
        unverified.forget();
        assert!(admits(MOST));
    }
}
