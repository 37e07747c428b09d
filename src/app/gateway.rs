//! The gateway role, put together: threads that carry calls, background work, the end.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::activator::Activator;
use crate::app::threads::{Threads, Work};
use crate::app::worker::{Counted, Part};
use crate::app::{autoscale, worker};
use crate::auth::Credentials;
use crate::autoscale::alerts::Ignored;
use crate::config::{AccessLogMode, Backend, Serve, Timeouts, TracingConfig};
use crate::health::Health;
use crate::invoke::operators::Operators;
use crate::invoke::{Invoker, Route};
use crate::limit::ConcurrencyLimit;
use crate::metrics::Metrics;
use crate::metrics::poller::ProviderPoller;
use crate::metrics::query::InvocationCounts;
use crate::provider::Provider;
use crate::proxy::client::{Client, Origin, Tls};
use crate::queued::Intake;
use crate::routes::{self, GatewayService};
use crate::same_origin::{AllowedHosts, InternalHosts};
use crate::serve::heads::Heads;
use crate::serve::listener::bind;
use crate::serve::pacing::Pacing;
use crate::serve::{Server, raise_file_limit};
use crate::shutdown::{Stages, Tasks};
use crate::system::{ApiState, AuthProxy, MAX_REPLAY_BODIES};
use crate::trace::{RequestObserver, Tracer};
use crate::worker::Worker;
use crate::worker::attempt::Caller;
use crate::worker::callback::own::Own;

/// Files that are neither a caller's nor an upstream's connection.
const OTHER_FILES: usize = 128;

/// A provider that has not said within this time what functions there are is away.
pub(super) const LONGEST_POLL: Duration = Duration::from_secs(5);

/// What a port for machines holds its callers to, where no setting does.
pub(super) const INTERNAL: Timeouts = Timeouts {
    read: Duration::from_secs(60),
    write: Duration::from_secs(60),
    // Not used: nothing is forwarded.
    upstream: Duration::MAX,
    idle: Duration::from_secs(120),
};

/// A running gateway.
pub struct Gateway {
    pub address: SocketAddr,
    pub metrics_address: SocketAddr,
    pub(super) threads: Threads,
}

/// What the threads are made from.
struct Parts {
    config: Serve,
    provider: Origin,
    /// Of the API.
    credentials: Option<Arc<Credentials>>,
    /// Of the provider.
    provider_credentials: Option<Arc<Credentials>>,
    limit: Arc<ConcurrencyLimit>,
    metrics: Arc<Metrics>,
    health: Arc<Health>,
    counts: Arc<InvocationCounts>,
    intake: Option<Arc<Intake>>,
    scaling: Option<Arc<Activator>>,
    ignored_alerts: Option<Arc<Ignored>>,
    namespace: Arc<str>,
    tls: Tls,
    /// What background work calls the provider with.
    client: Arc<Client>,
    tracer: Option<Tracer>,
    observer: Option<Arc<RequestObserver>>,
    stages: Stages,
    heads: Arc<Heads>,
    /// For bodies of requests to the API that may have to be sent again.
    kept: Arc<Semaphore>,
}

impl Gateway {
    /// Binds, and starts to serve. Background work runs on the current runtime.
    ///
    /// `provider_credentials` are what the provider asks for, if that is not what the API asks for.
    pub async fn start(
        config: Serve,
        provider_credentials: Option<Arc<Credentials>>,
        stages: &Stages,
        tasks: &Tasks,
    ) -> anyhow::Result<Self> {
        let threads = match config.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        let listeners = bind(config.listen, threads)?;
        let pacing = match &config.congestion_control {
            Some(algorithm) => Pacing::chosen(&listeners, algorithm)?,
            None => Pacing::of_system(&listeners),
        };
        let metrics_listener = bind(config.metrics, 1)?.remove(0);
        let address = listeners[0].local_addr()?;
        let metrics_address = metrics_listener.local_addr()?;
        let parts =
            Arc::new(Parts::new(config, provider_credentials, threads, stages, tasks).await?);
        parts.start_background(metrics_listener, tasks);
        parts.start_autoscale(tasks).await?;
        let mut server = parts.server();
        server.pacing = pacing;
        let own = Own::default()
            .gateway_port(address.port())
            .port(metrics_address.port())
            .upstream(&parts.config.provider)
            .upstream(&parts.config.logs_provider);
        let worker = parts.worker(threads, own)?.map(|worker| {
            let stages = stages.clone();
            let work: Work = ("worker".to_owned(), Box::new(move || worker::run(worker, &stages)));
            work
        });
        let carriers = listeners.into_iter().enumerate().map(|(number, listener)| {
            let (parts, server) = (Arc::clone(&parts), server.clone());
            let work = move || carry_calls(&parts, number, server, listener);
            let work: Work = (format!("calls-{number}"), Box::new(work));
            work
        });
        let threads = Threads::start(carriers.chain(worker))?;
        Ok(Self { address, metrics_address, threads })
    }
}

/// Runs one thread: its own runtime, listener, links and numbers.
fn carry_calls(parts: &Parts, number: usize, server: Server, listener: TcpListener) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let served = runtime.and_then(|runtime| {
        let served = runtime.block_on(async {
            let client = parts.new_client();
            let door = Arc::new(parts.door(number, &client));
            let serving = server.run(listener, |caller| {
                let both = Arc::new((Arc::clone(&door), caller));
                service_fn(move |request: Request<Incoming>| {
                    let both = Arc::clone(&both);
                    let entered = both.0.classify(&both.1, request);
                    async move { both.0.respond(&both.1, entered).await }
                })
            });
            // The sweep holds nothing over an await.
            tokio::select! {
                served = serving => served,
                () = client.keep_swept() => Ok(()),
            }
        });
        // A name that is still being resolved is not waited for.
        runtime.shutdown_background();
        served
    });
    if let Err(error) = served {
        tracing::error!(%error, "A thread that carries calls cannot go on");
    }
}

impl Parts {
    async fn new(
        config: Serve,
        provider_credentials: Option<Arc<Credentials>>,
        threads: usize,
        stages: &Stages,
        tasks: &Tasks,
    ) -> anyhow::Result<Self> {
        let credentials = match &config.auth.credentials_dir {
            Some(directory) => Some(Credentials::read(directory)?),
            None => None,
        };
        let provider_credentials = provider_credentials.or_else(|| credentials.clone());
        let namespace: Arc<str> = config.namespace.as_str().into();
        let limit = ConcurrencyLimit::new(config.limits.calls, threads);
        // One shard more, for the worker.
        let metrics = Metrics::new(threads + 1, &namespace)?;
        let intake = worker::intake(&config.queue, &metrics, &namespace, Part::TakesIn).await?;
        let tls = Tls::default();
        let idle = config.limits.pool;
        let client = Client::connecting_within(config.connect_timeout, idle, tls.clone());
        let origin = Origin::new(config.provider.clone());
        let scaling = config.cold_start.map(|limits| {
            let provider = Provider {
                client: Arc::clone(&client),
                origin: origin.clone(),
                credentials: provider_credentials.clone(),
                timeout: config.timeouts.upstream,
            };
            Activator::new(provider, Arc::clone(&metrics.function_registry), limits, tasks)
        });
        let collector = Client::new(idle, tls.clone());
        let tracer = tracer(&config.tracing, "gateway", &metrics, collector, tasks)?;
        let access = config.access_log;
        let observer = (access != AccessLogMode::Off || tracer.is_some())
            .then(|| Arc::new(RequestObserver { access_log: access, tracer: tracer.clone() }));
        Ok(Self {
            tracer,
            observer,
            provider: origin,
            credentials,
            provider_credentials,
            metrics,
            health: Health::new(stages.clone(), Arc::clone(&limit)),
            intake,
            scaling,
            ignored_alerts: config.autoscale.map(|_| Arc::default()),
            counts: InvocationCounts::new(config.prometheus.clone().map(Origin::new)),
            limit,
            namespace,
            tls,
            client,
            stages: stages.clone(),
            heads: Arc::new(Heads::new(config.limits.head_memory)),
            kept: Arc::new(Semaphore::new(MAX_REPLAY_BODIES)),
            config,
        })
    }

    fn new_client(&self) -> Arc<Client> {
        let config = &self.config;
        Client::connecting_within(config.connect_timeout, config.limits.pool, self.tls.clone())
    }

    fn server(&self) -> Server {
        let files = raise_file_limit();
        // A call needs a connection on either side, but most callers' connections are idle at any time.
        let upstream = self.config.limits.calls.min(files / 3);
        let most = files.saturating_sub(OTHER_FILES + upstream);
        let connections = self.config.limits.connections.min(most.max(1));
        if connections < self.config.limits.connections {
            tracing::info!(
                connections,
                files,
                "max_connections is bounded by the limit on open files"
            );
        }
        let heads = Arc::clone(&self.heads);
        Server::new(self.config.timeouts, connections, self.stages.clone(), heads)
    }

    fn start_background(self: &Arc<Self>, metrics_listener: TcpListener, tasks: &Tasks) {
        let client = Arc::clone(&self.client);
        let poll = self.poll(&client);
        tasks.spawn(|stopping| poll.run(stopping));
        tasks.spawn(|stopping| until(stopping, async move { client.keep_swept().await }));
        if let Some(credentials) = self.credentials.clone() {
            let reloads = self.stages.reloads();
            tasks.spawn(|stopping| credentials.watch_files(stopping, reloads));
        }
        if let Some(intake) = self.intake.clone() {
            let health = Arc::clone(&self.health);
            tasks.spawn(|stopping| worker::keep_tidy(intake, health, Counted::Always, stopping));
        }
        let hosts = InternalHosts::new(&self.config.metrics_hosts);
        let router = routes::internal(Arc::clone(&self.metrics), hosts);
        let heads = Arc::clone(&self.heads);
        serve_metrics(router, metrics_listener, self.config.timeouts, heads, tasks);
    }

    /// Scales functions by their load, if that is asked for.
    async fn start_autoscale(&self, tasks: &Tasks) -> anyhow::Result<()> {
        let Some(config) = self.config.autoscale else { return Ok(()) };
        let (poll, intake) = (self.poll(&self.client), self.intake.clone());
        let may_zero = self.scaling.is_some();
        autoscale::start(config, &self.config.queue, may_zero, poll, intake, tasks).await
    }

    fn poll(&self, client: &Arc<Client>) -> ProviderPoller {
        // Readiness hangs on it, so it does not wait for as long as a call may take.
        let timeout = self.config.timeouts.upstream.min(LONGEST_POLL);
        ProviderPoller {
            provider: Provider { timeout, ..self.provider(client) },
            default_namespace: Arc::clone(&self.namespace),
            metrics: Arc::clone(&self.metrics),
            health: Arc::clone(&self.health),
            exports_replicas: true,
        }
    }

    fn provider(&self, client: &Arc<Client>) -> Provider {
        Provider {
            client: Arc::clone(client),
            origin: self.provider.clone(),
            credentials: self.provider_credentials.clone(),
            timeout: self.config.timeouts.upstream,
        }
    }

    /// What makes queued calls, if that is to be done here. `number`: its shard of the metrics. `own`: where callbacks
    /// may not connect to.
    fn worker(&self, number: usize, own: Own) -> anyhow::Result<Option<Worker>> {
        let config = &self.config.queue;
        let Some(intake) = self.intake.as_ref().filter(|_| config.with_worker) else {
            // A queue on NATS may have workers elsewhere.
            if self.intake.is_some() && config.backend == Backend::Embedded {
                tracing::warn!("Calls are queued, but with_worker is false: nobody makes them");
            }
            return Ok(None);
        };
        let client = self.new_client();
        let caller = Caller {
            client: Arc::clone(&client),
            origin: self.provider.clone(),
            calls: self.metrics.shard(number),
            timeout: self.config.timeouts.upstream,
            scaling: self.scaling.clone(),
            budget: intake.budget.clone(),
        };
        let parts = worker::Parts {
            intake: Arc::clone(intake),
            caller,
            provider: self.provider(&client),
            tls: self.tls.clone(),
            tracer: self.tracer.clone(),
            own,
            known: Arc::clone(&self.metrics.function_registry),
            default_namespace: Arc::clone(&self.namespace),
            limit: Some((Arc::clone(&self.limit), self.limit.permit_cache(number))),
        };
        worker::worker(config, parts).map(Some)
    }

    /// Who is known to be an operator by a call alone.
    fn operators(&self) -> Operators {
        match &self.credentials {
            // Asking it for each call of a function that is not ready would be too much.
            _ if self.config.auth.proxy_url.is_some() => Operators::Unknown,
            Some(credentials) => Operators::Credentials(Arc::clone(credentials)),
            None if self.config.local_only => Operators::Local,
            None => Operators::Unknown,
        }
    }

    /// What one thread answers callers with; to be called on its runtime.
    fn door(&self, thread: usize, client: &Arc<Client>) -> GatewayService {
        let provider = self.provider(client);
        let route = match &self.config.direct_functions {
            Some(suffix) => Route::Direct {
                suffix: suffix.clone(),
                default_namespace: Arc::clone(&self.namespace),
            },
            None => Route::Provider(self.provider.clone()),
        };
        let invoker = Invoker {
            client: Arc::clone(client),
            shard: self.metrics.shard(thread),
            limit: Arc::clone(&self.limit),
            permit_cache: self.limit.permit_cache(thread),
            timeouts: self.config.timeouts,
            route,
            provider: provider.clone(),
            activator: self.scaling.clone(),
            operators: self.operators(),
        };
        let auth = &self.config.auth;
        let api = ApiState {
            client: Arc::clone(client),
            provider,
            logs: Origin::new(self.config.logs_provider.clone()),
            credentials: self.credentials.clone(),
            auth_proxy: auth.proxy_url.clone().map(|url| AuthProxy::new(url, auth.proxy_pass_body)),
            allowed_hosts: if self.config.local_only {
                AllowedHosts::Local
            } else {
                AllowedHosts::Any
            },
            timeouts: self.config.timeouts,
            default_namespace: Arc::clone(&self.namespace),
            metrics: Arc::clone(&self.metrics),
            health: Arc::clone(&self.health),
            invocation_counts: Arc::clone(&self.counts),
            alert_filter: self.ignored_alerts.clone(),
            queue_ingress: self.intake.as_ref().map(|intake| intake.for_thread()),
            replay_permits: Arc::clone(&self.kept),
        };
        let api = Arc::new(api);
        GatewayService {
            invoker,
            router: routes::api(Arc::clone(&api)),
            api,
            stages: self.stages.clone(),
            observer: self.observer.clone(),
        }
    }
}

/// Connections to the metrics port.
const MAX_SCRAPERS: usize = 256;

/// What tells of calls to a collector of traces, if there is one, as `service`.
pub(super) fn tracer(
    config: &TracingConfig,
    service: &'static str,
    metrics: &Metrics,
    client: Arc<Client>,
    tasks: &Tasks,
) -> anyhow::Result<Option<Tracer>> {
    let Some(endpoint) = config.endpoint.clone() else { return Ok(None) };
    let dropped = metrics.traces()?;
    let (tracer, exporter) =
        Tracer::new(endpoint, config.clone(), service, Arc::clone(&client), dropped);
    tasks.spawn(|stopping| exporter.run(stopping));
    tasks.spawn(|stopping| until(stopping, async move { client.keep_swept().await }));
    Ok(Some(tracer))
}

/// Serves the port that is for machines only. It stays open while calls are drained.
pub(super) fn serve_metrics(
    router: Router,
    listener: TcpListener,
    timeouts: Timeouts,
    heads: Arc<Heads>,
    tasks: &Tasks,
) {
    let server = Server::new(timeouts, MAX_SCRAPERS, Stages::default(), heads);
    let serving = async move {
        let served = server
            .run(listener, |caller| routes::router_service(&router, caller, timeouts.idle))
            .await;
        if let Err(error) = served {
            tracing::error!(%error, "The metrics port cannot be served");
        }
    };
    tasks.spawn(|stopping| until(stopping, serving));
}

pub(super) async fn until(stopping: CancellationToken, work: impl Future<Output = ()>) {
    // Work that is cut here holds nothing that must be settled.
    tokio::select! {
        () = stopping.cancelled() => {}
        () = work => {}
    }
}
