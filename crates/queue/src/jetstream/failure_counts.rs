//! Counts failures by call id. No I/O.
use std::collections::HashMap;
use std::sync::Mutex;

use gateway_base::sync::lock_unpoisoned;

/// Maximum number of tracked calls; at the limit all counts are reset.
const MAX_TRACKED_CALLS: usize = 1000;

/// Counts by call id. The lock is a leaf.
#[derive(Default)]
pub(super) struct FailureCounts(Mutex<HashMap<String, u32>>);

impl FailureCounts {
    /// Increments the count of a call and returns it.
    pub(super) fn increment(&self, id: &str) -> u32 {
        let mut counts = lock_unpoisoned(&self.0);
        if counts.len() >= MAX_TRACKED_CALLS && !counts.contains_key(id) {
            counts.clear();
        }
        let count = counts.entry(id.to_owned()).or_default();
        *count = count.saturating_add(1);
        *count
    }

    /// Resets the count of a call.
    pub(super) fn reset(&self, id: &str) {
        lock_unpoisoned(&self.0).remove(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_per_call_and_bounded() {
        let counts = FailureCounts::default();
        assert_eq!(
            [counts.increment("a"), counts.increment("a"), counts.increment("b")],
            [1, 2, 1]
        );
        counts.reset("a");
        assert_eq!([counts.increment("a"), counts.increment("b")], [1, 2]);
        (0..10 * MAX_TRACKED_CALLS).for_each(|id| assert_eq!(counts.increment(&id.to_string()), 1));
        assert!(counts.0.lock().unwrap().len() <= MAX_TRACKED_CALLS);
    }
}
