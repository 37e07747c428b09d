//! Scales functions by their load: up within seconds, down after a calm window, and to zero without calls.
//!
//! Every gateway samples its own load twice a second and publishes it on NATS, if that is configured. One gateway is
//! the leader: every two seconds it lists the functions, computes the desired replicas of each ([`decide`](crate::decide)), and sends
//! the changes to the provider. Functions at zero are scaled up by requests, not here.

use futures_util::future::BoxFuture;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::cluster_view::{ClusterView, Leadership, Sample};
use crate::decide::{AutoscaleRules, MonotonicMillis};
use crate::gossip::{LoadPublisher, LoadSubscriber};
use crate::peers::Peers;
use crate::reconciler::Reconciler;
use crate::sampler::Sampler;
use gateway_base::function::Function;
use gateway_base::sync::lock_unpoisoned;
use gateway_proxy::function_source::ProviderPoller;
use gateway_proxy::metrics::Metrics;
use gateway_proxy::metrics::autoscale::AutoscaleMetrics;
use gateway_queue::ingress::QueueIngress;

/// Interval between polls of the calls in flight, and polls per sample.
const POLL_INTERVAL: Duration = Duration::from_millis(125);
const POLLS_PER_SAMPLE: u32 = 4;
/// Samples per reconciliation, unless load has doubled.
const SAMPLES_PER_ROUND: u64 = 4;
/// Interval between removals of functions that no longer exist, in samples.
const GC_EVERY_SAMPLES: u64 = 120;

/// Dependencies of the autoscaler.
pub struct AutoscalerDeps {
    /// Lists functions, and sends changes to the provider.
    pub poller: ProviderPoller,
    pub gauges: AutoscaleMetrics,
    pub ingress: Option<Arc<QueueIngress>>,
    pub rules: AutoscaleRules,
    /// Exchange of loads with other gateways.
    pub gossip: Option<(LoadPublisher, LoadSubscriber)>,
}

/// Scales functions until `stopping`.
pub fn run(deps: AutoscalerDeps, stopping: CancellationToken) -> BoxFuture<'static, ()> {
    Box::pin(async move {
        let AutoscalerDeps { poller, gauges, ingress, rules, gossip: publisher } = deps;
        let started_at = Instant::now();
        let (publisher, subscriber) = publisher.unzip();
        let peers = publisher.as_ref().map(|publisher| Peers::new(publisher.id.clone(), 0));
        let view = Arc::new(Mutex::new(ClusterView::new(rules.window, peers, 0)));
        let metrics = Arc::clone(&poller.metrics);
        let (samples, sample) = watch::channel(0);
        let sample_loop = SampleLoop {
            sampler: Sampler::new(Arc::clone(&metrics), ingress.clone(), 0),
            metrics,
            publisher,
            view: Arc::clone(&view),
            samples,
            started_at,
        };
        let reconciler =
            Reconciler::new(poller, gauges, ingress, rules, Arc::clone(&view), started_at);
        let (sampling, reconciling) = (sample_loop.run(stopping.clone()), async {
            tokio::join!(
                receive_reports(subscriber, &view, started_at),
                run_rounds(reconciler, sample)
            );
        });
        // A request to the provider that is cut here may have taken effect. The next leader decides from the listed
        // replicas.
        tokio::select! {
            () = sampling => {}
            () = reconciling => {}
        }
    })
}

/// Publishes the load of a process that never becomes the leader, until `stopping`.
pub fn publish_load_only(
    metrics: Arc<Metrics>,
    publisher: LoadPublisher,
    stopping: CancellationToken,
) -> BoxFuture<'static, ()> {
    Box::pin(async move {
        let view = Arc::new(Mutex::new(ClusterView::new(0, None, 0)));
        let sample_loop = SampleLoop {
            sampler: Sampler::new(Arc::clone(&metrics), None, 0),
            metrics,
            publisher: Some(publisher),
            view,
            samples: watch::channel(0).0,
            started_at: Instant::now(),
        };
        sample_loop.run(stopping).await;
    })
}

/// Takes samples and publishes them.
struct SampleLoop {
    sampler: Sampler,
    metrics: Arc<Metrics>,
    publisher: Option<LoadPublisher>,
    /// Loads of all gateways. Rank 2: the registry of functions is locked under it.
    view: Arc<Mutex<ClusterView>>,
    /// Number of the last sample.
    samples: watch::Sender<u64>,
    started_at: Instant,
}

impl SampleLoop {
    async fn run(mut self, stopping: CancellationToken) {
        let mut polls = tokio::time::interval(POLL_INTERVAL);
        polls.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for number in 1.. {
            // Both branches are cancel-safe.
            tokio::select! {
                () = stopping.cancelled() => break,
                _ = polls.tick() => {}
            }
            match number % POLLS_PER_SAMPLE {
                0 => self.sample(u64::from(number / POLLS_PER_SAMPLE)).await,
                _ => self.sampler.poll(),
            }
        }
        if let Some(publisher) = &self.publisher {
            publisher.leave().await;
        }
    }

    async fn sample(&mut self, sample: u64) {
        let now = elapsed_millis(self.started_at);
        let (span, own) = self.sampler.sample(now);
        if let Some(publisher) = &self.publisher {
            publisher.publish(sample, &own).await;
        }
        let exists = |label: &str| {
            Function::parse(label, "")
                .is_some_and(|function| self.metrics.function_registry.contains(&function))
        };
        let connected = self.publisher.as_ref().is_some_and(LoadPublisher::is_connected);
        let queue_depth_known = self.sampler.queue_depth_known();
        let mut view = lock_unpoisoned(&self.view);
        view.add_sample(Sample { now, span, own, connected, queue_depth_known }, exists);
        if sample.is_multiple_of(GC_EVERY_SAMPLES) {
            view.retain(exists);
            self.sampler.forget_removed();
        }
        drop(view);
        self.samples.send_replace(sample);
    }
}

/// Receives the reports of other gateways, if there is a subscription.
async fn receive_reports(
    subscriber: Option<LoadSubscriber>,
    view: &Mutex<ClusterView>,
    started_at: Instant,
) {
    let Some(mut subscriber) = subscriber else { return };
    loop {
        let message = subscriber.recv().await;
        if let Some(peers) = &mut lock_unpoisoned(view).peers {
            peers.on_report(message, elapsed_millis(started_at));
        }
    }
}

/// Reconciles while this gateway is the leader.
async fn run_rounds(mut reconciler: Reconciler, mut sample: watch::Receiver<u64>) {
    let (mut was_leader, mut last) = (false, 0);
    while sample.changed().await.is_ok() {
        let number = *sample.borrow_and_update();
        let Leadership { is_leader, members } = lock_unpoisoned(&reconciler.view)
            .update_leadership(elapsed_millis(reconciler.started_at));
        reconciler.gauges.set_leadership(is_leader, members);
        match (std::mem::replace(&mut was_leader, is_leader), is_leader) {
            (false, true) => tracing::info!(members, "Scaling functions by load"),
            (true, false) => tracing::info!(members, "Another gateway scales functions now"),
            (false, false) | (true, true) => {}
        }
        if !is_leader {
            reconciler.step_down();
        } else if number - last >= SAMPLES_PER_ROUND || reconciler.is_urgent() {
            last = number;
            reconciler.reconcile().await;
        }
    }
}

fn elapsed_millis(started_at: Instant) -> MonotonicMillis {
    MonotonicMillis::try_from(started_at.elapsed().as_millis()).unwrap_or(MonotonicMillis::MAX)
}
