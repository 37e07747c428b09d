//! The worker role: executes queued calls, and serves metrics on its own port.

use std::sync::Arc;

use anyhow::{Context, bail};

use crate::app::threads::Threads;
use crate::app::worker::{DepthPolling, QueueRole};
use crate::app::{autoscale, gateway, run_until_signal, worker};
use crate::config::{self, Shutdown, WorkerTarget};
use gateway_api::router;
use gateway_base::shutdown::{ShutdownPhases, Signals, Tasks};
use gateway_http::allowed_hosts::InternalHosts;
use gateway_http::client::{Client, Origin, Tls};
use gateway_http::credentials::Credentials;
use gateway_http::limit::ConcurrencyLimit;
use gateway_http::server::listener::bind;
use gateway_http::server::raise_file_limit;
use gateway_provider::Provider;
use gateway_proxy::activator::Activator;
use gateway_proxy::function_source::ProviderPoller;
use gateway_proxy::invoke::dispatcher::Dispatcher;
use gateway_proxy::metrics::Metrics;
use gateway_proxy::readiness::Readiness;
use gateway_worker::CallLogging;
use gateway_worker::callback::own_addresses::OwnAddresses;
use gateway_worker::function_client::FunctionClient;

/// `gateway worker`
pub(super) fn run(config: config::Worker) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    super::block_on(runtime, async {
        let signals = Signals::listen().context("cannot listen for signals")?;
        let (phases, tasks) = (ShutdownPhases::default(), Tasks::default());
        // No load balancer sends it requests, so draining needs no delay.
        let shutdown = Shutdown { delay: std::time::Duration::ZERO, grace: config.shutdown_grace };
        let threads = start(config, &phases, &tasks).await?;
        run_until_signal(threads, signals, phases, tasks, shutdown).await
    })
}

async fn start(
    config: config::Worker,
    phases: &ShutdownPhases,
    tasks: &Tasks,
) -> anyhow::Result<Threads> {
    let listener = bind(config.metrics, 1)?.remove(0);
    let address = listener.local_addr()?;
    raise_file_limit();
    let credentials = match &config.credentials_dir {
        Some(directory) => Some(Credentials::read(directory)?),
        None => None,
    };
    let namespace: Arc<str> = config.namespace.as_str().into();
    let metrics = Metrics::new(1, &namespace)?;
    let (url, shard) = match &config.target {
        WorkerTarget::Provider(url) => (url, metrics.shard(0)),
        // The gateway counts these invocations. The worker's own counters go to a registry that is not scraped.
        WorkerTarget::Gateway(url) => (url, Metrics::new(1, &namespace)?.shard(0)),
    };
    let Some(ingress) =
        worker::open_queue(&config.queue, &metrics, &namespace, QueueRole::Consumer).await?
    else {
        bail!("no queue is configured to receive calls from");
    };
    let (origin, tls) = (Origin::new(url.clone()), Tls::default());
    let client = || Client::with_connect_timeout(config.connect_timeout, config.pool, tls.clone());
    let provider = |client, timeout| Provider {
        client,
        origin: origin.clone(),
        credentials: credentials.clone(),
        timeout,
    };
    let (worker_client, background_client) = (client(), client());
    // A gateway starts functions at zero replicas itself.
    let limits = config.cold_start.filter(|_| matches!(config.target, WorkerTarget::Provider(_)));
    let activator = limits.map(|limits| {
        let provider = provider(Arc::clone(&background_client), config.upstream_timeout);
        Activator::new(provider, Arc::clone(&metrics.function_registry), limits, tasks)
    });
    let function_client = FunctionClient {
        client: Arc::clone(&worker_client),
        origin: origin.clone(),
        dispatcher: Dispatcher { activator, shard },
        timeout: config.upstream_timeout,
        budget: ingress.budget.clone(),
    };
    let policy_source = provider(worker_client, config.upstream_timeout);
    let tracer =
        gateway::build_tracer(&config.tracing, "gateway-worker", &metrics, client(), tasks)?;
    let deps = worker::WorkerDeps {
        ingress: Arc::clone(&ingress),
        function_client,
        provider: policy_source,
        tls: tls.clone(),
        tracer,
        own_addresses: own_addresses(&config, address.port()),
        registry: Arc::clone(&metrics.function_registry),
        default_namespace: Arc::clone(&namespace),
        // A worker is bounded by its concurrency.
        limit: None,
    };
    let mut worker = worker::build_worker(&config.queue, deps)?;
    worker.logging = CallLogging { bodies: config.log_bodies, calls: config.log_calls };
    let readiness =
        Readiness::new(phases.clone(), ConcurrencyLimit::new(config.queue.max_inflight, 1));
    let list_timeout = config.upstream_timeout.min(gateway::PROVIDER_LIST_TIMEOUT);
    let list_provider = provider(Arc::clone(&background_client), list_timeout);
    let poller = provider_poller(list_provider, namespace, &metrics, &readiness);
    tasks.spawn(|stopping| poller.run(stopping));
    spawn_idle_reaper(background_client, tasks);
    if let Some(credentials) = credentials {
        tasks.spawn(|stopping| credentials.watch_files(stopping, phases.reloads()));
    }
    if matches!(config.target, WorkerTarget::Provider(_)) {
        autoscale::publish_load_only(&config.queue, Arc::clone(&metrics), tasks).await?;
    }
    let (checked, depth_polling) =
        (Arc::clone(&readiness), DepthPolling::WhileScraped(Arc::clone(&metrics)));
    tasks
        .spawn(|stopping| worker::run_queue_maintenance(ingress, checked, depth_polling, stopping));
    let router = router::worker(metrics, InternalHosts::new(&config.metrics_hosts), readiness);
    gateway::serve_metrics(router, listener, gateway::ADMIN_TIMEOUTS, Arc::default(), tasks);
    tracing::info!(metrics = %address, calls = %url, "Executing queued calls");
    let phases = phases.clone();
    // Runs on the thread that has the connection to the queue: passing work between threads costs more than executing
    // a call.
    Ok(Threads::from_task(async move { worker::run_worker(worker, &phases).await }))
}

/// Builds the poller of the provider's list. The gateways export the replica metrics.
fn provider_poller(
    provider: Provider,
    default_namespace: Arc<str>,
    metrics: &Arc<Metrics>,
    readiness: &Arc<Readiness>,
) -> ProviderPoller {
    let (metrics, readiness) = (Arc::clone(metrics), Arc::clone(readiness));
    ProviderPoller { provider, default_namespace, metrics, readiness, exports_replicas: false }
}

fn spawn_idle_reaper(client: Arc<Client>, tasks: &Tasks) {
    let reaper = async move { client.run_idle_reaper().await };
    tasks.spawn(|stopping| gateway::run_until_cancelled(stopping, reaper));
}

/// Returns the addresses that callbacks must not connect to.
fn own_addresses(config: &config::Worker, port: u16) -> OwnAddresses {
    let own_addresses = OwnAddresses::default().port(port).gateway(&config.gateway);
    match &config.target {
        WorkerTarget::Provider(url) => own_addresses.upstream(url),
        WorkerTarget::Gateway(_) => own_addresses,
    }
}
