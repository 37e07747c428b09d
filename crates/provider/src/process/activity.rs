//! Calls in flight and process groups of a function. Shared by all versions of the function.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use crate::process::usage::{MIN_SAMPLE_INTERVAL, Sample};
use crate::types::Usage;
use gateway_base::sync::lock_unpoisoned;

#[derive(Debug, Default)]
pub(super) struct Activity {
    /// Number of calls in flight. A leaf: the check of the limit and the count are one step.
    in_flight: Mutex<u64>,
    /// Ids of the process groups that run. A leaf.
    process_groups: Mutex<BTreeSet<i32>>,
    /// Start of the interval for the next CPU measurement. A leaf.
    last_sample: Mutex<Option<Sample>>,
}

/// Counts a call as in flight until it is dropped.
#[derive(Debug)]
pub(super) struct InFlightGuard(Arc<Activity>);

impl Activity {
    /// Counts a call as in flight; `None` if `limit` calls are in flight already.
    pub(super) fn begin_call(self: &Arc<Self>, limit: u64) -> Option<InFlightGuard> {
        let mut calls = lock_unpoisoned(&self.in_flight);
        if *calls >= limit {
            return None;
        }
        *calls += 1;
        Some(InFlightGuard(Arc::clone(self)))
    }

    pub(super) fn group_started(&self, id: i32) {
        lock_unpoisoned(&self.process_groups).insert(id);
    }

    pub(super) fn group_ended(&self, id: i32) {
        lock_unpoisoned(&self.process_groups).remove(&id);
    }

    /// Returns the usage of the processes, averaged since the last query, or over `MIN_SAMPLE_INTERVAL`.
    pub(super) async fn usage(&self) -> Usage {
        let earlier = lock_unpoisoned(&self.last_sample).take();
        let earlier = match earlier {
            Some(sample) if sample.at.elapsed() >= MIN_SAMPLE_INTERVAL => sample,
            Some(_) | None => {
                let sample = self.take_sample().await;
                tokio::time::sleep(MIN_SAMPLE_INTERVAL).await;
                sample
            }
        };
        let now = self.take_sample().await;
        let usage = now.usage_since(&earlier);
        *lock_unpoisoned(&self.last_sample) = Some(now);
        usage
    }

    async fn take_sample(&self) -> Sample {
        let groups = lock_unpoisoned(&self.process_groups).clone();
        // Reads /proc, with possibly thousands of processes.
        let sampling = tokio::task::spawn_blocking(move || Sample::take(&groups));
        sampling.await.unwrap_or_else(|_| Sample::empty())
    }
}

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        *lock_unpoisoned(&self.0.in_flight) -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_limited_until_their_guard_is_dropped() {
        let activity = Arc::new(Activity::default());
        let first = activity.begin_call(2).unwrap();
        let _second = activity.begin_call(2).unwrap();
        assert!(activity.begin_call(2).is_none());
        drop(first);
        assert!(activity.begin_call(2).is_some());
        assert!(activity.begin_call(0).is_none());
    }
}
