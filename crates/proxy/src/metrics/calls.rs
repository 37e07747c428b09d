//! Call counters of each function: one shard per proxy thread, so that no call writes memory that another thread uses.
//! A scrape adds the shards up.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use foldhash::fast::RandomState;
use http::StatusCode;

use crate::error::client_closed_request;
use crate::functions::registry::{FunctionHandle, FunctionRegistry, FunctionState};
use gateway_base::function::Function;
use gateway_base::sync::lock_unpoisoned;

/// Upper bounds of the duration histogram, in seconds.
pub const BUCKETS: [f64; 11] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
const BUCKET_NANOS: [u64; 11] = [
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    500_000_000,
    1_000_000_000,
    2_500_000_000,
    5_000_000_000,
    10_000_000_000,
];

/// Label of calls to unregistered functions.
pub const UNKNOWN_FUNCTION: &str = "unknown";

/// How an exchange ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The whole response was sent.
    Complete,
    /// The upstream aborted its response.
    UpstreamAborted,
    /// The upstream exceeded the timeout.
    TimedOut,
    /// The client disconnected.
    ClientDisconnected,
}

/// Counters of one function on one thread.
#[derive(Debug)]
pub struct Series {
    /// What all threads know about the function.
    pub handle: FunctionHandle,
    /// Rank 3: `by_segment` may be held. The registry of functions is locked under it when a series is removed.
    counters: Mutex<Counters>,
}

/// Values of a series.
#[derive(Clone, Debug, Default)]
pub struct Counters {
    pub started: u64,
    pub in_flight: i64,
    /// Start time of the last call.
    pub last_started: Option<Instant>,
    /// By status. A linear list, since a function returns few different statuses.
    pub by_code: Vec<(u16, DurationHistogram)>,
}

impl Counters {
    fn record_start(&mut self, now: Instant) {
        self.started += 1;
        self.in_flight += 1;
        self.last_started = Some(now);
    }
}

/// Histogram of call durations.
#[derive(Clone, Copy, Debug, Default)]
pub struct DurationHistogram {
    /// Not cumulative. The last bucket is for durations above all bounds.
    pub buckets: [u64; BUCKETS.len() + 1],
    pub nanos: u64,
}

impl DurationHistogram {
    /// Returns the number of observations.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    fn observe(&mut self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[BUCKET_NANOS.partition_point(|bound| *bound < nanos)] += 1;
        self.nanos = self.nanos.saturating_add(nanos);
    }

    /// Adds the histogram of another thread.
    pub fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.buckets.iter_mut().zip(other.buckets) {
            *mine += theirs;
        }
        self.nanos = self.nanos.saturating_add(other.nanos);
    }
}

impl Series {
    fn new(handle: FunctionHandle) -> Arc<Self> {
        Arc::new(Self { handle, counters: Mutex::default() })
    }

    /// Locks the counters.
    pub fn counters(&self) -> MutexGuard<'_, Counters> {
        lock_unpoisoned(&self.counters)
    }
}

/// The series of one thread.
pub struct Shard {
    /// By path segment. Only registered functions are in it. Rank 2: acquired first. Only
    /// scrapes and the autoscaler contend for it.
    by_segment: Mutex<HashMap<Box<str>, Arc<Series>, RandomState>>,
    unknown: Arc<Series>,
    registry: Arc<FunctionRegistry>,
    default_namespace: Arc<str>,
}

impl Shard {
    /// Creates an empty shard.
    pub fn new(registry: Arc<FunctionRegistry>, default_namespace: Arc<str>) -> Self {
        let unknown = Function { name: UNKNOWN_FUNCTION.to_owned(), namespace: String::new() };
        Self {
            by_segment: Mutex::default(),
            unknown: Series::new(FunctionState::new(unknown)),
            registry,
            default_namespace,
        }
    }

    /// Starts a call of the function in the path segment `segment`; `None` if the segment is no function name.
    pub fn begin(&self, segment: &str, now: Instant) -> Option<InFlightRecorder> {
        let found = self.segments().get(segment).map(Arc::clone);
        let series = match found {
            Some(series) => Some(series),
            None => {
                let function = Function::parse(segment, &self.default_namespace)?;
                if !self.registry.contains(&function) {
                    let unregistered = Some(Box::new((segment.into(), function)));
                    return Some(InFlightRecorder::new(
                        Arc::clone(&self.unknown),
                        unregistered,
                        now,
                    ));
                }
                Some(self.insert(segment, function))
            }
        };
        series.map(|series| {
            let mut counters = series.counters();
            counters.record_start(now);
            drop(counters);
            InFlightRecorder::new(series, None, now)
        })
    }

    /// Returns all series of this shard, including the one of unregistered functions.
    pub fn series(&self) -> Vec<Arc<Series>> {
        let mut all: Vec<_> = self.segments().values().map(Arc::clone).collect();
        // `echo` and `echo.openfaas-fn` share one series.
        all.sort_unstable_by_key(|series| Arc::as_ptr(series) as usize);
        all.dedup_by(|a, b| Arc::ptr_eq(a, b));
        all.push(Arc::clone(&self.unknown));
        all
    }

    /// Removes the series of functions that are no longer registered, unless they have been called since `active`.
    pub fn remove_inactive(&self, active: Instant) {
        self.segments().retain(|_, series| {
            let counters = series.counters();
            counters.in_flight > 0
                || counters.last_started.is_some_and(|began| began > active)
                || self.registry.contains(&series.handle.function)
        });
    }

    /// Inserts the series of `function`, under `segment` and under its label.
    fn insert(&self, segment: &str, function: Function) -> Arc<Series> {
        let label = function.to_string();
        let mut segments = self.segments();
        let series = match segments.get(label.as_str()) {
            Some(series) => Arc::clone(series),
            None => {
                let series = Series::new(self.registry.handle(&function));
                segments.insert(label.into(), Arc::clone(&series));
                series
            }
        };
        segments.insert(segment.into(), Arc::clone(&series));
        series
    }

    fn segments(&self) -> MutexGuard<'_, HashMap<Box<str>, Arc<Series>, RandomState>> {
        lock_unpoisoned(&self.by_segment)
    }
}

/// A call in flight. Recorded once, when it ends; if dropped before, as a disconnect of the client.
pub struct InFlightRecorder {
    series: Arc<Series>,
    /// Segment and function, while the function is unregistered. Such a call counts as started when its response
    /// arrives.
    unregistered: Option<Box<(Box<str>, Function)>>,
    pub began: Instant,
    status: StatusCode,
    finished: bool,
}

impl InFlightRecorder {
    fn new(
        series: Arc<Series>,
        unregistered: Option<Box<(Box<str>, Function)>>,
        began: Instant,
    ) -> Self {
        Self { series, unregistered, began, status: client_closed_request(), finished: false }
    }

    /// Returns the called function.
    pub fn function(&self) -> &Function {
        self.unregistered
            .as_ref()
            .map_or(&self.series.handle.function, |unregistered| &unregistered.1)
    }

    /// Returns whether the function is unregistered.
    pub fn is_unregistered(&self) -> bool {
        self.unregistered.is_some()
    }

    /// Returns whether the function is ready.
    pub fn is_ready(&self) -> bool {
        self.series.handle.is_ready()
    }

    /// Sets the status of the response.
    pub fn set_status(&mut self, status: StatusCode) {
        self.status = status;
    }

    /// Registers the function, which the provider has confirmed. Beyond the maximum number of functions it stays
    /// unregistered.
    pub fn confirm(&mut self, shard: &Shard) {
        let confirmed =
            self.unregistered.take_if(|unregistered| shard.registry.confirm(&unregistered.1));
        if let Some(unregistered) = confirmed {
            let (segment, function) = *unregistered;
            self.series = shard.insert(&segment, function);
            self.series.counters().record_start(self.began);
        }
    }

    /// Records the end of the call.
    pub fn finish(mut self, outcome: Outcome, now: Instant) {
        self.record(outcome, now);
    }

    fn record(&mut self, outcome: Outcome, now: Instant) {
        self.finished = true;
        let code = match outcome {
            Outcome::Complete => self.status,
            Outcome::UpstreamAborted => StatusCode::BAD_GATEWAY,
            Outcome::TimedOut => StatusCode::GATEWAY_TIMEOUT,
            Outcome::ClientDisconnected => client_closed_request(),
        }
        .as_u16();
        let took = now.saturating_duration_since(self.began);
        let mut counters = self.series.counters();
        if self.unregistered.is_some() {
            counters.started += 1;
        } else {
            counters.in_flight -= 1;
        }
        let durations = match counters.by_code.iter().position(|(c, _)| *c == code) {
            Some(at) => at,
            None => {
                counters.by_code.push((code, DurationHistogram::default()));
                counters.by_code.len() - 1
            }
        };
        counters.by_code[durations].1.observe(took);
    }
}

impl Drop for InFlightRecorder {
    fn drop(&mut self) {
        if !self.finished {
            self.record(Outcome::ClientDisconnected, Instant::now());
        }
    }
}
