//! Calls counted for each function: one shard for each thread that carries calls, so that no call touches what
//! another thread writes; a scrape adds the shards up.

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

/// The label of calls whose function the provider does not know.
pub const UNKNOWN: &str = "unknown";

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The answer went out whole.
    Whole,
    /// The upstream broke off inside its answer.
    Broken,
    /// The upstream did not finish in time.
    TimedOut,
    /// The caller left.
    Left,
}

/// What one thread has counted for one function.
#[derive(Debug)]
pub struct Series {
    pub function: Function,
    /// `function_name`: name and namespace.
    pub label: Arc<str>,
    /// Whether the function can be called without asking.
    warm: Arc<Warm>,
    numbers: Mutex<Numbers>,
}

/// The numbers of a series.
#[derive(Clone, Debug, Default)]
pub struct Numbers {
    pub started: u64,
    pub in_flight: i64,
    /// When the last call began.
    pub last_began: Option<Instant>,
    /// By status; a function answers with a handful of them.
    pub by_code: Vec<(u16, Durations)>,
}

impl Numbers {
    fn begin(&mut self, now: Instant) {
        self.started += 1;
        self.in_flight += 1;
        self.last_began = Some(now);
    }
}

/// A histogram of durations.
#[derive(Clone, Copy, Debug, Default)]
pub struct Durations {
    /// Not cumulative; the last is for what exceeds every bound.
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

    /// Adds what another thread has seen.
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

/// One thread's series.
pub struct Shard {
    /// By what stands in the path; only names that the provider knows get in.
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

    /// A call of the function that `segment` of the path names begins; `None` if it names none.
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

    /// Every series of this shard, the strangers' among them.
    pub fn series(&self) -> Vec<Arc<Series>> {
        let mut all: Vec<_> = self.segments().values().map(Arc::clone).collect();
        // `echo` and `echo.openfaas-fn` share one series.
        all.sort_unstable_by_key(|series| Arc::as_ptr(series) as usize);
        all.dedup_by(|a, b| Arc::ptr_eq(a, b));
        all.push(Arc::clone(&self.unknown));
        all
    }

    /// Forgets functions that are not known any more, unless they have been called since `active`.
    pub fn forget(&self, active: Instant) {
        self.segments().retain(|_, series| {
            let numbers = series.numbers();
            numbers.in_flight > 0
                || numbers.last_began.is_some_and(|began| began > active)
                || self.known.contains(&series.function)
        });
    }

    /// The series of `function`, under `segment` too from now on.
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

/// A call in flight. Counted once, when it ends; one that is dropped has been left by its caller.
pub struct Call {
    series: Arc<Series>,
    /// Segment and function, while nobody knows whether it exists. Such a call is counted as started when its
    /// answer comes.
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

    /// The function that is called.
    pub fn function(&self) -> &Function {
        self.stranger.as_ref().map_or(&self.series.function, |stranger| &stranger.1)
    }

    /// Whether nobody has answered for the function yet.
    pub fn is_stranger(&self) -> bool {
        self.stranger.is_some()
    }

    /// Whether the function can be called without asking whether it is ready.
    pub fn is_warm(&self) -> bool {
        self.series.warm.is_warm()
    }

    /// The answer to the caller has `status`.
    pub fn answered(&mut self, status: StatusCode) {
        self.status = status;
    }

    /// The provider has answered for the function: it exists. One too many to be known stays a stranger.
    pub fn vouched_for(&mut self, shard: &Shard) {
        let vouched = self.stranger.take_if(|stranger| shard.known.learn(&stranger.1));
        if let Some(stranger) = vouched {
            let (segment, function) = *stranger;
            self.series = shard.insert(&segment, function);
            self.series.numbers().begin(self.began);
        }
    }

    /// The call is over.
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
