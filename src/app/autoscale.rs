//! Builds the autoscaler.

use std::sync::Arc;

use crate::app::worker;
use crate::config;
use crate::config::autoscale::Autoscale;
use gateway_autoscaler::decide::{AutoscaleRules, MonotonicMillis};
use gateway_autoscaler::gossip::LoadPublisher;
use gateway_autoscaler::{self as autoscale, AutoscalerDeps};
use gateway_base::shutdown::Tasks;
use gateway_proxy::function_source::ProviderPoller;
use gateway_proxy::metrics::Metrics;
use gateway_queue::ingress::QueueIngress;

/// Publishes the load that a worker generates to the gateways, which make the scaling decisions.
///
/// # Errors
/// When the NATS options are invalid.
pub(super) async fn publish_load_only(
    queue: &config::Queue,
    metrics: Arc<Metrics>,
    tasks: &Tasks,
) -> anyhow::Result<()> {
    let (publisher, _subscriber) = LoadPublisher::open(&worker::nats_options(queue), true).await?;
    tasks.spawn(|stopping| autoscale::publish_load_only(metrics, publisher, stopping));
    Ok(())
}

/// Starts the autoscaler. `may_zero`: functions at zero replicas are started by requests, so scaling to zero is
/// allowed.
///
/// # Errors
/// When the NATS options are invalid or a metric is registered twice.
pub(super) async fn start(
    config: Autoscale,
    queue: &config::Queue,
    may_zero: bool,
    poll: ProviderPoller,
    ingress: Option<Arc<QueueIngress>>,
    tasks: &Tasks,
) -> anyhow::Result<()> {
    let gossip = match queue.nats.servers.is_empty() {
        true => None,
        false => Some(LoadPublisher::open(&worker::nats_options(queue), false).await?),
    };
    let gauges = poll.metrics.autoscale()?;
    let window =
        MonotonicMillis::try_from(config.window.as_millis()).unwrap_or(MonotonicMillis::MAX);
    let rules = AutoscaleRules { window, zero_allowed: may_zero };
    let deps = AutoscalerDeps { poller: poll, gauges, ingress, rules, gossip };
    tasks.spawn(|stopping| autoscale::run(deps, stopping));
    Ok(())
}
