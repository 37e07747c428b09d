//! The queue on a NATS server of which it is not known yet what it speaks: JetStream or NATS Streaming. One of them is taken,
//! once and for all.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::runtime::Handle as Runtime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::queue::Queue;
use crate::queue::jetstream::{self, JetStream};
use crate::queue::stan::probe::{Probe, ProbeResult, StanPresence};
use crate::queue::stan::{self, Stan};

/// Between two times of asking.
const AGAIN: Duration = Duration::from_millis(500);
/// NATS Streaming that has not answered for so long is not about to.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks at whether it turns up after all.
const LOOK_OUT: Duration = Duration::from_secs(10);
/// How long the asking may take to end.
const STOP: Duration = Duration::from_secs(1);

/// What is found out. Cheap to clone.
#[derive(Clone)]
pub struct BackendDetector {
    shared: Arc<Shared>,
    /// What was found, for one thread.
    own: Arc<OnceLock<Queue>>,
}

struct Shared {
    found: OnceLock<Queue>,
    is_found: watch::Sender<bool>,
    stopping: CancellationToken,
    tracker: TaskTracker,
}

impl BackendDetector {
    /// Begins to ask. The server may be away: then it is asked when it comes.
    ///
    /// # Errors
    /// When the options cannot be.
    pub async fn open(nats: jetstream::Options, stan: stan::Options) -> anyhow::Result<Self> {
        let probe = Probe::open(&nats, &stan.cluster).await?;
        let shared = Arc::new(Shared {
            found: OnceLock::new(),
            is_found: watch::Sender::new(false),
            stopping: CancellationToken::new(),
            tracker: TaskTracker::new(),
        });
        let asking = Arc::clone(&shared);
        let task = async move {
            // Nothing is held that would be lost.
            tokio::select! {
                () = asking.stopping.cancelled() => {}
                () = async {
                    let queue = find(&probe, &nats, &stan).await;
                    let is_jetstream = matches!(queue, Queue::JetStream(_));
                    let _ = asking.found.set(queue);
                    asking.is_found.send_replace(true);
                    if is_jetstream {
                        look_out(&probe).await;
                    }
                } => {}
            }
        };
        shared.tracker.spawn_on(task, &Runtime::current());
        Ok(Self { shared, own: Arc::default() })
    }

    /// The same, for one who asks much of the queue on the current thread and its runtime.
    pub(super) fn for_thread(&self) -> Self {
        let thread = Self { shared: Arc::clone(&self.shared), own: Arc::default() };
        let found = thread.clone();
        let task = async move {
            found.until_found().await;
            if let Some(queue) = found.shared.found.get() {
                let _ = found.own.set(queue.for_thread());
            }
        };
        let stopping = self.shared.stopping.clone();
        self.shared.tracker.spawn(async move {
            // It holds nothing.
            tokio::select! {
                () = stopping.cancelled() => {}
                () = task => {}
            }
        });
        thread
    }

    /// The queue, once it is known.
    pub(super) fn found(&self) -> Option<&Queue> {
        self.own.get().or_else(|| self.shared.found.get())
    }

    /// Waits until the queue is known.
    pub(super) async fn until_found(&self) {
        // The sender lives as long as this.
        let _ = self.shared.is_found.subscribe().wait_for(|found| *found).await;
    }

    /// Asks no more.
    pub(super) async fn stop(&self) {
        self.shared.stopping.cancel();
        self.shared.tracker.close();
        let _ = tokio::time::timeout(STOP, self.shared.tracker.wait()).await;
    }
}

/// Whoever keeps the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    JetStream,
    Stan,
}

/// Who is taken, after NATS Streaming has not been there for so long, while JetStream was. It comes first, since whoever
/// runs it has queued calls there, and it may be away for a moment; JetStream is certain at once if it has the queue.
fn choose(seen: ProbeResult, absent: Duration) -> Option<Kind> {
    match seen {
        ProbeResult { stan: StanPresence::Present, .. } => Some(Kind::Stan),
        ProbeResult { has_queue_stream: true, .. } => Some(Kind::JetStream),
        ProbeResult { jetstream: true, .. } if absent >= PATIENCE => Some(Kind::JetStream),
        _ => None,
    }
}

async fn find(probe: &Probe, nats: &jetstream::Options, stan: &stan::Options) -> Queue {
    let (mut absent, mut nobody) = (None, Some(Instant::now()));
    loop {
        let seen = probe.run().await;
        let jetstream = seen.is_some_and(|seen| seen.jetstream);
        let since = *absent.get_or_insert_with(Instant::now);
        if !jetstream {
            absent = None;
        }
        let kind = seen.and_then(|seen| choose(seen, since.elapsed()));
        let opened = match kind {
            Some(Kind::Stan) => {
                Stan::open(nats.clone(), stan.clone()).await.map(|queue| Some(Queue::Stan(queue)))
            }
            Some(Kind::JetStream) => {
                tell_of_jetstream(seen);
                JetStream::open(nats.clone()).await.map(|queue| Some(Queue::JetStream(queue)))
            }
            None => Ok(None),
        };
        match opened {
            Ok(Some(queue)) => return queue,
            Ok(None) => {}
            Err(error) => tracing::error!("The queue cannot be opened: {error:#}"),
        }
        if !jetstream && nobody.is_some_and(|since| since.elapsed() >= PATIENCE) {
            nobody = None;
            // A password may stand before the address.
            let address = |server: &String| server.rsplit(['@', '/']).next().map(str::to_owned);
            let servers: Vec<String> = nats.servers.iter().filter_map(address).collect();
            let servers = servers.join(", ");
            tracing::warn!(
                "Neither JetStream nor NATS Streaming answers at {servers}: calls are not queued until one does"
            );
        }
        tokio::time::sleep(AGAIN).await;
    }
}

fn tell_of_jetstream(seen: Option<ProbeResult>) {
    if seen.is_some_and(|seen| seen.stan == StanPresence::Unknown) {
        tracing::info!(
            "Queued calls are kept by JetStream; whether there is NATS Streaming cannot be told, since the server does not \
             answer, or does not let us ask"
        );
    } else {
        tracing::info!("Queued calls are kept by JetStream");
    }
}

/// Says so if NATS Streaming turns up where JetStream was taken.
async fn look_out(probe: &Probe) {
    loop {
        tokio::time::sleep(LOOK_OUT).await;
        match probe.stan_presence().await {
            StanPresence::Present => break,
            StanPresence::Absent => {}
            // One that may not ask need not ask again.
            StanPresence::Unknown => return,
        }
    }
    tracing::warn!(
        "NATS Streaming answers as well, and may have queued calls that nobody makes here: set queue to stan or to jetstream"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nats_streaming_is_waited_for_unless_jetstream_has_the_queue() {
        let soon = Duration::ZERO;
        for (stan, jetstream, has_queue_stream, absent, expect) in [
            (StanPresence::Present, true, true, PATIENCE, Some(Kind::Stan)),
            (StanPresence::Present, false, false, soon, Some(Kind::Stan)),
            (StanPresence::Absent, true, true, soon, Some(Kind::JetStream)),
            (StanPresence::Unknown, true, true, soon, Some(Kind::JetStream)),
            (StanPresence::Absent, true, false, soon, None),
            (StanPresence::Unknown, true, false, soon, None),
            (StanPresence::Absent, true, false, PATIENCE, Some(Kind::JetStream)),
            (StanPresence::Unknown, true, false, PATIENCE, Some(Kind::JetStream)),
            (StanPresence::Absent, false, false, PATIENCE, None),
        ] {
            let seen = ProbeResult { stan, jetstream, has_queue_stream };
            assert_eq!(choose(seen, absent), expect, "{seen:?} {absent:?}");
        }
    }
}
