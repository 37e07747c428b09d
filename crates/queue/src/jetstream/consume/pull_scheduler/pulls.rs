//! Decides which consumers to pull from. No I/O.
use std::time::{Duration, Instant};

use crate::jetstream::consume::pull_scheduler::{MAX_PULL_CALLS, PullScheduler};
use gateway_base::function::Function;

/// Expiry of a pull on the server. For an active function it is shorter: messages have arrived by then, or were lost.
const PULL_EXPIRY: Duration = Duration::from_secs(5);

const ACTIVE_PULL_EXPIRY: Duration = Duration::from_secs(1);

/// Time after the expiry within which the end of the pull must arrive.
const RESPONSE_GRACE: Duration = Duration::from_millis(500);

/// A pull that has not ended.
pub(super) struct PullRequest {
    pub(super) number: u64,
    /// Number of messages that are still expected.
    pub(super) remaining: usize,
    /// Time by which the pull has ended, or its end was lost.
    expires_at: Instant,
}

/// A pull to send.
pub(in crate::jetstream) struct WantedPull {
    pub(in crate::jetstream) function_index: usize,
    pub(in crate::jetstream) function: Function,
    /// Maximum number of messages.
    pub(in crate::jetstream) max_messages: usize,
    /// Number of the pull.
    pub(in crate::jetstream) number: u64,
    /// The function has had calls recently.
    pub(in crate::jetstream) active: bool,
}

impl WantedPull {
    /// Expiry of the pull on the server.
    pub(in crate::jetstream) fn expiry(&self) -> Duration {
        pull_expiry(self.active)
    }
}

fn pull_expiry(active: bool) -> Duration {
    if active { ACTIVE_PULL_EXPIRY } else { PULL_EXPIRY }
}

impl<A> PullScheduler<A> {
    /// Returns the pulls to send. An inactive function is asked for one message, an active one for its free slots and
    /// its prefetch.
    pub(in crate::jetstream) fn plan_pulls(
        &mut self,
        concurrency: usize,
        now: Instant,
    ) -> Vec<WantedPull> {
        let mut wanted = Vec::new();
        for index in 0..self.functions.len() {
            let function = &self.functions[index];
            let pending = function
                .pull
                .as_ref()
                .is_some_and(|pull| pull.remaining > 0 && pull.expires_at > now);
            if pending || function.retired {
                continue;
            }
            let (active, prefetch) = (function.rate.is_active(now), function.rate.prefetch(now));
            let slots =
                self.free_slots(index, concurrency, if active { MAX_PULL_CALLS } else { 1 });
            let target = (slots + prefetch).min(MAX_PULL_CALLS);
            let buffered = self.functions[index].buffered.len() + self.functions[index].selected;
            if buffered * 2 > target || target == 0 {
                continue;
            }
            self.pull_count += 1;
            let function = &mut self.functions[index];
            // Rounded down, since surplus calls of a batch must be returned one by one.
            let max = (((target - buffered) as f64 / function.mean_batch_size.unwrap_or(1.0))
                as usize)
                .max(1);
            let number = self.pull_count;
            function.pull = Some(PullRequest {
                number,
                remaining: max,
                expires_at: now + pull_expiry(active) + RESPONSE_GRACE,
            });
            wanted.push(WantedPull {
                function_index: index,
                function: function.function.clone(),
                max_messages: max,
                number,
                active,
            });
        }
        wanted
    }

    /// Removes the pull `number`: it has ended.
    pub(in crate::jetstream) fn pull_completed(&mut self, index: usize, number: u64) {
        if let Some(function) = self.functions.get_mut(index)
            && function.pull.as_ref().is_some_and(|pull| pull.number == number)
        {
            function.pull = None;
        }
    }

    /// Removes all pulls.
    pub(in crate::jetstream) fn reset_pulls(&mut self) {
        self.functions.iter_mut().for_each(|function| function.pull = None);
    }
}
