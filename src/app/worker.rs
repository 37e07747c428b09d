//! Builds the queue and the worker, and runs the queue's maintenance.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tokio_util::sync::CancellationToken;

use crate::config::{self, Backend};
use gateway_base::shutdown::{ShutdownPhases, supervise};
use gateway_http::client::Tls;
use gateway_http::limit::{ConcurrencyLimit, PermitCache};
use gateway_provider::Provider;
use gateway_proxy::functions::registry::FunctionRegistry;
use gateway_proxy::metrics::Metrics;
use gateway_proxy::readiness::Readiness;
use gateway_proxy::trace::Tracer;
use gateway_queue::detector::BackendDetector;
use gateway_queue::embedded::{Embedded, Limits};
use gateway_queue::ingress::QueueIngress;
use gateway_queue::jetstream::{Auth, JetStream, Options};
use gateway_queue::metrics::{GATEWAY_RECONNECTS, WORKER_RECONNECTS};
use gateway_queue::stan::{self, Stan};
use gateway_queue::{self as queue, JobQueue as _, Queue};
use gateway_worker::callback::local::LocalExecutor;
use gateway_worker::callback::own_addresses::OwnAddresses;
use gateway_worker::callback::signature::Secret;
use gateway_worker::callback::{CallbackRetry, CallbackSender};
use gateway_worker::function_client::FunctionClient;
use gateway_worker::retry_policies::RetryPolicies;
use gateway_worker::{CallLogging, Worker};

/// Files in `secret_mount_path` with the secrets that sign callbacks. The second one is for key rotation: while both
/// exist, callbacks carry a signature by each.
const CALLBACK_SECRET_FILES: [&str; 2] = ["callback-secret", "callback-secret-previous"];
/// Interval and timeout of the check whether the queue is reachable.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// Interval and timeout of the removal of expired results.
const EXPIRY_INTERVAL: Duration = Duration::from_secs(1);
const EXPIRY_TIMEOUT: Duration = Duration::from_secs(5);
/// Minimum interval between two queries of the queue's depth.
const DEPTH_POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Runs `worker` on this thread, with its own runtime, until the shutdown.
pub(super) fn run_worker_thread(mut worker: Worker, phases: &ShutdownPhases) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime {
        Ok(runtime) => {
            runtime.block_on(async {
                worker.ingress = worker.ingress.for_thread();
                run_worker(worker, phases).await;
            });
            runtime.shutdown_background();
        }
        Err(error) => tracing::error!(%error, "The worker thread cannot start"),
    }
}

/// Runs `worker` and the idle reaper of its client until the shutdown.
pub(super) async fn run_worker(worker: Worker, phases: &ShutdownPhases) {
    let client = Arc::clone(&worker.function_client.client);
    // Cancel-safe: the idle reaper holds nothing across an await.
    tokio::select! {
        () = Arc::new(worker).run(phases) => {}
        () = client.run_idle_reaper() => {}
    }
}

/// Dependencies of a worker.
pub(super) struct WorkerDeps {
    pub(super) ingress: Arc<QueueIngress>,
    pub(super) function_client: FunctionClient,
    /// Source of the functions' retry policies.
    pub(super) provider: Provider,
    pub(super) tls: Tls,
    pub(super) tracer: Option<Tracer>,
    /// Addresses that callbacks must not connect to.
    pub(super) own_addresses: OwnAddresses,
    /// Registry of existing functions.
    pub(super) registry: Arc<FunctionRegistry>,
    pub(super) default_namespace: Arc<str>,
    /// Limit on invocations in flight that callbacks to functions count against.
    pub(super) limit: Option<(Arc<ConcurrencyLimit>, Arc<PermitCache>)>,
}

/// Builds the worker.
///
/// # Errors
/// When a file with a callback secret cannot be read or is invalid.
pub(super) fn build_worker(config: &config::Queue, deps: WorkerDeps) -> anyhow::Result<Worker> {
    let WorkerDeps {
        ingress,
        function_client,
        provider,
        tls,
        tracer,
        own_addresses,
        registry,
        default_namespace,
        limit,
    } = deps;
    let function_client = Arc::new(function_client);
    let retry_policies = Arc::new(RetryPolicies::new(Arc::clone(&registry), provider.clone()));
    let local = LocalExecutor {
        function_client: Arc::clone(&function_client),
        retry_policies: Arc::clone(&retry_policies),
        ingress: Arc::clone(&ingress),
        provider,
        registry,
        default_namespace,
        limit,
    };
    Ok(Worker {
        ingress,
        concurrency: config.max_inflight,
        function_client,
        retry_policies,
        callbacks: build_callback_sender(config, own_addresses, tls)?.with_local(local),
        max_result_body_bytes: config.max_result_body_bytes,
        logging: CallLogging::default(),
        tracer,
    })
}

/// Builds the callback sender, with the secrets that exist.
fn build_callback_sender(
    config: &config::Queue,
    own_addresses: OwnAddresses,
    tls: Tls,
) -> anyhow::Result<CallbackSender> {
    let mut secrets = Vec::new();
    for name in CALLBACK_SECRET_FILES {
        let path = config.secrets_dir.join(name);
        match std::fs::read(&path).map(|text| Secret::parse(&text)) {
            Ok(Ok(secret)) => secrets.push(secret),
            Ok(Err(unusable)) => bail!("{} {unusable}", path.display()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", path.display()));
            }
        }
    }
    Ok(CallbackSender::new(
        config.callback_allowlist.clone(),
        own_addresses,
        secrets,
        CallbackRetry::default(),
        tls,
    ))
}

/// The role of a process towards its queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum QueueRole {
    /// Enqueues calls, and may execute them.
    Producer,
    /// Only executes calls.
    Consumer,
}

/// Condition for querying the queue's depth.
pub(super) enum DepthPolling {
    /// Always: the autoscaler needs the depth.
    Always,
    /// While these metrics are scraped. There may be many workers, and each query loads the queue's server.
    WhileScraped(Arc<Metrics>),
}

impl DepthPolling {
    fn is_enabled(&self) -> bool {
        match self {
            Self::Always => true,
            Self::WhileScraped(metrics) => metrics.is_scraped(Instant::now()),
        }
    }
}

/// Opens the configured queue; `None` if there is none.
///
/// # Errors
/// When the queue's file cannot be opened, the NATS options are invalid, a stream on NATS has settings that the queue
/// cannot work with, or a metric is registered twice.
pub(super) async fn open_queue(
    config: &config::Queue,
    metrics: &Metrics,
    default_namespace: &str,
    role: QueueRole,
) -> anyhow::Result<Option<Arc<QueueIngress>>> {
    let limits = queue_limits(config);
    let nats = || nats_options(config);
    let stan = || stan_options(&config.nats, default_namespace, role);
    let queue = match config.backend {
        Backend::None => return Ok(None),
        Backend::Embedded => {
            Queue::Known(queue::Backend::Embedded(Embedded::open(&config.state_dir, limits)?))
        }
        Backend::JetStream => {
            let jetstream = JetStream::open(nats()).await?;
            jetstream.check_streams().await?;
            Queue::Known(queue::Backend::JetStream(jetstream))
        }
        Backend::Stan => Queue::Known(queue::Backend::Stan(Stan::open(nats(), stan()).await?)),
        Backend::Nats => Queue::Detected(BackendDetector::open(nats(), stan()).await?),
    };
    let (name, reconnects) = match (config.backend, role) {
        (Backend::Embedded, _) => ("embedded", None),
        (_, QueueRole::Producer) => (config.nats.queue_name.as_str(), Some(GATEWAY_RECONNECTS)),
        (_, QueueRole::Consumer) => (config.nats.queue_name.as_str(), Some(WORKER_RECONNECTS)),
    };
    Ok(Some(QueueIngress::new(queue, config.max_body_bytes, metrics.queue(name, reconnects)?)))
}

fn queue_limits(config: &config::Queue) -> Limits {
    let ttl = u64::try_from(config.result_ttl.as_millis()).unwrap_or(u64::MAX / 2);
    Limits { max_pending: config.max_pending_calls, result_ttl: ttl, idempotency_ttl: ttl }
}

/// Returns the options for connecting to NATS.
pub(super) fn nats_options(config: &config::Queue) -> Options {
    let nats = &config.nats;
    let auth = match (&nats.credentials_file, &nats.nkey_seed_file, &nats.token, &nats.login) {
        (Some(file), ..) => Auth::Credentials(file.clone()),
        (None, Some(file), ..) => Auth::NkeySeed(file.clone()),
        (None, None, Some(token), _) => Auth::Token(token.clone()),
        (None, None, None, Some((user, password))) => {
            Auth::Password { user: user.clone(), password: password.clone() }
        }
        (None, None, None, None) => Auth::Anonymous,
    };
    let scheme = if nats.tls { "tls" } else { "nats" };
    Options {
        servers: nats.servers.iter().map(|server| format!("{scheme}://{server}")).collect(),
        auth,
        tls: nats.tls,
        root_ca: nats.ca_file.clone(),
        name: concat!("gateway/", env!("CARGO_PKG_VERSION")).to_owned(),
        queue: nats.queue_name.clone(),
        replicas: nats.replicas,
        in_memory: nats.in_memory,
        lease: nats.ack_wait,
        limits: queue_limits(config),
    }
}

fn stan_options(nats: &config::Nats, default_namespace: &str, role: QueueRole) -> stan::Options {
    stan::Options {
        cluster: nats.cluster_id.clone(),
        group: nats.queue_group.clone(),
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        reconnect_delay: nats.reconnect_delay,
        default_namespace: default_namespace.to_owned(),
        publishes: role == QueueRole::Producer,
    }
}

/// Maintains the queue until `stopping` is cancelled, then stops it: removes expired results, updates the depth
/// metrics, and reports whether the queue is reachable.
pub(super) async fn run_queue_maintenance(
    ingress: Arc<QueueIngress>,
    readiness: Arc<Readiness>,
    depth_polling: DepthPolling,
    stopping: CancellationToken,
) {
    // The loops are independent: a slow depth query or a hanging disk must not delay the readiness check.
    let probe = run_periodically(PROBE_INTERVAL, "queue probe", &stopping, || async {
        let _ = tokio::time::timeout(PROBE_TIMEOUT, ingress.queue.probe()).await;
        readiness.set_queue_reachable(ingress.queue.is_reachable());
        readiness.set_queue_condition(ingress.queue.condition());
        ingress.metrics.reconnected(ingress.queue.reconnects());
    });
    let expire = run_periodically(EXPIRY_INTERVAL, "queue expiry", &stopping, || async {
        let _ = tokio::time::timeout(EXPIRY_TIMEOUT, ingress.queue.sweep_expired()).await;
    });
    let poll_depth = run_periodically(DEPTH_POLL_INTERVAL, "queue depth", &stopping, || async {
        if !depth_polling.is_enabled() {
            // Old values must not be shown at the next scrape.
            return ingress.metrics.set_depths(Vec::new());
        }
        let start = Instant::now();
        if let Err(error) = ingress.update_depths().await {
            tracing::debug!(%error, "The queue's depth cannot be queried");
        }
        // The slower the query, the longer the pause: at most 5 % of the time is spent on it.
        tokio::time::sleep((start.elapsed() * 20).saturating_sub(DEPTH_POLL_INTERVAL)).await;
    });
    let maintenance = async { tokio::join!(probe, expire, poll_depth) };
    // Cancel-safe: each step is repeated at the next start.
    tokio::select! {
        () = stopping.cancelled() => {}
        _ = maintenance => {}
    }
    // By now all received calls have been settled or dropped.
    ingress.queue.close().await;
}

/// Runs `work` after each `pause`, forever. A panic ends one iteration only.
async fn run_periodically<F: Future<Output = ()>>(
    pause: Duration,
    name: &'static str,
    stopping: &CancellationToken,
    work: impl Fn() -> F,
) {
    let repeat = || async {
        loop {
            tokio::time::sleep(pause).await;
            work().await;
        }
    };
    supervise(name, stopping.clone(), repeat).await;
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn work_that_panics_is_run_again() {
        let (done, stopping) = (AtomicUsize::new(0), CancellationToken::new());
        let work = || async {
            let number = done.fetch_add(1, SeqCst);
            assert_ne!(number, 1, "expected by the test");
            if number == 3 {
                stopping.cancel();
            }
        };
        tokio::select! {
            () = run_periodically(Duration::from_secs(1), "test", &stopping, work) => {}
            () = stopping.cancelled() => {}
        }
        assert_eq!(done.load(SeqCst), 4);
    }
}
