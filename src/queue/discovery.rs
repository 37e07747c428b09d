//! The queue on a NATS server of which it is not known yet what it speaks: JetStream or NATS Streaming. Whichever answers
//! first is taken, once and for all.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::runtime::Handle as Runtime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::queue::Queue;
use crate::queue::jetstream::{self, JetStream};
use crate::queue::stan::probe::{Kind, Probe};
use crate::queue::stan::{self, Stan};

/// Between two times of asking.
const AGAIN: Duration = Duration::from_millis(500);
/// How long the asking may take to end.
const STOP: Duration = Duration::from_secs(1);

/// What is found out. Cheap to clone.
#[derive(Clone)]
pub struct Discovery {
    shared: Arc<Shared>,
}

struct Shared {
    found: OnceLock<Queue>,
    is_found: watch::Sender<bool>,
    stopping: CancellationToken,
    tracker: TaskTracker,
}

impl Discovery {
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
                queue = find(&probe, nats, stan) => {
                    let _ = asking.found.set(queue);
                    asking.is_found.send_replace(true);
                }
            }
        };
        shared.tracker.spawn_on(task, &Runtime::current());
        Ok(Self { shared })
    }

    /// The queue, once it is known.
    pub(super) fn found(&self) -> Option<&Queue> {
        self.shared.found.get()
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

async fn find(probe: &Probe, nats: jetstream::Options, stan: stan::Options) -> Queue {
    loop {
        let opened = match probe.ask().await {
            Some(Kind::Stan) => {
                Stan::open(nats.clone(), stan.clone()).await.map(|queue| Some(Queue::Stan(queue)))
            }
            Some(Kind::JetStream) => {
                tracing::info!("Queued calls are kept by JetStream");
                JetStream::open(nats.clone()).await.map(|queue| Some(Queue::JetStream(queue)))
            }
            None => Ok(None),
        };
        match opened {
            Ok(Some(queue)) => return queue,
            Ok(None) => tracing::debug!("Neither JetStream nor NATS Streaming answers"),
            Err(error) => tracing::error!("The queue cannot be opened: {error:#}"),
        }
        tokio::time::sleep(AGAIN).await;
    }
}
