//! What a function is doing right now: calls in flight and process groups. Outlives updates of the function.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use crate::provider::process::sync::lock;
use crate::provider::process::usage::{SHORTEST, Sample};
use crate::provider::types::Usage;

#[derive(Debug, Default)]
pub(super) struct Activity {
    calls: Mutex<u64>,
    groups: Mutex<BTreeSet<i32>>,
    /// What the CPU time of the next question is counted from.
    sample: Mutex<Option<Sample>>,
}

/// A call that counts until this is dropped.
#[derive(Debug)]
pub(super) struct Call(Arc<Activity>);

impl Activity {
    /// Counts a call, unless there are `limit` of them already.
    pub(super) fn begin_call(self: &Arc<Self>, limit: u64) -> Option<Call> {
        let mut calls = lock(&self.calls);
        if *calls >= limit {
            return None;
        }
        *calls += 1;
        Some(Call(Arc::clone(self)))
    }

    pub(super) fn group_started(&self, id: i32) {
        lock(&self.groups).insert(id);
    }

    pub(super) fn group_ended(&self, id: i32) {
        lock(&self.groups).remove(&id);
    }

    /// What the processes use, averaged since the last question, or over a moment if there was none.
    pub(super) async fn usage(&self) -> Usage {
        let earlier = lock(&self.sample).take();
        let earlier = match earlier {
            Some(sample) if sample.at.elapsed() >= SHORTEST => sample,
            Some(_) | None => {
                let sample = self.sample().await;
                tokio::time::sleep(SHORTEST).await;
                sample
            }
        };
        let now = self.sample().await;
        let usage = now.since(&earlier);
        *lock(&self.sample) = Some(now);
        usage
    }

    async fn sample(&self) -> Sample {
        let groups = lock(&self.groups).clone();
        // There may be thousands of processes to look at.
        let sampling = tokio::task::spawn_blocking(move || Sample::take(&groups));
        sampling.await.unwrap_or_else(|_| Sample::none())
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        *lock(&self.0.calls) -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_up_to_a_limit_until_they_end() {
        let activity = Arc::new(Activity::default());
        let first = activity.begin_call(2).unwrap();
        let _second = activity.begin_call(2).unwrap();
        assert!(activity.begin_call(2).is_none());
        drop(first);
        assert!(activity.begin_call(2).is_some());
        assert!(activity.begin_call(0).is_none());
    }
}
