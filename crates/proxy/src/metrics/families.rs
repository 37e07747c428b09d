//! Metrics of functions: the sums of all shards, and the replicas in the provider's last list.

use std::collections::BTreeMap;
use std::sync::Arc;

use arc_swap::ArcSwap;
use prometheus::core::{Collector, Desc};
use prometheus::proto::{
    Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType,
};

use crate::metrics::calls::{BUCKETS, Counters, DurationHistogram, Shard};

/// Collector of call counters and replica gauges.
#[derive(Clone)]
pub(super) struct FunctionCollector {
    shards: Arc<[Arc<Shard>]>,
    replicas: Arc<ArcSwap<Vec<ReplicaGauges>>>,
    descriptions: Arc<[Desc]>,
}

/// Replicas and scaling limits of a function, as the provider reports them.
#[derive(Clone, Debug, PartialEq)]
pub struct ReplicaGauges {
    /// `function_name`
    pub label: String,
    pub desired: u64,
    pub ready: u64,
    pub min: u64,
    /// `com.openfaas.scale.type`
    pub scaling_type: String,
    /// `com.openfaas.scale.target`
    pub target: f64,
}

const INVOCATIONS: (&str, &str) = ("gateway_function_invocation_total", "Function metrics");
const STARTED: (&str, &str) =
    ("gateway_function_invocation_started", "The total number of function HTTP requests started.");
const SECONDS: (&str, &str) = ("gateway_functions_seconds", "Function time taken");
const IN_FLIGHT: (&str, &str) =
    ("gateway_function_invocation_inflight", "Calls of the function in flight.");
const DESIRED: (&str, &str) = ("gateway_service_count", "Desired replicas of the function.");
const READY: (&str, &str) = ("gateway_service_ready_count", "Ready replicas of the function.");
const MIN: (&str, &str) = ("gateway_service_min", "Minimum replicas of the function.");
const TARGET: (&str, &str) = ("gateway_service_target_load", "Target load per replica.");

impl FunctionCollector {
    pub(super) fn new(shards: Vec<Arc<Shard>>, replicas: Arc<ArcSwap<Vec<ReplicaGauges>>>) -> Self {
        let descriptions = [INVOCATIONS, STARTED, SECONDS, IN_FLIGHT, DESIRED, READY, MIN, TARGET]
            .into_iter()
            .filter_map(|(name, help)| {
                let labels = vec!["function_name".to_owned()];
                Desc::new(name.to_owned(), help.to_owned(), labels, Default::default()).ok()
            })
            .collect();
        Self { shards: shards.into(), replicas, descriptions }
    }

    /// Returns the counters of each function over all threads, by label.
    pub(super) fn totals(&self) -> BTreeMap<Arc<str>, Counters> {
        let mut sums: BTreeMap<Arc<str>, Counters> = BTreeMap::new();
        for series in self.shards.iter().flat_map(|shard| shard.series()) {
            let counters = series.counters().clone();
            let sum = sums.entry(Arc::clone(&series.handle.label)).or_default();
            sum.started += counters.started;
            sum.in_flight += counters.in_flight;
            for (code, durations) in counters.by_code {
                match sum.by_code.iter_mut().find(|(c, _)| *c == code) {
                    Some((_, mine)) => mine.add(&durations),
                    None => sum.by_code.push((code, durations)),
                }
            }
        }
        sums
    }
}

impl Collector for FunctionCollector {
    fn desc(&self) -> Vec<&Desc> {
        self.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let totals = self.totals();
        let replicas = self.replicas.load();
        // Deployed functions always have an in-flight gauge; others only while calls are in flight.
        let mut in_flight: BTreeMap<&str, i64> =
            replicas.iter().map(|r| (r.label.as_str(), 0)).collect();
        for (name, counters) in &totals {
            if counters.in_flight != 0 {
                in_flight.insert(name, counters.in_flight);
            }
        }
        let in_flight =
            in_flight.iter().map(|(name, count)| gauge(&[("function_name", name)], *count as f64));
        let by_code = |make: fn(&[(&str, &str)], &DurationHistogram) -> Metric| {
            totals
                .iter()
                .flat_map(|(name, counters)| counters.by_code.iter().map(move |by| (name, by)))
                .map(|(name, (code, durations))| {
                    make(&[("code", &code.to_string()), ("function_name", name)], durations)
                })
                .collect::<Vec<_>>()
        };
        let started = totals
            .iter()
            .filter(|(_, counters)| counters.started > 0)
            .map(|(name, counters)| counter(&[("function_name", name)], counters.started));
        let of_replicas = |value: fn(&ReplicaGauges) -> f64| {
            replicas.iter().map(|r| gauge(&[("function_name", &r.label)], value(r))).collect()
        };
        let target = |r: &ReplicaGauges| {
            gauge(&[("function_name", &r.label), ("scaling_type", &r.scaling_type)], r.target)
        };
        vec![
            family(STARTED, MetricType::COUNTER, started.collect()),
            family(IN_FLIGHT, MetricType::GAUGE, in_flight.collect()),
            family(INVOCATIONS, MetricType::COUNTER, by_code(|l, d| counter(l, d.count()))),
            family(SECONDS, MetricType::HISTOGRAM, by_code(histogram)),
            family(DESIRED, MetricType::GAUGE, of_replicas(|r| r.desired as f64)),
            family(READY, MetricType::GAUGE, of_replicas(|r| r.ready as f64)),
            family(MIN, MetricType::GAUGE, of_replicas(|r| r.min as f64)),
            family(TARGET, MetricType::GAUGE, replicas.iter().map(target).collect()),
        ]
    }
}

fn family((name, help): (&str, &str), kind: MetricType, metrics: Vec<Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name.to_owned());
    family.set_help(help.to_owned());
    family.set_field_type(kind);
    family.set_metric(metrics);
    family
}

fn metric(labels: &[(&str, &str)]) -> Metric {
    let labels = labels.iter().map(|(name, value)| {
        let mut pair = LabelPair::default();
        pair.set_name((*name).to_owned());
        pair.set_value((*value).to_owned());
        pair
    });
    Metric::from_label(labels.collect())
}

fn counter(labels: &[(&str, &str)], value: u64) -> Metric {
    let mut counter = Counter::default();
    counter.set_value(value as f64);
    let mut metric = metric(labels);
    metric.set_counter(counter);
    metric
}

fn gauge(labels: &[(&str, &str)], value: f64) -> Metric {
    let mut gauge = Gauge::default();
    gauge.set_value(value);
    let mut metric = metric(labels);
    metric.set_gauge(gauge);
    metric
}

fn histogram(labels: &[(&str, &str)], durations: &DurationHistogram) -> Metric {
    let mut below = 0;
    let buckets = BUCKETS.iter().zip(durations.buckets).map(|(bound, count)| {
        below += count;
        let mut bucket = Bucket::default();
        bucket.set_upper_bound(*bound);
        bucket.set_cumulative_count(below);
        bucket
    });
    let mut histogram = Histogram::default();
    histogram.set_bucket(buckets.collect());
    histogram.set_sample_count(durations.count());
    histogram.set_sample_sum(durations.nanos as f64 / 1e9);
    let mut metric = metric(labels);
    metric.set_histogram(histogram);
    metric
}
