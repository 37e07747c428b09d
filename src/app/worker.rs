//! Queue and worker, put together: what keeps calls, a thread that makes them, and what it needs to call back.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use tokio_util::sync::CancellationToken;

use crate::config::{self, Backend};
use crate::health::Health;
use crate::limit::{ConcurrencyLimit, PermitCache};
use crate::metrics::Metrics;
use crate::metrics::queue::{GATEWAY_RECONNECTS, WORKER_RECONNECTS};
use crate::metrics::registry::FunctionRegistry;
use crate::provider::Provider;
use crate::proxy::client::Tls;
use crate::queue::Queue;
use crate::queue::detector::BackendDetector;
use crate::queue::embedded::{Embedded, Limits};
use crate::queue::jetstream::{Auth, JetStream, Options};
use crate::queue::stan::{self, Stan};
use crate::queued::Intake;
use crate::shutdown::{Stages, keep_up};
use crate::trace::Tracer;
use crate::worker::attempt::Caller;
use crate::worker::callback::local::Local;
use crate::worker::callback::own::Own;
use crate::worker::callback::signature::Secret;
use crate::worker::callback::{Callbacks, Pace};
use crate::worker::policies::Policies;
use crate::worker::{Prints, Worker};

/// The files in `secret_mount_path` with which callbacks are signed. The second one is for a change of secrets: with both
/// there, callbacks have a signature by each.
const SECRETS: [&str; 2] = ["callback-secret", "callback-secret-previous"];
/// How often it is looked whether the queue can be reached, and how long that may take.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_secs(2);
/// How often what has been kept for long enough is forgotten.
const FORGET_EVERY: Duration = Duration::from_secs(1);
/// What that may take before something else is done.
const FORGET: Duration = Duration::from_secs(5);
/// How often it is counted what the queue holds.
const COUNT_EVERY: Duration = Duration::from_secs(1);

/// Runs `worker` on this thread, with a runtime of its own, until the stop.
pub(super) fn run(mut worker: Worker, stages: &Stages) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime {
        Ok(runtime) => {
            runtime.block_on(async {
                worker.intake = worker.intake.for_thread();
                make_calls(worker, stages).await;
            });
            runtime.shutdown_background();
        }
        Err(error) => tracing::error!(%error, "The thread that makes queued calls cannot start"),
    }
}

/// Runs `worker` until the stop.
pub(super) async fn make_calls(worker: Worker, stages: &Stages) {
    let client = Arc::clone(&worker.caller.client);
    // The sweep holds nothing over an await.
    tokio::select! {
        () = Arc::new(worker).run(stages) => {}
        () = client.keep_swept() => {}
    }
}

/// What a worker is made from.
pub(super) struct Parts {
    pub(super) intake: Arc<Intake>,
    pub(super) caller: Caller,
    /// Is asked how functions want to be retried.
    pub(super) provider: Provider,
    pub(super) tls: Tls,
    pub(super) tracer: Option<Tracer>,
    /// Where no callback may connect to.
    pub(super) own: Own,
    /// Which functions exist.
    pub(super) known: Arc<FunctionRegistry>,
    pub(super) default_namespace: Arc<str>,
    /// The limit on calls in flight that callbacks to functions count against.
    pub(super) limit: Option<(Arc<ConcurrencyLimit>, Arc<PermitCache>)>,
}

/// What makes queued calls.
pub(super) fn worker(config: &config::Queue, parts: Parts) -> anyhow::Result<Worker> {
    let Parts { intake, caller, provider, tls, tracer, own, known, default_namespace, limit } =
        parts;
    let caller = Arc::new(caller);
    let policies = Arc::new(Policies::new(provider.clone()));
    let local = Local {
        caller: Arc::clone(&caller),
        policies: Arc::clone(&policies),
        intake: Arc::clone(&intake),
        provider,
        known,
        default_namespace,
        limit,
    };
    Ok(Worker {
        intake,
        places: config.max_inflight,
        caller,
        policies,
        callbacks: callbacks(config, own, tls)?.with_local(local),
        max_result_body_bytes: config.max_result_body_bytes,
        prints: Prints::default(),
        tracer,
    })
}

/// What sends callbacks, with the secrets that there are.
fn callbacks(config: &config::Queue, own: Own, tls: Tls) -> anyhow::Result<Callbacks> {
    let mut secrets = Vec::new();
    for name in SECRETS {
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
    Ok(Callbacks::new(config.callback_allowlist.clone(), own, secrets, Pace::default(), tls))
}

/// What a process does with its queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// It takes calls in, and may make them.
    TakesIn,
    /// It makes them, and no more.
    Makes,
}

/// When it is counted what a queue holds.
pub(super) enum Counted {
    /// Always: what scales functions has to know.
    Always,
    /// While these are scraped. There may be many workers, and each that counts keeps the queue's server busy.
    WhileScraped(Arc<Metrics>),
}

impl Counted {
    fn now(&self) -> bool {
        match self {
            Self::Always => true,
            Self::WhileScraped(metrics) => metrics.is_scraped(Instant::now()),
        }
    }
}

/// Opens the queue, if there is to be one.
pub(super) async fn intake(
    config: &config::Queue,
    metrics: &Metrics,
    default_namespace: &str,
    part: Part,
) -> anyhow::Result<Option<Arc<Intake>>> {
    let limits = limits(config);
    let nats = || options(config);
    let stan = || stan_options(&config.nats, default_namespace, part);
    let queue = match config.backend {
        Backend::None => return Ok(None),
        Backend::Embedded => Queue::Embedded(Embedded::open(&config.state_dir, limits)?),
        Backend::JetStream => Queue::JetStream(JetStream::open(nats()).await?),
        Backend::Stan => Queue::Stan(Stan::open(nats(), stan()).await?),
        Backend::Nats => Queue::Detected(BackendDetector::open(nats(), stan()).await?),
    };
    let (name, reconnects) = match (config.backend, part) {
        (Backend::Embedded, _) => ("embedded", None),
        (_, Part::TakesIn) => (config.nats.queue_name.as_str(), Some(GATEWAY_RECONNECTS)),
        (_, Part::Makes) => (config.nats.queue_name.as_str(), Some(WORKER_RECONNECTS)),
    };
    Ok(Some(Intake::new(queue, config.max_body_bytes, metrics.queue(name, reconnects)?)))
}

fn limits(config: &config::Queue) -> Limits {
    let ttl = u64::try_from(config.result_ttl.as_millis()).unwrap_or(u64::MAX / 2);
    Limits { max_pending: config.max_pending_calls, result_ttl: ttl, idempotency_ttl: ttl }
}

/// How NATS is reached.
pub(super) fn options(config: &config::Queue) -> Options {
    let nats = &config.nats;
    let auth = match (&nats.credentials_file, &nats.nkey_seed_file, &nats.token, &nats.login) {
        (Some(file), ..) => Auth::Credentials(file.clone()),
        (None, Some(file), ..) => Auth::NkeySeed(file.clone()),
        (None, None, Some(token), _) => Auth::Token(token.clone()),
        (None, None, None, Some((user, password))) => {
            Auth::Password { user: user.clone(), password: password.clone() }
        }
        (None, None, None, None) => Auth::Nobody,
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
        limits: limits(config),
    }
}

fn stan_options(nats: &config::Nats, default_namespace: &str, part: Part) -> stan::Options {
    stan::Options {
        cluster: nats.cluster_id.clone(),
        group: nats.queue_group.clone(),
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        reconnect_delay: nats.reconnect_delay,
        default_namespace: default_namespace.to_owned(),
        publishes: part == Part::TakesIn,
    }
}

/// Has the queue forget what has been kept for long enough, counts what is there, and says whether it can be reached,
/// again and again until `stopping`.
pub(super) async fn keep_tidy(
    intake: Arc<Intake>,
    health: Arc<Health>,
    counted: Counted,
    stopping: CancellationToken,
) {
    // Each by itself: a queue that takes long to be counted, or a disk that hangs, must not hide how it is.
    let look = every(LOOK_EVERY, "look", &stopping, || async {
        let _ = tokio::time::timeout(LOOK, intake.queue.probe()).await;
        health.set_queue_reachable(intake.queue.is_reachable());
        health.set_queue_condition(intake.queue.condition());
        intake.metrics.reconnected(intake.queue.reconnects());
    });
    let forget = every(FORGET_EVERY, "forget", &stopping, || async {
        let _ = tokio::time::timeout(FORGET, intake.queue.sweep_expired()).await;
    });
    let count = every(COUNT_EVERY, "count", &stopping, || async {
        if !counted.now() {
            // What was shown would be old once somebody looks again.
            return intake.metrics.set_depths(Vec::new());
        }
        let start = Instant::now();
        if let Err(error) = intake.count().await {
            tracing::debug!(%error, "What the queue holds cannot be counted");
        }
        // A queue that is long to count is counted less often.
        tokio::time::sleep((start.elapsed() * 20).saturating_sub(COUNT_EVERY)).await;
    });
    let tidy = async { tokio::join!(look, forget, count) };
    // What is cut here is done again next time.
    tokio::select! {
        () = stopping.cancelled() => {}
        _ = tidy => {}
    }
    // All that was taken has been settled or dropped by now.
    intake.queue.stop().await;
}

/// Does `work` after each `pause`, for ever: if it breaks, it is done again next time.
async fn every<F: Future<Output = ()>>(
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
    keep_up(name, stopping.clone(), repeat).await;
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_breaks_is_done_again() {
        let (done, stopping) = (AtomicUsize::new(0), CancellationToken::new());
        let work = || async {
            let number = done.fetch_add(1, SeqCst);
            assert_ne!(number, 1, "it breaks");
            if number == 3 {
                stopping.cancel();
            }
        };
        tokio::select! {
            () = every(Duration::from_secs(1), "test", &stopping, work) => {}
            () = stopping.cancelled() => {}
        }
        assert_eq!(done.load(SeqCst), 4);
    }
}
