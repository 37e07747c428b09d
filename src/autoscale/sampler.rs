//! What this process itself sees of functions, made samples of.

use std::collections::HashMap;
use std::sync::Arc;

use crate::async_api::QueueIngress;
use crate::autoscale::decide::Millis;
use crate::autoscale::loads::Load;
use crate::metrics::{FunctionLoad, Metrics};

/// Looks at the metrics several times for each sample: calls in flight come and go.
pub struct Sampler {
    metrics: Arc<Metrics>,
    ingress: Option<Arc<QueueIngress>>,
    /// Calls that had begun at the last sample.
    started: HashMap<Arc<str>, u64>,
    /// Calls in flight, added up over the looks since.
    in_flight: HashMap<Arc<str>, u64>,
    looks: u32,
    last: Millis,
}

impl Sampler {
    pub fn new(metrics: Arc<Metrics>, ingress: Option<Arc<QueueIngress>>, now: Millis) -> Self {
        let started = metrics.function_loads().into_iter().map(|(label, it)| (label, it.started));
        let started = started.collect();
        Self { metrics, ingress, started, in_flight: HashMap::new(), looks: 0, last: now }
    }

    /// Looks at what is in flight.
    pub fn look(&mut self) {
        let activity = self.metrics.function_loads();
        self.look_at(&activity);
    }

    fn look_at(&mut self, activity: &HashMap<Arc<str>, FunctionLoad>) {
        self.looks += 1;
        for (label, it) in activity.iter().filter(|(_, it)| it.in_flight > 0) {
            *self.in_flight.entry(Arc::clone(label)).or_default() += it.in_flight;
        }
    }

    /// Looks once more, and says what was since the last sample, and for how long.
    pub fn sample(&mut self, now: Millis) -> (Millis, HashMap<Arc<str>, Load>) {
        let activity = self.metrics.function_loads();
        self.look_at(&activity);
        let span = now.saturating_sub(self.last).max(1);
        #[expect(clippy::cast_precision_loss, reason = "far from 2^53 milliseconds or calls")]
        let per_second = |calls: u64| calls as f64 * 1000.0 / span as f64;
        let looks = f64::from(self.looks);
        let mut loads: HashMap<Arc<str>, Load> = HashMap::new();
        for (label, it) in activity {
            let before = self.started.insert(Arc::clone(&label), it.started);
            // A function that was forgotten meanwhile counts from zero again.
            let calls = it.started.saturating_sub(before.unwrap_or(0));
            if calls > 0 {
                loads.entry(label).or_default().rps = per_second(calls);
            }
        }
        for (label, sum) in self.in_flight.drain() {
            #[expect(clippy::cast_precision_loss, reason = "far from 2^53 calls")]
            let mean = sum as f64 / looks;
            loads.entry(label).or_default().in_flight = mean;
        }
        if let Some(held) = self.ingress.as_ref().and_then(|ingress| ingress.pending_by_function())
        {
            for (label, calls) in held.iter() {
                loads.entry(Arc::clone(label)).or_default().queued = *calls;
            }
        }
        (self.looks, self.last) = (0, now);
        (span, loads)
    }

    /// Whether it is known what the queue holds, where there is one.
    pub fn knows_queue(&self) -> bool {
        self.ingress.as_ref().is_none_or(|ingress| ingress.pending_by_function().is_some())
    }

    /// Forgets functions that are counted no more.
    pub fn forget(&mut self) {
        let there = self.metrics.function_loads();
        self.started.retain(|label, _| there.contains_key(label));
    }
}
