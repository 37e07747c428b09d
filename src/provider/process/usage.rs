//! How much CPU and memory a function's processes use.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::provider::process::procfs::{self, Stat};
use crate::provider::types::Usage;

/// The shortest time to measure CPU over: the kernel counts in hundredths of a second.
pub(super) const MIN_SAMPLE_INTERVAL: Duration = Duration::from_millis(100);

/// What was measured at one moment.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    pub(super) at: Instant,
    processes: Vec<Stat>,
}

impl Sample {
    /// Looks at the processes of these groups.
    pub(super) fn take(groups: &BTreeSet<i32>) -> Self {
        let mut processes = procfs::all();
        processes.retain(|process| groups.contains(&process.group));
        Self { at: Instant::now(), processes }
    }

    /// A look that could not be had.
    pub(super) fn empty() -> Self {
        Self { at: Instant::now(), processes: Vec::new() }
    }

    /// What was used between `earlier` and this.
    pub(super) fn usage_since(&self, earlier: &Self) -> Usage {
        let seconds = self.at.duration_since(earlier.at).max(MIN_SAMPLE_INTERVAL).as_secs_f64();
        let ticks: u64 =
            self.processes.iter().map(|now| cpu_ticks_since(now, &earlier.processes)).sum();
        let pages: u64 = self.processes.iter().map(|process| process.pages).sum();
        let ticks_per_second = rustix::param::clock_ticks_per_second();
        #[expect(clippy::cast_precision_loss, reason = "far from 2^53 ticks or bytes")]
        Usage {
            cpu: ticks as f64 / ticks_per_second as f64 / seconds * 1000.0,
            total_memory_bytes: (pages * rustix::param::page_size() as u64) as f64,
        }
    }
}

/// What a process has used since the earlier sample, or since its start when it was not in there.
fn cpu_ticks_since(now: &Stat, earlier: &[Stat]) -> u64 {
    let before =
        earlier.iter().find(|before| (before.pid, before.started) == (now.pid, now.started));
    now.ticks.saturating_sub(before.map_or(0, |before| before.ticks))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(at: Instant, processes: &[(i32, u64)]) -> Sample {
        let process = |&(pid, ticks)| Stat {
            pid,
            is_zombie: false,
            parent: 1,
            group: 1,
            ticks,
            started: 9,
            pages: 2,
        };
        Sample { at, processes: processes.iter().map(process).collect() }
    }

    #[test]
    fn cpu_is_counted_between_samples_and_memory_at_the_last() {
        let start = Instant::now();
        let earlier = sample(start, &[(1, 100), (2, 100)]);
        // One process went on, one ended, one began: 50 + 25 ticks in a second.
        let later = sample(start + Duration::from_secs(1), &[(1, 150), (3, 25)]);
        let usage = later.usage_since(&earlier);
        let tick = 1000.0 / rustix::param::clock_ticks_per_second() as f64;
        assert!((usage.cpu - 75.0 * tick).abs() < 0.001, "{usage:?}");
        let memory = 4.0 * rustix::param::page_size() as f64;
        assert!((usage.total_memory_bytes - memory).abs() < 0.5, "{usage:?}");
    }
}
