//! Call counters of each function: one shard per proxy thread, so that no call writes memory that another thread uses.
//! A scrape adds the shards up.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use foldhash::fast::RandomState;
use http::StatusCode;

use crate::error::client_left;
use crate::function::Function;
use crate::metrics::known::{Known, Warm};

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
pub const UNKNOWN: &str = "unknown";

/// How an exchange ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The whole response was sent.
    Whole,
    /// The upstream aborted its response.
    Broken,
    /// The upstream exceeded the timeout.
    TimedOut,
    /// The client disconnected.
    Left,
}

/// Counters of one function on one thread.
#[derive(Debug)]
pub struct Series {
    pub function: Function,
    /// `function_name`: name and namespace.
    pub label: Arc<str>,
    /// The function is ready: no status query is necessary.
    warm: Arc<Warm>,
    numbers: Mutex<Numbers>,
}

/// Values of a series.
#[derive(Clone, Debug, Default)]
pub struct Numbers {
    pub started: u64,
    pub in_flight: i64,
    /// Start time of the last call.
    pub last_began: Option<Instant>,
    /// By status. A linear list, since a function returns few different statuses.
    pub by_code: Vec<(u16, Durations)>,
}

impl Numbers {
    fn begin(&mut self, now: Instant) {
        self.started += 1;
        self.in_flight += 1;
        self.last_began = Some(now);
    }
}

/// Histogram of call durations.
#[derive(Clone, Copy, Debug, Default)]
pub struct Durations {
    /// Not cumulative. The last bucket is for durations above all bounds.
    pub buckets: [u64; BUCKETS.len() + 1],
    pub nanos: u64,
}

impl Durations {
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
    fn new(function: Function, warm: Arc<Warm>) -> Arc<Self> {
        let label = function.to_string().into();
        Arc::new(Self { function, label, warm, numbers: Mutex::default() })
    }

    pub fn numbers(&self) -> MutexGuard<'_, Numbers> {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The series of one thread.
pub struct Shard {
    /// By path segment. Only registered functions are in it.
    by_segment: Mutex<HashMap<Box<str>, Arc<Series>, RandomState>>,
    unknown: Arc<Series>,
    known: Arc<Known>,
    default_namespace: Arc<str>,
}

impl Shard {
    pub fn new(known: Arc<Known>, default_namespace: Arc<str>) -> Self {
        let unknown = Function { name: UNKNOWN.to_owned(), namespace: String::new() };
        Self {
            by_segment: Mutex::default(),
            unknown: Series::new(unknown, Arc::default()),
            known,
            default_namespace,
        }
    }

    /// Starts a call of the function in the path segment `segment`; `None` if the segment is no function name.
    pub fn begin(&self, segment: &str, now: Instant) -> Option<Call> {
        let found = self.segments().get(segment).map(Arc::clone);
        let series = match found {
            Some(series) => Some(series),
            None => {
                let function = Function::parse(segment, &self.default_namespace)?;
                if !self.known.contains(&function) {
                    let stranger = Some(Box::new((segment.into(), function)));
                    return Some(Call::new(Arc::clone(&self.unknown), stranger, now));
                }
                Some(self.insert(segment, function))
            }
        };
        series.map(|series| {
            let mut numbers = series.numbers();
            numbers.begin(now);
            drop(numbers);
            Call::new(series, None, now)
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
    pub fn forget(&self, active: Instant) {
        self.segments().retain(|_, series| {
            let numbers = series.numbers();
            numbers.in_flight > 0
                || numbers.last_began.is_some_and(|began| began > active)
                || self.known.contains(&series.function)
        });
    }

    /// Inserts the series of `function`, under `segment` and under its label.
    fn insert(&self, segment: &str, function: Function) -> Arc<Series> {
        let label = function.to_string();
        let mut segments = self.segments();
        let series = match segments.get(label.as_str()) {
            Some(series) => Arc::clone(series),
            None => {
                let warm = self.known.warm(&function);
                let series = Series::new(function, warm);
                segments.insert(label.into(), Arc::clone(&series));
                series
            }
        };
        segments.insert(segment.into(), Arc::clone(&series));
        series
    }

    fn segments(&self) -> MutexGuard<'_, HashMap<Box<str>, Arc<Series>, RandomState>> {
        self.by_segment.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A call in flight. Recorded once, when it ends; if dropped before, as a disconnect of the client.
pub struct Call {
    series: Arc<Series>,
    /// Segment and function, while the function is unregistered. Such a call counts as started when its response
    /// arrives.
    stranger: Option<Box<(Box<str>, Function)>>,
    pub began: Instant,
    status: StatusCode,
    over: bool,
}

impl Call {
    fn new(
        series: Arc<Series>,
        stranger: Option<Box<(Box<str>, Function)>>,
        began: Instant,
    ) -> Self {
        Self { series, stranger, began, status: client_left(), over: false }
    }

    /// Returns the called function.
    pub fn function(&self) -> &Function {
        self.stranger.as_ref().map_or(&self.series.function, |stranger| &stranger.1)
    }

    /// Returns whether the function is unregistered.
    pub fn is_stranger(&self) -> bool {
        self.stranger.is_some()
    }

    /// Returns whether the function is ready.
    pub fn is_warm(&self) -> bool {
        self.series.warm.is_warm()
    }

    /// Sets the status of the response.
    pub fn answered(&mut self, status: StatusCode) {
        self.status = status;
    }

    /// Registers the function, which the provider has confirmed. Beyond the maximum number of functions it stays
    /// unregistered.
    pub fn vouched_for(&mut self, shard: &Shard) {
        let vouched = self.stranger.take_if(|stranger| shard.known.learn(&stranger.1));
        if let Some(stranger) = vouched {
            let (segment, function) = *stranger;
            self.series = shard.insert(&segment, function);
            self.series.numbers().begin(self.began);
        }
    }

    /// Records the end of the call.
    pub fn ended(mut self, end: End, now: Instant) {
        self.count(end, now);
    }

    fn count(&mut self, end: End, now: Instant) {
        self.over = true;
        let code = match end {
            End::Whole => self.status,
            End::Broken => StatusCode::BAD_GATEWAY,
            End::TimedOut => StatusCode::GATEWAY_TIMEOUT,
            End::Left => client_left(),
        }
        .as_u16();
        let took = now.saturating_duration_since(self.began);
        let mut numbers = self.series.numbers();
        if self.stranger.is_some() {
            numbers.started += 1;
        } else {
            numbers.in_flight -= 1;
        }
        let durations = match numbers.by_code.iter().position(|(c, _)| *c == code) {
            Some(at) => at,
            None => {
                numbers.by_code.push((code, Durations::default()));
                numbers.by_code.len() - 1
            }
        };
        numbers.by_code[durations].1.observe(took);
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if !self.over {
            self.count(End::Left, Instant::now());
        }
    }
}
