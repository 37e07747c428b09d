//! Scales functions by their load: up within seconds, down when a whole window was calm, to zero when nobody calls.
//!
//! Every gateway samples what it sees twice a second and, where there is NATS, tells the others. One of them acts: it
//! asks the provider every two seconds what there is, decides ([`decide`]), and has the provider change what is to be
//! changed. Waking what is at zero is not done here.

pub mod alerts;
pub mod decide;
pub mod exchange;
pub mod loads;
pub mod peers;
pub mod policy;
pub mod round;
pub mod sampler;
mod tended;
pub mod view;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::async_api::QueueIngress;
use crate::autoscale::decide::{Millis, Rules};
use crate::autoscale::exchange::{Ear, Exchange};
use crate::autoscale::peers::Peers;
use crate::autoscale::round::Rounds;
use crate::autoscale::sampler::Sampler;
use crate::autoscale::view::{Sampled, Standing, View};
use crate::function::Function;
use crate::metrics::Metrics;
use crate::metrics::autoscale::AutoscaleMetrics;
use crate::metrics::poller::ProviderPoller;

/// Between looks at what is in flight; so many make a sample.
const LOOK_EVERY: Duration = Duration::from_millis(125);
const LOOKS: u32 = 4;
/// So many samples from one round to the next, unless load has doubled.
const ROUND: u64 = 4;
/// Between looks for functions that are no more, in samples.
const TIDY: u64 = 120;

/// What an autoscaler is made from.
pub struct Parts {
    /// Asks the provider.
    pub poll: ProviderPoller,
    pub gauges: AutoscaleMetrics,
    pub ingress: Option<Arc<QueueIngress>>,
    pub rules: Rules,
    /// The other gateways.
    pub exchange: Option<(Exchange, Ear)>,
}

/// Scales functions until `stopping`.
pub async fn run(parts: Parts, stopping: CancellationToken) {
    let Parts { poll, gauges, ingress, rules, exchange } = parts;
    let began = Instant::now();
    let (exchange, ear) = exchange.unzip();
    let peers = exchange.as_ref().map(|exchange| Peers::new(exchange.id.clone(), 0));
    let view = Arc::new(Mutex::new(View::new(rules.window, peers, 0)));
    let metrics = Arc::clone(&poll.metrics);
    let (beats, beat) = watch::channel(0);
    let watcher = Watcher {
        sampler: Sampler::new(Arc::clone(&metrics), ingress.clone(), 0),
        metrics,
        exchange,
        view: Arc::clone(&view),
        beats,
        began,
    };
    let rounds = Rounds::new(poll, gauges, ingress, rules, Arc::clone(&view), began);
    let (goes, stays) = (watcher.run(stopping.clone()), async {
        tokio::join!(listen(ear, &view, began), act(rounds, beat));
    });
    // What is cut here is known to the provider or not, and decided anew by whoever comes next.
    tokio::select! {
        () = goes => {}
        () = stays => {}
    }
}

/// Tells gateways what a process does that is none, until `stopping`.
pub async fn tell(metrics: Arc<Metrics>, exchange: Exchange, stopping: CancellationToken) {
    let view = Arc::new(Mutex::new(View::new(0, None, 0)));
    let watcher = Watcher {
        sampler: Sampler::new(Arc::clone(&metrics), None, 0),
        metrics,
        exchange: Some(exchange),
        view,
        beats: watch::channel(0).0,
        began: Instant::now(),
    };
    watcher.run(stopping).await;
}

/// Samples, and tells.
struct Watcher {
    sampler: Sampler,
    metrics: Arc<Metrics>,
    exchange: Option<Exchange>,
    view: Arc<Mutex<View>>,
    /// The number of the last sample.
    beats: watch::Sender<u64>,
    began: Instant,
}

impl Watcher {
    async fn run(mut self, stopping: CancellationToken) {
        let mut looks = tokio::time::interval(LOOK_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        for number in 1.. {
            // Both branches are cancel-safe.
            tokio::select! {
                () = stopping.cancelled() => break,
                _ = looks.tick() => {}
            }
            match number % LOOKS {
                0 => self.sample(u64::from(number / LOOKS)).await,
                _ => self.sampler.look(),
            }
        }
        if let Some(exchange) = &self.exchange {
            exchange.leave().await;
        }
    }

    async fn sample(&mut self, beat: u64) {
        let now = millis(self.began);
        let (span, own) = self.sampler.sample(now);
        if let Some(exchange) = &self.exchange {
            exchange.tell(beat, &own).await;
        }
        let exists = |label: &str| {
            Function::parse(label, "")
                .is_some_and(|function| self.metrics.function_registry.contains(&function))
        };
        let connected = self.exchange.as_ref().is_some_and(Exchange::is_connected);
        let knows_queue = self.sampler.knows_queue();
        let mut view = lock(&self.view);
        view.sampled(Sampled { now, span, own, connected, knows_queue }, exists);
        if beat.is_multiple_of(TIDY) {
            view.retain(exists);
            self.sampler.forget();
        }
        drop(view);
        self.beats.send_replace(beat);
    }
}

/// Hears what the others say, if there is a way.
async fn listen(ear: Option<Ear>, view: &Mutex<View>, began: Instant) {
    let Some(mut ear) = ear else { return };
    loop {
        let message = ear.hear().await;
        if let Some(peers) = &mut lock(view).peers {
            peers.hear(message, millis(began));
        }
    }
}

/// Goes through the rounds, while this gateway is the one that acts.
async fn act(mut rounds: Rounds, mut beat: watch::Receiver<u64>) {
    let (mut acted, mut last) = (false, 0);
    while beat.changed().await.is_ok() {
        let number = *beat.borrow_and_update();
        let Standing { acts, gateways } = lock(&rounds.view).stand(millis(rounds.began));
        rounds.gauges.set_leadership(acts, gateways);
        match (std::mem::replace(&mut acted, acts), acts) {
            (false, true) => tracing::info!(gateways, "Scaling functions by their load"),
            (true, false) => tracing::info!(gateways, "Leaving it to another gateway to scale"),
            (false, false) | (true, true) => {}
        }
        if !acts {
            rounds.rest();
        } else if number - last >= ROUND || rounds.is_urgent() {
            last = number;
            rounds.round().await;
        }
    }
}

fn lock(view: &Mutex<View>) -> MutexGuard<'_, View> {
    view.lock().unwrap_or_else(PoisonError::into_inner)
}

fn millis(began: Instant) -> Millis {
    Millis::try_from(began.elapsed().as_millis()).unwrap_or(Millis::MAX)
}
