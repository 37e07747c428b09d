//! Samples the load that this process sees.

use std::collections::HashMap;
use std::sync::Arc;

use crate::decide::MonotonicMillis;
use crate::loads::LoadSample;
use gateway_proxy::metrics::{FunctionLoad, Metrics};
use gateway_queue::ingress::QueueIngress;

/// Polls the metrics several times per sample, since calls in flight come and go.
pub struct Sampler {
    metrics: Arc<Metrics>,
    ingress: Option<Arc<QueueIngress>>,
    /// Calls started until the last sample.
    started: HashMap<Arc<str>, u64>,
    /// Calls in flight, summed over the polls since.
    in_flight_sum: HashMap<Arc<str>, u64>,
    polls: u32,
    last_sample: MonotonicMillis,
}

impl Sampler {
    pub fn new(
        metrics: Arc<Metrics>,
        ingress: Option<Arc<QueueIngress>>,
        now: MonotonicMillis,
    ) -> Self {
        let started =
            metrics.function_loads().into_iter().map(|(label, load)| (label, load.started));
        let started = started.collect();
        Self {
            metrics,
            ingress,
            started,
            in_flight_sum: HashMap::new(),
            polls: 0,
            last_sample: now,
        }
    }

    /// Polls the calls in flight.
    pub fn poll(&mut self) {
        let activity = self.metrics.function_loads();
        self.add_poll(&activity);
    }

    fn add_poll(&mut self, activity: &HashMap<Arc<str>, FunctionLoad>) {
        self.polls += 1;
        for (label, load) in activity.iter().filter(|(_, load)| load.in_flight > 0) {
            *self.in_flight_sum.entry(Arc::clone(label)).or_default() += load.in_flight;
        }
    }

    /// Polls once more. Returns the duration since the last sample, and the loads during it.
    pub fn sample(
        &mut self,
        now: MonotonicMillis,
    ) -> (MonotonicMillis, HashMap<Arc<str>, LoadSample>) {
        let activity = self.metrics.function_loads();
        self.add_poll(&activity);
        let span = now.saturating_sub(self.last_sample).max(1);
        #[expect(clippy::cast_precision_loss, reason = "far from 2^53 milliseconds or calls")]
        let per_second = |calls: u64| calls as f64 * 1000.0 / span as f64;
        let polls = f64::from(self.polls);
        let mut loads: HashMap<Arc<str>, LoadSample> = HashMap::new();
        for (label, load) in activity {
            let before = self.started.insert(Arc::clone(&label), load.started);
            // A function that was removed and added again counts from zero.
            let calls = load.started.saturating_sub(before.unwrap_or(0));
            if calls > 0 {
                loads.entry(label).or_default().rps = per_second(calls);
            }
        }
        for (label, sum) in self.in_flight_sum.drain() {
            #[expect(clippy::cast_precision_loss, reason = "far from 2^53 calls")]
            let mean = sum as f64 / polls;
            loads.entry(label).or_default().in_flight = mean;
        }
        if let Some(depths) =
            self.ingress.as_ref().and_then(|ingress| ingress.pending_by_function())
        {
            for (label, calls) in depths.iter() {
                loads.entry(Arc::clone(label)).or_default().queued = *calls;
            }
        }
        (self.polls, self.last_sample) = (0, now);
        (span, loads)
    }

    /// Returns whether the number of queued calls is known; true without a queue.
    pub fn queue_depth_known(&self) -> bool {
        self.ingress.as_ref().is_none_or(|ingress| ingress.pending_by_function().is_some())
    }

    /// Removes functions that have no metrics any more.
    pub fn forget_removed(&mut self) {
        let existing = self.metrics.function_loads();
        self.started.retain(|label, _| existing.contains_key(label));
    }
}
