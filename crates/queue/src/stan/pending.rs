//! Calls that wait in memory for a free slot, and the acknowledgement of their messages.

use prost::Message as _;

use crate::call::{QueuedCall, UnixMillis};
use crate::stan::Shared;
use crate::stan::inflight::MessageKey;
use crate::stan::message::Progress;
use crate::stan::proto::Ack;

/// A received call that waits for its execution.
#[derive(Debug)]
pub(super) struct ReceivedCall {
    pub(super) call: QueuedCall,
    pub(super) progress: Progress,
}

impl Shared {
    /// Adds a call that is due at `at` to the pending ones.
    pub(super) fn enqueue(&self, key: MessageKey, at: UnixMillis, received: ReceivedCall) {
        self.inflight().enqueue(key, received.call.function.clone(), at, received);
        self.ready.notify_one();
        self.congested[key.channel.number()].notify_one();
    }

    /// Acknowledges a message. If the acknowledgement is lost, the server redelivers the message.
    pub(super) async fn acknowledge(&self, key: MessageKey) {
        let ack_subject = self.inflight().finish(key);
        // Its function may have a free slot now.
        self.ready.notify_one();
        if let Some(ack_subject) = ack_subject {
            let channel = self.channel(key.channel).to_owned();
            let ack = Ack { channel, sequence: key.sequence };
            let _ = self.nats.send(ack_subject, ack.encode_to_vec().into()).await;
        }
    }
}
