//! Measures CPU and memory usage of a function's processes.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::process::procfs::{self, Stat};
use crate::types::Usage;

/// Minimum interval of a CPU measurement: the kernel counts in hundredths of a second.
pub(super) const MIN_SAMPLE_INTERVAL: Duration = Duration::from_millis(100);

/// State of the processes at one time.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    pub(super) at: Instant,
    processes: Vec<Stat>,
}

impl Sample {
    /// Reads the state of all processes in these groups.
    pub(super) fn take(groups: &BTreeSet<i32>) -> Self {
        let mut processes = procfs::all();
        processes.retain(|process| groups.contains(&process.group));
        Self { at: Instant::now(), processes }
    }

    /// Returns a sample without processes, for a failed measurement.
    pub(super) fn empty() -> Self {
        Self { at: Instant::now(), processes: Vec::new() }
    }

    /// Returns the CPU usage between `earlier` and this sample, and the memory at this sample.
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

/// Returns the CPU time of a process since the earlier sample, or since its start if it started later.
fn cpu_ticks_since(now: &Stat, earlier: &[Stat]) -> u64 {
    let previous =
        earlier.iter().find(|previous| (previous.pid, previous.started) == (now.pid, now.started));
    now.ticks.saturating_sub(previous.map_or(0, |previous| previous.ticks))
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
    fn usage_is_cpu_between_samples_and_memory_at_the_last_one() {
        let start = Instant::now();
        let earlier = sample(start, &[(1, 100), (2, 100)]);
        // One process continued, one exited, one started: 50 + 25 ticks in a second.
        let later = sample(start + Duration::from_secs(1), &[(1, 150), (3, 25)]);
        let usage = later.usage_since(&earlier);
        let tick = 1000.0 / rustix::param::clock_ticks_per_second() as f64;
        assert!((usage.cpu - 75.0 * tick).abs() < 0.001, "{usage:?}");
        let memory = 4.0 * rustix::param::page_size() as f64;
        assert!((usage.total_memory_bytes - memory).abs() < 0.5, "{usage:?}");
    }
}
