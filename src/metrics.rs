//! All metrics, by name; no other module knows the names. Methods are named for events.

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

/// Prometheus marks a series as stale after this time without a scrape.
const SCRAPED_WITHIN: Duration = Duration::from_secs(300);

/// All metrics of the process.
pub struct Metrics {
    registry: Registry,
    functions: Functions,
    shards: Vec<Arc<Shard>>,
    replicas: Arc<ArcSwap<Vec<Replicas>>>,
    pub known: Arc<Known>,
    /// `http_requests_total`: requests to the API.
    requests: IntCounterVec,
    /// `http_request_duration_seconds`: time until the response head.
    request_seconds: HistogramVec,
    /// Time of the last scrape.
    scraped: Mutex<Option<Instant>>,
}

/// Load of a function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Activity {
    /// Calls started since the start of the process.
    pub started: u64,
    pub in_flight: u64,
}

impl Metrics {
    /// Creates the metrics of a process with `threads` proxy threads.
    ///
    /// # Errors
    /// A metric cannot be registered. No known input leads to this.
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
            Opts::new("http_requests_total", "Requests to /system and /async-function."),
            &labels,
        )?;
        let request_seconds = HistogramVec::new(
            HistogramOpts::new(
                "http_request_duration_seconds",
                "Time until the response head of requests to /system and /async-function.",
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

    /// Registers the metrics of the queue `name`. `reconnects`: name of its counter of reconnections, if it has one.
    ///
    /// # Errors
    /// They are registered already.
    pub fn queue(
        &self,
        name: &str,
        reconnects: Option<&str>,
    ) -> Result<QueueMetrics, prometheus::Error> {
        QueueMetrics::register(&self.registry, name, reconnects)
    }

    /// Registers the metric of dropped spans.
    ///
    /// # Errors
    /// It is registered already.
    pub fn traces(&self) -> Result<SpansDropped, prometheus::Error> {
        SpansDropped::register(&self.registry)
    }

    /// Registers the metrics of the autoscaler.
    ///
    /// # Errors
    /// They are registered already.
    pub fn autoscale(&self) -> Result<AutoscaleMetrics, prometheus::Error> {
        AutoscaleMetrics::register(&self.registry)
    }

    /// Returns the load of each function over all threads, by label.
    pub fn activity(&self) -> HashMap<Arc<str>, Activity> {
        let mut sums: HashMap<Arc<str>, Activity> = HashMap::new();
        for series in self.shards.iter().flat_map(|shard| shard.series()) {
            let (started, in_flight) = {
                let numbers = series.numbers();
                (numbers.started, numbers.in_flight)
            };
            let sum = sums.entry(Arc::clone(&series.label)).or_default();
            sum.started += started;
            // The counters of two threads are read at different times, so the sum may be negative.
            sum.in_flight += u64::try_from(in_flight).unwrap_or_default();
        }
        sums
    }

    /// Returns the shard of a thread.
    pub fn shard(&self, thread: usize) -> Arc<Shard> {
        Arc::clone(&self.shards[thread % self.shards.len()])
    }

    /// Sets the replica gauges of all functions.
    pub fn replicas_reported(&self, replicas: Vec<Replicas>) {
        self.replicas.store(Arc::new(replicas));
    }

    /// Removes the series of functions deleted longer than [`RETENTION`] ago.
    pub fn forget_deleted(&self, now: Instant) {
        let Some(active) = now.checked_sub(FORGOTTEN_AFTER) else { return };
        for shard in &self.shards {
            shard.forget(active);
        }
    }

    /// Returns the number of finished calls, by function.
    pub fn invocations(&self) -> HashMap<String, u64> {
        let calls = self.functions.calls();
        calls
            .iter()
            .map(|(label, numbers)| {
                (label.to_string(), numbers.by_code.iter().map(|(_, d)| d.count()).sum())
            })
            .collect()
    }

    /// Returns whether the metrics are being scraped.
    pub fn is_scraped(&self, now: Instant) -> bool {
        let scraped = *self.scraped.lock().unwrap_or_else(PoisonError::into_inner);
        scraped.is_some_and(|last| now.saturating_duration_since(last) < SCRAPED_WITHIN)
    }

    /// Renders the metrics in the Prometheus text format.
    ///
    /// # Errors
    /// A metric cannot be encoded. No known input leads to this.
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

/// Middleware that counts requests to the API, labelled with their route, never with the raw path.
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

/// Any token can be a method; only known ones become labels.
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
    fn metrics_count_as_scraped_until_the_scrape_timeout() {
        let metrics = Metrics::new(1, &"fn".into()).unwrap();
        assert!(!metrics.is_scraped(Instant::now()));
        metrics.render().unwrap();
        assert!(metrics.is_scraped(Instant::now()));
        assert!(!metrics.is_scraped(Instant::now() + SCRAPED_WITHIN));
    }
}
