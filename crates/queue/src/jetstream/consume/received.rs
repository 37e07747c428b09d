//! A call that was delivered to this process.
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::AckKind;

use crate::call::QueuedCall;
use crate::jetstream::Shared;
use crate::jetstream::ack::{AckSubject, send_ack};
use crate::jetstream::batch::held::Batch;
use crate::jetstream::wire::call_ref::{BatchIndex, CallRef};
use crate::jetstream::wire::message::Message;

/// A call that was delivered to this process.
pub(in crate::jetstream) struct Received {
    pub(in crate::jetstream) call: QueuedCall,
    /// The message of the call; for a call in a batch, the message that it would have on its own.
    pub(in crate::jetstream) message: Message,
    pub(in crate::jetstream) sequence: u64,
    /// Number of deliveries of the message so far, to any process.
    pub(in crate::jetstream) deliveries: u32,
    pub(in crate::jetstream) source: Source,
    /// Name of the consumer that delivered the message.
    pub(in crate::jetstream) consumer: Arc<str>,
    /// Time until the server redelivers the message without an in-progress ack.
    pub(in crate::jetstream) lease: Duration,
}

/// The message that contains the call.
pub(in crate::jetstream) enum Source {
    /// A message of its own.
    Single(AckSubject),
    /// A batch, and the index of the call within it.
    InBatch(Arc<Batch>, BatchIndex),
}

impl Received {
    pub(in crate::jetstream) fn call_ref(&self) -> CallRef {
        match &self.source {
            Source::Single(_) => CallRef::single(self.sequence),
            Source::InBatch(_, index) => CallRef::in_batch(self.sequence, *index),
        }
    }

    /// Acknowledges the call: it is finished or has another message.
    pub(in crate::jetstream) async fn finish(&self, shared: &Shared) {
        match &self.source {
            Source::Single(ack_subject) => {
                send_ack(&shared.api, &ack_subject.get(), AckKind::Ack).await
            }
            Source::InBatch(bundle, _) => bundle.call_done(shared).await,
        }
    }

    /// Returns the call to the queue; it is redelivered after `delay`.
    pub(in crate::jetstream) async fn nak(&self, shared: &Arc<Shared>, delay: Option<Duration>) {
        match &self.source {
            Source::Single(ack_subject) => {
                send_ack(&shared.api, &ack_subject.get(), AckKind::Nak(delay)).await;
            }
            Source::InBatch(bundle, index) => {
                // Meanwhile nothing extends the lease of the batch.
                tokio::time::sleep(delay.unwrap_or_default().min(self.lease / 3)).await;
                bundle.release(shared, &self.call, *index).await;
            }
        }
    }

    pub(in crate::jetstream) async fn in_progress(&self, shared: &Shared) {
        match &self.source {
            Source::Single(ack_subject) => {
                send_ack(&shared.api, &ack_subject.get(), AckKind::Progress).await;
            }
            Source::InBatch(bundle, _) => bundle.in_progress(shared).await,
        }
    }

    /// Replaces the ack subject after a redelivery.
    pub(in crate::jetstream) fn update_ack_subject(&self, reply: String) {
        let ack_subject = match &self.source {
            Source::Single(ack_subject) => ack_subject,
            Source::InBatch(bundle, _) => &bundle.ack_subject,
        };
        ack_subject.set(reply);
    }
}
