//! Builds the gateway role: proxy threads, background tasks, and their shutdown.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::app::threads::{ThreadMain, Threads};
use crate::app::worker::{DepthPolling, QueueRole};
use crate::app::{BUILD, autoscale, worker};
use crate::config::{Backend, Serve};
use gateway_api::router::{self, ApiService};
use gateway_api::state::{ApiState, AuthProxy};
use gateway_api::system::MAX_REPLAY_BODIES;
use gateway_autoscaler::alerts::AlertFilter;
use gateway_base::shutdown::{ShutdownPhases, Tasks};
use gateway_http::allowed_hosts::{AllowedHosts, InternalHosts};
use gateway_http::client::{Client, Origin, Tls};
use gateway_http::credentials::Credentials;
use gateway_http::limit::ConcurrencyLimit;
use gateway_http::server::congestion::CongestionControl;
use gateway_http::server::head_budget::HeadBudget;
use gateway_http::server::listener::bind;
use gateway_http::server::{Server, Timeouts, raise_file_limit};
use gateway_provider::Provider;
use gateway_proxy::activator::Activator;
use gateway_proxy::function_source::ProviderPoller;
use gateway_proxy::invoke::dispatcher::Dispatcher;
use gateway_proxy::invoke::operators::Operators;
use gateway_proxy::invoke::{Invoker, Route};
use gateway_proxy::metrics::Metrics;
use gateway_proxy::metrics::query::InvocationCounts;
use gateway_proxy::readiness::Readiness;
use gateway_proxy::service::{GatewayService, serve_router};
use gateway_proxy::trace::{AccessLogMode, RequestObserver, Tracer, TracingConfig};
use gateway_queue::ingress::QueueIngress;
use gateway_worker::Worker;
use gateway_worker::callback::own_addresses::OwnAddresses;
use gateway_worker::function_client::FunctionClient;

/// File descriptors reserved for other uses than client and upstream connections.
const RESERVED_FILES: usize = 128;

/// Timeout for listing the provider's functions. After it the provider counts as unavailable.
pub(super) const PROVIDER_LIST_TIMEOUT: Duration = Duration::from_secs(5);

/// Timeouts of the metrics port, which no setting changes.
pub(super) const ADMIN_TIMEOUTS: Timeouts = Timeouts {
    read: Duration::from_secs(60),
    write: Duration::from_secs(60),
    // Not used: this port forwards nothing.
    upstream: Duration::MAX,
    idle: Duration::from_secs(120),
};

/// A running gateway.
pub struct Gateway {
    pub address: SocketAddr,
    pub metrics_address: SocketAddr,
    pub(super) threads: Threads,
}

/// Dependencies that all threads share.
struct GatewayDeps {
    config: Serve,
    provider: Origin,
    /// Credentials that the API requires.
    credentials: Option<Arc<Credentials>>,
    /// Credentials for requests to the provider.
    provider_credentials: Option<Arc<Credentials>>,
    limit: Arc<ConcurrencyLimit>,
    metrics: Arc<Metrics>,
    readiness: Arc<Readiness>,
    invocation_counts: Arc<InvocationCounts>,
    ingress: Option<Arc<QueueIngress>>,
    activator: Option<Arc<Activator>>,
    alert_filter: Option<Arc<AlertFilter>>,
    namespace: Arc<str>,
    tls: Tls,
    /// Client that background tasks use for the provider.
    client: Arc<Client>,
    tracer: Option<Tracer>,
    observer: Option<Arc<RequestObserver>>,
    phases: ShutdownPhases,
    head_budget: Arc<HeadBudget>,
    /// Permits for bodies of API requests that are kept in memory to be sent again.
    replay_body_permits: Arc<Semaphore>,
}

impl Gateway {
    /// Binds the listeners and starts to serve. Background tasks run on the current runtime.
    ///
    /// `provider_credentials` are the provider's, if they differ from those of the API.
    ///
    /// # Errors
    /// When a port cannot be bound, a file cannot be read, or the queue cannot be opened.
    pub async fn start(
        config: Serve,
        provider_credentials: Option<Arc<Credentials>>,
        phases: &ShutdownPhases,
        tasks: &Tasks,
    ) -> anyhow::Result<Self> {
        let threads = match config.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        let listeners = bind(config.listen, threads)?;
        let congestion = match &config.congestion_control {
            Some(algorithm) => CongestionControl::fixed(&listeners, algorithm)?,
            None => CongestionControl::from_system(&listeners),
        };
        let metrics_listener = bind(config.metrics, 1)?.remove(0);
        let address = listeners[0].local_addr()?;
        let metrics_address = metrics_listener.local_addr()?;
        let deps =
            Arc::new(GatewayDeps::new(config, provider_credentials, threads, phases, tasks).await?);
        deps.start_background(metrics_listener, tasks);
        deps.start_autoscale(tasks).await?;
        let mut server = deps.build_server();
        server.congestion = congestion;
        let own_addresses = OwnAddresses::default()
            .gateway_port(address.port())
            .port(metrics_address.port())
            .upstream(&deps.config.provider)
            .upstream(&deps.config.logs_provider);
        let worker = deps.build_worker(threads, own_addresses)?.map(|worker| {
            let phases = phases.clone();
            let thread: ThreadMain =
                ("worker".to_owned(), Box::new(move || worker::run_worker_thread(worker, &phases)));
            thread
        });
        let proxy_threads = listeners.into_iter().enumerate().map(|(number, listener)| {
            let (deps, server) = (Arc::clone(&deps), server.clone());
            let main = move || run_proxy_thread(&deps, number, server, listener);
            let thread: ThreadMain = (format!("calls-{number}"), Box::new(main));
            thread
        });
        let threads = Threads::start(proxy_threads.chain(worker))?;
        Ok(Self { address, metrics_address, threads })
    }
}

/// Body of one proxy thread, which has its own runtime, listener, upstream connections and counters.
fn run_proxy_thread(deps: &GatewayDeps, number: usize, server: Server, listener: TcpListener) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let served = runtime.and_then(|runtime| {
        let served = runtime.block_on(async {
            let client = deps.build_client();
            let service = Arc::new(deps.build_service(number, &client));
            let serving = service.serve(server, listener);
            // Cancel-safe: the idle reaper holds nothing across an await.
            tokio::select! {
                served = serving => served,
                () = client.run_idle_reaper() => Ok(()),
            }
        });
        // Does not wait for a name resolution in progress.
        runtime.shutdown_background();
        served
    });
    if let Err(error) = served {
        tracing::error!(%error, "A proxy thread failed");
    }
}

impl GatewayDeps {
    async fn new(
        config: Serve,
        provider_credentials: Option<Arc<Credentials>>,
        threads: usize,
        phases: &ShutdownPhases,
        tasks: &Tasks,
    ) -> anyhow::Result<Self> {
        let credentials = match &config.auth.credentials_dir {
            Some(directory) => Some(Credentials::read(directory)?),
            None => None,
        };
        let provider_credentials = provider_credentials.or_else(|| credentials.clone());
        let namespace: Arc<str> = config.namespace.as_str().into();
        let limit = ConcurrencyLimit::new(config.limits.calls, threads);
        // One more shard, for the worker.
        let metrics = Metrics::new(threads + 1, &namespace)?;
        let ingress =
            worker::open_queue(&config.queue, &metrics, &namespace, QueueRole::Producer).await?;
        let tls = Tls::default();
        let idle = config.limits.pool;
        let client = Client::with_connect_timeout(config.connect_timeout, idle, tls.clone());
        let origin = Origin::new(config.provider.clone());
        let activator = config.cold_start.map(|limits| {
            let provider = Provider {
                client: Arc::clone(&client),
                origin: origin.clone(),
                credentials: provider_credentials.clone(),
                timeout: config.timeouts.upstream,
            };
            Activator::new(provider, Arc::clone(&metrics.function_registry), limits, tasks)
        });
        let collector = Client::new(idle, tls.clone());
        let tracer = build_tracer(&config.tracing, "gateway", &metrics, collector, tasks)?;
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
            readiness: Readiness::new(phases.clone(), Arc::clone(&limit)),
            ingress,
            activator,
            alert_filter: config.autoscale.map(|_| Arc::default()),
            invocation_counts: InvocationCounts::new(config.prometheus.clone().map(Origin::new)),
            limit,
            namespace,
            tls,
            client,
            phases: phases.clone(),
            head_budget: Arc::new(HeadBudget::new(config.limits.head_memory)),
            replay_body_permits: Arc::new(Semaphore::new(MAX_REPLAY_BODIES)),
            config,
        })
    }

    fn build_client(&self) -> Arc<Client> {
        let config = &self.config;
        Client::with_connect_timeout(config.connect_timeout, config.limits.pool, self.tls.clone())
    }

    fn build_server(&self) -> Server {
        let files = raise_file_limit();
        // A request needs a client and an upstream connection, but most client connections are idle.
        let upstream = self.config.limits.calls.min(files / 3);
        let most = files.saturating_sub(RESERVED_FILES + upstream);
        let connections = self.config.limits.connections.min(most.max(1));
        if connections < self.config.limits.connections {
            tracing::info!(
                connections,
                files,
                "max_connections is bounded by the limit on open files"
            );
        }
        let head_budget = Arc::clone(&self.head_budget);
        Server::new(self.config.timeouts, connections, self.phases.clone(), head_budget)
    }

    fn start_background(self: &Arc<Self>, metrics_listener: TcpListener, tasks: &Tasks) {
        let client = Arc::clone(&self.client);
        let poll = self.provider_poller(&client);
        tasks.spawn(|stopping| poll.run(stopping));
        tasks.spawn(|stopping| {
            run_until_cancelled(stopping, async move { client.run_idle_reaper().await })
        });
        if let Some(credentials) = self.credentials.clone() {
            let reloads = self.phases.reloads();
            tasks.spawn(|stopping| credentials.watch_files(stopping, reloads));
        }
        if let Some(ingress) = self.ingress.clone() {
            let readiness = Arc::clone(&self.readiness);
            tasks.spawn(|stopping| {
                worker::run_queue_maintenance(ingress, readiness, DepthPolling::Always, stopping)
            });
        }
        let hosts = InternalHosts::new(&self.config.metrics_hosts);
        let router = router::internal(Arc::clone(&self.metrics), hosts);
        let head_budget = Arc::clone(&self.head_budget);
        serve_metrics(router, metrics_listener, self.config.timeouts, head_budget, tasks);
    }

    /// Starts the autoscaler, if it is enabled.
    async fn start_autoscale(&self, tasks: &Tasks) -> anyhow::Result<()> {
        let Some(config) = self.config.autoscale else { return Ok(()) };
        let (poll, ingress) = (self.provider_poller(&self.client), self.ingress.clone());
        let may_zero = self.activator.is_some();
        autoscale::start(config, &self.config.queue, may_zero, poll, ingress, tasks).await
    }

    fn provider_poller(&self, client: &Arc<Client>) -> ProviderPoller {
        // Readiness depends on this request, so its timeout is shorter than that of an invocation.
        let timeout = self.config.timeouts.upstream.min(PROVIDER_LIST_TIMEOUT);
        ProviderPoller {
            provider: Provider { timeout, ..self.provider(client) },
            default_namespace: Arc::clone(&self.namespace),
            metrics: Arc::clone(&self.metrics),
            readiness: Arc::clone(&self.readiness),
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

    /// Builds the worker, if this process has one. `number` is its metrics shard; callbacks must not connect to
    /// `own_addresses`.
    fn build_worker(
        &self,
        number: usize,
        own_addresses: OwnAddresses,
    ) -> anyhow::Result<Option<Worker>> {
        let config = &self.config.queue;
        let Some(ingress) = self.ingress.as_ref().filter(|_| config.with_worker) else {
            // With a queue on NATS, other processes may be workers.
            if self.ingress.is_some() && config.backend == Backend::Embedded {
                tracing::warn!(
                    "Calls are queued, but with_worker is false: no worker executes them"
                );
            }
            return Ok(None);
        };
        let client = self.build_client();
        let function_client = FunctionClient {
            client: Arc::clone(&client),
            origin: self.provider.clone(),
            dispatcher: self.dispatcher(number),
            timeout: self.config.timeouts.upstream,
            budget: ingress.budget.clone(),
        };
        let deps = worker::WorkerDeps {
            ingress: Arc::clone(ingress),
            function_client,
            provider: self.provider(&client),
            tls: self.tls.clone(),
            tracer: self.tracer.clone(),
            own_addresses,
            registry: Arc::clone(&self.metrics.function_registry),
            default_namespace: Arc::clone(&self.namespace),
            limit: Some((Arc::clone(&self.limit), self.limit.permit_cache(number))),
        };
        worker::build_worker(config, deps).map(Some)
    }

    /// Returns the way in which an invocation can prove that it comes from an operator.
    fn operators(&self) -> Operators {
        match &self.credentials {
            // One request to the auth proxy for each invocation of a function that is not ready would be too much.
            _ if self.config.auth.proxy_url.is_some() => Operators::Unknown,
            Some(credentials) => Operators::Credentials(Arc::clone(credentials)),
            None if self.config.local_only => Operators::Local,
            None => Operators::Unknown,
        }
    }

    /// Returns the dispatcher of the thread `number`.
    fn dispatcher(&self, number: usize) -> Dispatcher {
        Dispatcher { activator: self.activator.clone(), shard: self.metrics.shard(number) }
    }

    /// Builds the HTTP service of one thread. Must be called on that thread's runtime.
    fn build_service(&self, thread: usize, client: &Arc<Client>) -> GatewayService {
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
            dispatcher: self.dispatcher(thread),
            limit: Arc::clone(&self.limit),
            permit_cache: self.limit.permit_cache(thread),
            timeouts: self.config.timeouts,
            route,
            provider: provider.clone(),
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
            build: BUILD,
            metrics: Arc::clone(&self.metrics),
            readiness: Arc::clone(&self.readiness),
            invocation_counts: Arc::clone(&self.invocation_counts),
            alert_filter: self.alert_filter.clone(),
            queue_ingress: self.ingress.as_ref().map(|ingress| ingress.for_thread()),
            replay_permits: Arc::clone(&self.replay_body_permits),
        };
        GatewayService {
            invoker,
            fallback: Box::new(ApiService::new(api)),
            phases: self.phases.clone(),
            observer: self.observer.clone(),
        }
    }
}

/// Maximum number of connections to the metrics port.
const MAX_METRICS_CONNECTIONS: usize = 256;

/// Builds the tracer of `service` and starts its exporter, if a trace collector is configured.
///
/// # Errors
/// When a metric is registered twice.
pub(super) fn build_tracer(
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
    tasks.spawn(|stopping| {
        run_until_cancelled(stopping, async move { client.run_idle_reaper().await })
    });
    Ok(Some(tracer))
}

/// Serves the metrics port, which stays open while requests are drained.
pub(super) fn serve_metrics(
    router: Router,
    listener: TcpListener,
    timeouts: Timeouts,
    head_budget: Arc<HeadBudget>,
    tasks: &Tasks,
) {
    let server =
        Server::new(timeouts, MAX_METRICS_CONNECTIONS, ShutdownPhases::default(), head_budget);
    let serving = async move {
        if let Err(error) = serve_router(router, server, listener).await {
            tracing::error!(%error, "The metrics port cannot be served");
        }
    };
    tasks.spawn(|stopping| run_until_cancelled(stopping, serving));
}

/// Runs `work` until it ends or `stopping` is cancelled.
pub(super) async fn run_until_cancelled(
    stopping: CancellationToken,
    work: impl Future<Output = ()>,
) {
    // Cancel-safe: `work` holds nothing that must be settled.
    tokio::select! {
        () = stopping.cancelled() => {}
        () = work => {}
    }
}
