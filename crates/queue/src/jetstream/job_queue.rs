//! The interface of the queue for publishers and workers.
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::call::QueuedCall;
use crate::jetstream::consume::{prefetch, receive};
use crate::jetstream::gc::CONSUMER_IDLE_TIMEOUT;
use crate::jetstream::wire::ids;
use crate::jetstream::{JetStream, with_timeout};
use crate::reply_batch::ReplyChannel;
use crate::{Delivery, Error, JobQueue, JobStore, MemoryPermit, Published};
use gateway_base::function::Function;
use gateway_base::sync::lock_unpoisoned;

/// Interval between two searches for orphaned bodies.
const GC_INTERVAL: Duration = Duration::from_secs(3600);
/// Time that background tasks have to end.
const STOP_TIMEOUT: Duration = Duration::from_secs(2);

impl JobQueue for JetStream {
    fn for_thread(&self) -> Self {
        Self { shared: Arc::clone(&self.shared), reply_channel: Some(ReplyChannel::open()) }
    }

    /// The id contains a hash of `function`, so that a lookup queries few functions.
    fn new_call_id(&self, function: &Function) -> String {
        ids::new_call_id(function)
    }

    /// If the future is dropped, the call may be stored or not. The handle of a thread drops a call that still waits to
    /// be sent. Without such a handle, chunks of a large body may be left, which garbage collection removes after an
    /// hour, or a call without the entry of its idempotency key, which is stored when the call ends.
    async fn publish(
        &self,
        call: QueuedCall,
        permit: Option<MemoryPermit>,
    ) -> Result<Published, Error> {
        match &self.reply_channel {
            Some(channel) => {
                let deadline = self.shared.publish_timeout(&call);
                let published = self.shared.batcher.publish(call, permit, channel.clone());
                with_timeout(deadline, published).await
            }
            None => Box::pin(self.shared.publish_with_timeout(&call)).await,
        }
    }

    /// If the future is dropped, nothing is lost. A call that was claimed for it goes to the next receiver of this
    /// process. Without one, it returns to the queue after about a second, and counts as running until then.
    async fn receive(&self, concurrency: usize) -> Result<Delivery, Error> {
        receive::receive(&self.shared, concurrency).await
    }

    fn store(&self) -> Result<Option<&dyn JobStore>, Error> {
        Ok(Some(self))
    }

    fn is_reachable(&self) -> bool {
        self.shared.api.is_usable()
    }

    /// Checks whether the server processes requests.
    async fn probe(&self) {
        if let Ok(shared) = self.shared.ready().await
            && let Err(error) = shared.api.probe(&shared.subjects).await
        {
            tracing::debug!(%error, "The NATS server does not process requests");
        }
    }

    fn reconnects(&self) -> u64 {
        self.shared.api.reconnects()
    }

    /// Recounts the calls, and collects garbage when that is due.
    async fn sweep_expired(&self) {
        if let Err(error) = self.shared.recount_if_old().await {
            tracing::debug!(%error, "Cannot count the queued calls");
        }
        {
            let mut last_gc = lock_unpoisoned(&self.shared.last_gc);
            if last_gc.elapsed() < GC_INTERVAL && self.shared.gc_cursor().is_none() {
                return;
            }
            *last_gc = Instant::now();
        }
        match self.collect_garbage(GC_INTERVAL, CONSUMER_IDLE_TIMEOUT).await {
            Ok(0) => {}
            Ok(removed) => tracing::info!(removed, "Removed bodies that no call refers to"),
            Err(error) => tracing::debug!(%error, "Garbage collection of the queue failed"),
        }
    }

    /// Stops all background tasks: leases are no longer extended, prefetched calls are nak'ed. Waits until leases that
    /// were dropped earlier are released.
    async fn close(&self) {
        self.shared.tasks.stop();
        let buffered = self.shared.pull_scheduler().drain();
        let claimed = self.shared.prefetched().drain();
        drop(claimed);
        let release = async {
            prefetch::nak_all(&self.shared, buffered).await;
            self.shared.tasks.wait().await;
            self.shared.claims.publish_empty(&self.shared).await;
            // A nak that is not sent by now is replaced by the server's ack timeout.
            let _ = self.shared.api.client.flush().await;
        };
        let _ = tokio::time::timeout(STOP_TIMEOUT, release).await;
    }
}
