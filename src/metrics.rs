//! Every metric there is, by its name; the only room that knows the names. Methods are named for events.

pub mod autoscale;
pub mod calls;
mod families;
pub mod known;
pub mod query;
pub mod queue;
pub mod replicas;
pub mod traces;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http::{Method, StatusCode};
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry, TextEncoder};

pub use families::Replicas;

use crate::metrics::autoscale::AutoscaleMetrics;
use crate::metrics::calls::Shard;
use crate::metrics::families::Functions;
use crate::metrics::known::{FORGOTTEN_AFTER, Known};
use crate::metrics::queue::QueueMetrics;
use crate::metrics::traces::SpansDropped;

/// What has not been scraped for so long is over for Prometheus, too.
const SCRAPED_WITHIN: Duration = Duration::from_secs(300);

/// What a scrape shows.
pub struct Metrics {
    registry: Registry,
    functions: Functions,
    shards: Vec<Arc<Shard>>,
    replicas: Arc<ArcSwap<Vec<Replicas>>>,
    pub known: Arc<Known>,
    /// `http_requests_total`: requests of the API.
    requests: IntCounterVec,
    /// `http_request_duration_seconds`: the time until the head of their answer.
    request_seconds: HistogramVec,
    /// When all this was scraped last.
    scraped: Mutex<Option<Instant>>,
}

/// Calls of a function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activity {
    /// Begun since the process did.
    pub started: u64,
    pub in_flight: u64,
}

impl Metrics {
    /// Metrics for `threads` threads that carry calls.
    pub fn new(
        threads: usize,
        default_namespace: &Arc<str>,
    ) -> Result<Arc<Self>, prometheus::Error> {
        let known = Arc::new(Known::default());
        let shards: Vec<_> = (0..threads)
            .map(|_| Arc::new(Shard::new(Arc::clone(&known), Arc::clone(default_namespace))))
            .collect();
        let replicas = Arc::new(ArcSwap::default());
        let functions = Functions::new(shards.clone(), Arc::clone(&replicas));
        let labels = ["method", "path", "status"];
        let requests = IntCounterVec::new(
            Opts::new("http_requests_total", "Requests of /system and /async-function."),
            &labels,
        )?;
        let request_seconds = HistogramVec::new(
            HistogramOpts::new(
                "http_request_duration_seconds",
                "Time until the head of the answer to a request of /system or /async-function.",
            )
            .buckets(calls::BUCKETS.to_vec()),
            &labels,
        )?;
        let registry = Registry::new();
        registry.register(Box::new(functions.clone()))?;
        registry.register(Box::new(requests.clone()))?;
        registry.register(Box::new(request_seconds.clone()))?;
        Ok(Arc::new(Self {
            registry,
            functions,
            shards,
            replicas,
            known,
            requests,
            request_seconds,
            scraped: Mutex::default(),
        }))
    }

    /// The families of a queue, where there is one; `reconnects` is that of its connection.
    ///
    /// # Errors
    /// When they are registered already.
    pub fn queue(
        &self,
        name: &str,
        reconnects: Option<&str>,
    ) -> Result<QueueMetrics, prometheus::Error> {
        QueueMetrics::register(&self.registry, name, reconnects)
    }

    /// The family of spans, where somebody collects them.
    ///
    /// # Errors
    /// When it is registered already.
    pub fn traces(&self) -> Result<SpansDropped, prometheus::Error> {
        SpansDropped::register(&self.registry)
    }

    /// The families of the autoscaler, where there is one.
    ///
    /// # Errors
    /// When they are registered already.
    pub fn autoscale(&self) -> Result<AutoscaleMetrics, prometheus::Error> {
        AutoscaleMetrics::register(&self.registry)
    }

    /// What functions are doing, over all threads, by label.
    pub fn activity(&self) -> HashMap<Arc<str>, Activity> {
        let mut sums: HashMap<Arc<str>, Activity> = HashMap::new();
        for series in self.shards.iter().flat_map(|shard| shard.series()) {
            let (started, in_flight) = {
                let numbers = series.numbers();
                (numbers.started, numbers.in_flight)
            };
            let sum = sums.entry(Arc::clone(&series.label)).or_default();
            sum.started += started;
            // Of two threads' numbers one may be newer than the other.
            sum.in_flight += u64::try_from(in_flight).unwrap_or_default();
        }
        sums
    }

    /// The part of thread number `thread`.
    pub fn shard(&self, thread: usize) -> Arc<Shard> {
        Arc::clone(&self.shards[thread % self.shards.len()])
    }

    /// The provider has reported all its functions.
    pub fn replicas_reported(&self, replicas: Vec<Replicas>) {
        self.replicas.store(Arc::new(replicas));
    }

    /// Lets go of functions that were deleted long ago.
    pub fn forget_deleted(&self, now: Instant) {
        let Some(active) = now.checked_sub(FORGOTTEN_AFTER) else { return };
        for shard in &self.shards {
            shard.forget(active);
        }
    }

    /// Calls that have ended, by function.
    pub fn invocations(&self) -> HashMap<String, u64> {
        let calls = self.functions.calls();
        calls
            .iter()
            .map(|(label, numbers)| {
                (label.to_string(), numbers.by_code.iter().map(|(_, d)| d.count()).sum())
            })
            .collect()
    }

    /// Whether there is somebody who scrapes.
    pub fn is_scraped(&self, now: Instant) -> bool {
        let scraped = *self.scraped.lock().unwrap_or_else(PoisonError::into_inner);
        scraped.is_some_and(|last| now.saturating_duration_since(last) < SCRAPED_WITHIN)
    }

    /// The text that Prometheus reads.
    ///
    /// # Errors
    /// When the text cannot be made; nothing known leads there.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        *self.scraped.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }

    pub fn request_answered(
        &self,
        method: &Method,
        path: &str,
        status: StatusCode,
        took: Duration,
    ) {
        let labels = [method_label(method), path, status.as_str()];
        self.requests.with_label_values(&labels).inc();
        self.request_seconds.with_label_values(&labels).observe(took.as_secs_f64());
    }
}

/// Counts requests of the API under their route, never under their raw path.
pub async fn count_request(
    State(metrics): State<Arc<Metrics>>,
    request: Request,
    next: Next,
) -> Response {
    let began = Instant::now();
    let method = request.method().clone();
    let path = request.extensions().get::<MatchedPath>().cloned();
    let answer = next.run(request).await;
    if let Some(path) = path {
        metrics.request_answered(&method, path.as_str(), answer.status(), began.elapsed());
    }
    answer
}

/// Any token can be a method; only those that a route may have become labels.
fn method_label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        Method::PATCH => "PATCH",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrape_shows_that_somebody_scrapes_until_none_has_come_for_long() {
        let metrics = Metrics::new(1, &"fn".into()).unwrap();
        assert!(!metrics.is_scraped(Instant::now()));
        metrics.render().unwrap();
        assert!(metrics.is_scraped(Instant::now()));
        assert!(!metrics.is_scraped(Instant::now() + SCRAPED_WITHIN));
    }
}
