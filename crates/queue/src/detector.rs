//! Detects the backend on a NATS server: JetStream or NATS Streaming. The decision is made once per process.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::runtime::Handle as Runtime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::jetstream::{self, JetStream};
use crate::queue::Backend;
use crate::stan::probe::{Probe, ProbeResult, StanPresence};
use crate::stan::{self, Stan};

const PROBE_INTERVAL: Duration = Duration::from_millis(500);
/// NATS Streaming that has not answered for this time is assumed to be absent.
const STAN_ABSENCE_TIMEOUT: Duration = Duration::from_secs(10);
const STAN_WATCH_INTERVAL: Duration = Duration::from_secs(10);
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// The detector and its result. Cheap to clone.
#[derive(Clone)]
pub struct BackendDetector {
    shared: Arc<Shared>,
    /// Handle of the detected queue for one thread.
    thread_backend: Arc<OnceLock<Backend>>,
}

struct Shared {
    backend: OnceLock<Backend>,
    is_detected: watch::Sender<bool>,
    stopping: CancellationToken,
    tracker: TaskTracker,
}

impl BackendDetector {
    /// Starts to probe the server. The server may be unreachable: probing goes on until it responds.
    ///
    /// # Errors
    ///
    /// When the options are invalid, such as an unreadable credentials file.
    pub async fn open(nats: jetstream::Options, stan: stan::Options) -> anyhow::Result<Self> {
        let probe = Probe::open(&nats, &stan.cluster).await?;
        let shared = Arc::new(Shared {
            backend: OnceLock::new(),
            is_detected: watch::Sender::new(false),
            stopping: CancellationToken::new(),
            tracker: TaskTracker::new(),
        });
        let prober = Arc::clone(&shared);
        let task = async move {
            // Both branches can be dropped at any await: they own no state.
            tokio::select! {
                () = prober.stopping.cancelled() => {}
                () = async {
                    let queue = detect_backend(&probe, &nats, &stan).await;
                    let is_jetstream = matches!(queue, Backend::JetStream(_));
                    let _ = prober.backend.set(queue);
                    prober.is_detected.send_replace(true);
                    if is_jetstream {
                        warn_on_stan(&probe).await;
                    }
                } => {}
            }
        };
        shared.tracker.spawn_on(task, &Runtime::current());
        Ok(Self { shared, thread_backend: Arc::default() })
    }

    /// A handle for a thread that uses the queue often. It must be called on the runtime of that thread.
    pub(super) fn for_thread(&self) -> Self {
        let thread = Self { shared: Arc::clone(&self.shared), thread_backend: Arc::default() };
        let detector = thread.clone();
        let task = async move {
            detector.wait_until_detected().await;
            if let Some(queue) = detector.shared.backend.get() {
                let _ = detector.thread_backend.set(queue.for_thread());
            }
        };
        let stopping = self.shared.stopping.clone();
        self.shared.tracker.spawn(async move {
            // The task can be dropped at any await: it owns no state.
            tokio::select! {
                () = stopping.cancelled() => {}
                () = task => {}
            }
        });
        thread
    }

    /// The detected queue, if any.
    pub(super) fn detected(&self) -> Option<&Backend> {
        self.thread_backend.get().or_else(|| self.shared.backend.get())
    }

    /// Waits until the backend has been detected.
    pub(super) async fn wait_until_detected(&self) {
        // The sender lives as long as `self`, so this cannot fail.
        let _ = self.shared.is_detected.subscribe().wait_for(|detected| *detected).await;
    }

    /// Stops probing.
    pub(super) async fn stop(&self) {
        self.shared.stopping.cancel();
        self.shared.tracker.close();
        let _ = tokio::time::timeout(STOP_TIMEOUT, self.shared.tracker.wait()).await;
    }
}

/// A backend on NATS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BackendKind {
    JetStream,
    Stan,
}

/// Chooses the backend. `absent` is the time for which JetStream has answered and NATS Streaming has not.
///
/// NATS Streaming is preferred: an operator who runs it has queued calls there, and it may be restarting. JetStream is
/// chosen immediately if it already has the streams of this gateway.
fn choose_backend(probed: ProbeResult, absent: Duration) -> Option<BackendKind> {
    match probed {
        ProbeResult { stan: StanPresence::Present, .. } => Some(BackendKind::Stan),
        ProbeResult { has_queue_stream: true, .. } => Some(BackendKind::JetStream),
        ProbeResult { jetstream: true, .. } if absent >= STAN_ABSENCE_TIMEOUT => {
            Some(BackendKind::JetStream)
        }
        _ => None,
    }
}

async fn detect_backend(probe: &Probe, nats: &jetstream::Options, stan: &stan::Options) -> Backend {
    let (mut absent, mut silent_since) = (None, Some(Instant::now()));
    loop {
        let probed = probe.run().await;
        let jetstream = probed.is_some_and(|probed| probed.jetstream);
        let since = *absent.get_or_insert_with(Instant::now);
        if !jetstream {
            absent = None;
        }
        let kind = probed.and_then(|probed| choose_backend(probed, since.elapsed()));
        let opened = match kind {
            Some(BackendKind::Stan) => {
                Stan::open(nats.clone(), stan.clone()).await.map(|queue| Some(Backend::Stan(queue)))
            }
            Some(BackendKind::JetStream) => {
                log_backend(probed);
                JetStream::open(nats.clone()).await.map(|queue| Some(Backend::JetStream(queue)))
            }
            None => Ok(None),
        };
        match opened {
            Ok(Some(queue)) => return queue,
            Ok(None) => {}
            Err(error) => tracing::error!("The queue cannot be opened: {error:#}"),
        }
        if !jetstream && silent_since.is_some_and(|since| since.elapsed() >= STAN_ABSENCE_TIMEOUT) {
            silent_since = None;
            // The address may contain a password.
            let address = |server: &String| server.rsplit(['@', '/']).next().map(str::to_owned);
            let servers: Vec<String> = nats.servers.iter().filter_map(address).collect();
            let servers = servers.join(", ");
            tracing::warn!(
                "Neither JetStream nor NATS Streaming answers at {servers}: no calls are queued until one of them does"
            );
        }
        tokio::time::sleep(PROBE_INTERVAL).await;
    }
}

fn log_backend(probed: Option<ProbeResult>) {
    if probed.is_some_and(|probed| probed.stan == StanPresence::Unknown) {
        tracing::info!(
            "JetStream stores the queued calls. NATS Streaming could not be ruled out: the server does not answer, or \
             denies the request"
        );
    } else {
        tracing::info!("JetStream stores the queued calls");
    }
}

/// Logs a warning if NATS Streaming appears after JetStream has been chosen.
async fn warn_on_stan(probe: &Probe) {
    loop {
        tokio::time::sleep(STAN_WATCH_INTERVAL).await;
        match probe.stan_presence().await {
            StanPresence::Present => break,
            StanPresence::Absent => {}
            // Permission to ask is missing, so polling is pointless.
            StanPresence::Unknown => return,
        }
    }
    tracing::warn!(
        "NATS Streaming answers as well, and may have queued calls that are not executed: set queue to stan or to jetstream"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nats_streaming_is_preferred_unless_jetstream_has_the_queue() {
        let soon = Duration::ZERO;
        for (stan, jetstream, has_queue_stream, absent, expect) in [
            (StanPresence::Present, true, true, STAN_ABSENCE_TIMEOUT, Some(BackendKind::Stan)),
            (StanPresence::Present, false, false, soon, Some(BackendKind::Stan)),
            (StanPresence::Absent, true, true, soon, Some(BackendKind::JetStream)),
            (StanPresence::Unknown, true, true, soon, Some(BackendKind::JetStream)),
            (StanPresence::Absent, true, false, soon, None),
            (StanPresence::Unknown, true, false, soon, None),
            (StanPresence::Absent, true, false, STAN_ABSENCE_TIMEOUT, Some(BackendKind::JetStream)),
            (
                StanPresence::Unknown,
                true,
                false,
                STAN_ABSENCE_TIMEOUT,
                Some(BackendKind::JetStream),
            ),
            (StanPresence::Absent, false, false, STAN_ABSENCE_TIMEOUT, None),
        ] {
            let probed = ProbeResult { stan, jetstream, has_queue_stream };
            assert_eq!(choose_backend(probed, absent), expect, "{probed:?} {absent:?}");
        }
    }
}
