//! How often something has failed, by the ids of calls. No I/O.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// Of more calls at a time it is forgotten, and counted anew.
const MOST: usize = 1000;

#[derive(Default)]
pub(super) struct Tries(Mutex<HashMap<String, u32>>);

impl Tries {
    /// It has failed once more for the call with that id: how often by now.
    pub(super) fn count(&self, id: &str) -> u32 {
        let mut tries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if tries.len() >= MOST && !tries.contains_key(id) {
            tries.clear();
        }
        let count = tries.entry(id.to_owned()).or_default();
        *count = count.saturating_add(1);
        *count
    }

    /// It has not failed any more.
    pub(super) fn forget(&self, id: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_call_is_counted_by_itself_and_there_are_never_too_many() {
        let tries = Tries::default();
        assert_eq!([tries.count("a"), tries.count("a"), tries.count("b")], [1, 2, 1]);
        tries.forget("a");
        assert_eq!([tries.count("a"), tries.count("b")], [1, 2]);
        (0..10 * MOST).for_each(|id| assert_eq!(tries.count(&id.to_string()), 1));
        assert!(tries.0.lock().unwrap().len() <= MOST);
    }
}
