//! The autoscaler, put together.

use std::sync::Arc;

use crate::app::worker;
use crate::autoscale::decide::{Millis, Rules};
use crate::autoscale::exchange::Exchange;
use crate::autoscale::{self, Parts};
use crate::config;
use crate::config::autoscale::Autoscale;
use crate::metrics::Metrics;
use crate::metrics::poller::ProviderPoller;
use crate::queued::Intake;
use crate::shutdown::Tasks;

/// Tells the gateways what a worker calls by itself.
pub(super) async fn tell(
    queue: &config::Queue,
    metrics: Arc<Metrics>,
    tasks: &Tasks,
) -> anyhow::Result<()> {
    let (exchange, _ear) = Exchange::open(&worker::options(queue), true).await?;
    tasks.spawn(|stopping| autoscale::tell(metrics, exchange, stopping));
    Ok(())
}

/// Starts to scale functions by their load. `may_zero`: something wakes those that are at zero.
pub(super) async fn start(
    config: Autoscale,
    queue: &config::Queue,
    may_zero: bool,
    poll: ProviderPoller,
    intake: Option<Arc<Intake>>,
    tasks: &Tasks,
) -> anyhow::Result<()> {
    let exchange = match queue.nats.servers.is_empty() {
        true => None,
        false => Some(Exchange::open(&worker::options(queue), false).await?),
    };
    let gauges = poll.metrics.autoscale()?;
    let window = Millis::try_from(config.window.as_millis()).unwrap_or(Millis::MAX);
    let parts = Parts { poll, gauges, intake, rules: Rules { window, may_zero }, exchange };
    tasks.spawn(|stopping| autoscale::run(parts, stopping));
    Ok(())
}
