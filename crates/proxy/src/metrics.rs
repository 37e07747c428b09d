//! All metrics, by name; no other module knows the names. Methods are named for events.

pub mod autoscale;
pub mod calls;
mod families;
pub mod query;
pub mod traces;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use axum::extract::{MatchedPath, Request, State};
use axum::middleware::Next;
use axum::response::Response;
use http::{Method, StatusCode};
use prometheus::{HistogramOpts, HistogramVec, IntCounterVec, Opts, Registry, TextEncoder};

pub use families::ReplicaGauges;

use crate::functions::registry::{FunctionRegistry, RETENTION};
use crate::metrics::autoscale::AutoscaleMetrics;
use crate::metrics::calls::Shard;
use crate::metrics::families::FunctionCollector;
use crate::metrics::traces::SpansDropped;
use gateway_base::sync::lock_unpoisoned;
use gateway_queue::metrics::QueueMetrics;

/// Prometheus marks a series as stale after this time without a scrape.
const SCRAPE_TIMEOUT: Duration = Duration::from_secs(300);

/// All metrics of the process.
pub struct Metrics {
    registry: Registry,
    function_collector: FunctionCollector,
    shards: Vec<Arc<Shard>>,
    replicas: Arc<ArcSwap<Vec<ReplicaGauges>>>,
    pub function_registry: Arc<FunctionRegistry>,
    /// `http_requests_total`: requests to the API.
    requests: IntCounterVec,
    /// `http_request_duration_seconds`: time until the response head.
    request_seconds: HistogramVec,
    /// Time of the last scrape. A leaf.
    last_scrape: Mutex<Option<Instant>>,
}

/// Load of a function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FunctionLoad {
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
        let function_registry = Arc::new(FunctionRegistry::default());
        let shards: Vec<_> = (0..threads)
            .map(|_| {
                Arc::new(Shard::new(Arc::clone(&function_registry), Arc::clone(default_namespace)))
            })
            .collect();
        let replicas = Arc::new(ArcSwap::default());
        let function_collector = FunctionCollector::new(shards.clone(), Arc::clone(&replicas));
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
        registry.register(Box::new(function_collector.clone()))?;
        registry.register(Box::new(requests.clone()))?;
        registry.register(Box::new(request_seconds.clone()))?;
        Ok(Arc::new(Self {
            registry,
            function_collector,
            shards,
            replicas,
            function_registry,
            requests,
            request_seconds,
            last_scrape: Mutex::default(),
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
    pub fn function_loads(&self) -> HashMap<Arc<str>, FunctionLoad> {
        let mut sums: HashMap<Arc<str>, FunctionLoad> = HashMap::new();
        for series in self.shards.iter().flat_map(|shard| shard.series()) {
            let (started, in_flight) = {
                let counters = series.counters();
                (counters.started, counters.in_flight)
            };
            let sum = sums.entry(Arc::clone(&series.handle.label)).or_default();
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
    pub fn set_replicas(&self, replicas: Vec<ReplicaGauges>) {
        self.replicas.store(Arc::new(replicas));
    }

    /// Removes the series of functions deleted longer than [`RETENTION`] ago.
    pub fn remove_deleted(&self, now: Instant) {
        let Some(active) = now.checked_sub(RETENTION) else { return };
        for shard in &self.shards {
            shard.remove_inactive(active);
        }
    }

    /// Returns the number of finished calls, by function.
    pub fn invocations(&self) -> HashMap<String, u64> {
        let calls = self.function_collector.totals();
        calls
            .iter()
            .map(|(label, counters)| {
                (label.to_string(), counters.by_code.iter().map(|(_, d)| d.count()).sum())
            })
            .collect()
    }

    /// Returns whether the metrics are being scraped.
    pub fn is_scraped(&self, now: Instant) -> bool {
        let last_scrape = *lock_unpoisoned(&self.last_scrape);
        last_scrape.is_some_and(|last| now.saturating_duration_since(last) < SCRAPE_TIMEOUT)
    }

    /// Renders the metrics in the Prometheus text format.
    ///
    /// # Errors
    /// A metric cannot be encoded. No known input leads to this.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        *lock_unpoisoned(&self.last_scrape) = Some(Instant::now());
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }

    /// Counts a request to the API and its duration.
    pub fn record_api_request(
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
    let response = next.run(request).await;
    if let Some(path) = path {
        metrics.record_api_request(&method, path.as_str(), response.status(), began.elapsed());
    }
    response
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
        assert!(!metrics.is_scraped(Instant::now() + SCRAPE_TIMEOUT));
    }
}
