//! The role of a worker: it makes queued calls that gateways have taken in, and has a port for its numbers.

use std::sync::Arc;

use anyhow::{Context, bail};

use crate::activator::Activator;
use crate::app::threads::Threads;
use crate::app::worker::{Counted, Part};
use crate::app::{autoscale, gateway, until_stopped, worker};
use crate::auth::Credentials;
use crate::config::{self, Shutdown, WorkerTarget};
use crate::health::Health;
use crate::limit::ConcurrencyLimit;
use crate::metrics::Metrics;
use crate::metrics::poller::ProviderPoller;
use crate::provider::Provider;
use crate::proxy::client::{Client, Origin, Tls};
use crate::routes;
use crate::same_origin::InternalHosts;
use crate::serve::listener::bind;
use crate::serve::raise_file_limit;
use crate::shutdown::{Signals, Stages, Tasks};
use crate::worker::Prints;
use crate::worker::attempt::Caller;
use crate::worker::callback::own::Own;

/// `gateway worker`
pub(super) fn run(config: config::Worker) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    super::block_on(runtime, async {
        let signals = Signals::listen().context("cannot listen for signals")?;
        let (stages, tasks) = (Stages::default(), Tasks::default());
        // Nobody connects to it, so nothing is waited for before it takes no more.
        let shutdown = Shutdown { delay: std::time::Duration::ZERO, grace: config.shutdown_grace };
        let threads = start(config, &stages, &tasks).await?;
        until_stopped(threads, signals, stages, tasks, shutdown).await
    })
}

async fn start(config: config::Worker, stages: &Stages, tasks: &Tasks) -> anyhow::Result<Threads> {
    let listener = bind(config.metrics, 1)?.remove(0);
    let address = listener.local_addr()?;
    raise_file_limit();
    let credentials = match &config.credentials_dir {
        Some(directory) => Some(Credentials::read(directory)?),
        None => None,
    };
    let namespace: Arc<str> = config.namespace.as_str().into();
    let metrics = Metrics::new(1, &namespace)?;
    let (url, calls) = match &config.target {
        WorkerTarget::Provider(url) => (url, metrics.shard(0)),
        // The gateway counts them; numbers that nobody scrapes are kept beside it.
        WorkerTarget::Gateway(url) => (url, Metrics::new(1, &namespace)?.shard(0)),
    };
    let Some(intake) = worker::intake(&config.queue, &metrics, &namespace, Part::Makes).await?
    else {
        bail!("there is no queue to take calls from");
    };
    let (origin, tls) = (Origin::new(url.clone()), Tls::default());
    let client = || Client::connecting_within(config.connect_timeout, config.pool, tls.clone());
    let provider = |client, timeout| Provider {
        client,
        origin: origin.clone(),
        credentials: credentials.clone(),
        timeout,
    };
    let (ours, polls) = (client(), client());
    // A gateway wakes functions itself.
    let limits = config.cold_start.filter(|_| matches!(config.target, WorkerTarget::Provider(_)));
    let scaling = limits.map(|limits| {
        let asked = provider(Arc::clone(&polls), config.upstream_timeout);
        Activator::new(asked, Arc::clone(&metrics.function_registry), limits, tasks)
    });
    let caller = Caller {
        client: Arc::clone(&ours),
        origin: origin.clone(),
        calls,
        timeout: config.upstream_timeout,
        scaling,
        budget: intake.budget.clone(),
    };
    let asked = provider(ours, config.upstream_timeout);
    let tracer = gateway::tracer(&config.tracing, "gateway-worker", &metrics, client(), tasks)?;
    let parts = worker::Parts {
        intake: Arc::clone(&intake),
        caller,
        provider: asked,
        tls: tls.clone(),
        tracer,
        own: own(&config, address.port()),
        known: Arc::clone(&metrics.function_registry),
        default_namespace: Arc::clone(&namespace),
        // What bounds a worker is how many calls it executes at a time.
        limit: None,
    };
    let mut made = worker::worker(&config.queue, parts)?;
    made.prints = Prints { bodies: config.log_bodies, calls: config.log_calls };
    let health = Health::new(stages.clone(), ConcurrencyLimit::new(config.queue.max_inflight, 1));
    let poll = ProviderPoller {
        provider: provider(Arc::clone(&polls), config.upstream_timeout.min(gateway::LONGEST_POLL)),
        default_namespace: namespace,
        metrics: Arc::clone(&metrics),
        health: Arc::clone(&health),
        // The gateways show them.
        exports_replicas: false,
    };
    tasks.spawn(|stopping| poll.run(stopping));
    tasks.spawn(|stopping| gateway::until(stopping, async move { polls.keep_swept().await }));
    if let Some(credentials) = credentials {
        tasks.spawn(|stopping| credentials.watch_files(stopping, stages.reloads()));
    }
    if matches!(config.target, WorkerTarget::Provider(_)) {
        autoscale::tell(&config.queue, Arc::clone(&metrics), tasks).await?;
    }
    let (tidied, counted) = (Arc::clone(&health), Counted::WhileScraped(Arc::clone(&metrics)));
    tasks.spawn(|stopping| worker::keep_tidy(intake, tidied, counted, stopping));
    let router = routes::worker(metrics, InternalHosts::new(&config.metrics_hosts), health);
    gateway::serve_metrics(router, listener, gateway::INTERNAL, Arc::default(), tasks);
    tracing::info!(metrics = %address, calls = %url, "Making queued calls");
    let stages = stages.clone();
    // On the thread that has the connection to the queue: what passes from one to another costs more than a call.
    Ok(Threads::of_task(async move { worker::make_calls(made, &stages).await }))
}

/// Where callbacks may not connect to.
fn own(config: &config::Worker, port: u16) -> Own {
    let own = Own::default().port(port).gateway(&config.gateway);
    match &config.target {
        WorkerTarget::Provider(url) => own.upstream(url),
        WorkerTarget::Gateway(_) => own,
    }
}
