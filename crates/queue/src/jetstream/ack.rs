//! Acknowledges delivered messages.
use std::sync::Mutex;
use std::time::Duration;

use async_nats::jetstream::AckKind;
use bytes::Bytes;

use crate::jetstream::api::JetStreamApi;
use gateway_base::sync::lock_unpoisoned;

/// Time limit for sending an ack or a pull.
pub(super) const SEND_TIMEOUT: Duration = Duration::from_secs(1);

/// Pause after a failure.
pub(super) const RETRY_INTERVAL: Duration = Duration::from_millis(200);

/// Subject for acks of a message; each redelivery replaces it. The lock is a leaf.
pub(super) struct AckSubject(Mutex<String>);

impl AckSubject {
    pub(super) fn new(reply: String) -> Self {
        Self(Mutex::new(reply))
    }

    pub(super) fn get(&self) -> String {
        lock_unpoisoned(&self.0).clone()
    }

    /// Replaces the subject after a redelivery.
    pub(super) fn set(&self, reply: String) {
        *lock_unpoisoned(&self.0) = reply;
    }
}

/// Sends an ack, nak or in-progress ack. If it is lost, the server redelivers the message after the lease.
pub(super) async fn send_ack(api: &JetStreamApi, reply: &str, kind: AckKind) {
    let sent = api.client.publish(reply.to_owned(), Bytes::from(kind));
    let _ = tokio::time::timeout(SEND_TIMEOUT, sent).await;
}
