//! Exchange of loads between gateways on a NATS subject.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use async_nats::connection::State;
use async_nats::{Client, Subscriber};
use futures_util::StreamExt as _;

use crate::loads::LoadSample;
use crate::peers::LoadReport;
use gateway_queue::jetstream::{Options, encode_token};

/// Root of the subject. The name of the queue follows, which all gateways of a cluster share.
const SUBJECT_ROOT: &str = "faas-load";
/// Capacity of the subscription: reports of some seconds.
const SUBSCRIPTION_CAPACITY: usize = 2048;
/// Maximum time to hand a report to the client, which may be busy reconnecting.
const SEND_TIMEOUT: Duration = Duration::from_millis(300);

/// Publishes load reports to the other gateways.
pub struct LoadPublisher {
    client: Client,
    subject: String,
    /// Id of this gateway.
    pub id: String,
    /// This process publishes its load, but never becomes the leader.
    observer: bool,
}

/// Receives the reports of other gateways.
pub struct LoadSubscriber(Subscriber);

impl LoadPublisher {
    /// Starts to connect, and returns immediately. An observer (`observer`) never becomes the leader.
    ///
    /// # Errors
    /// When a file with credentials cannot be read, or the client cannot subscribe. The caller should fail to start.
    pub async fn open(options: &Options, observer: bool) -> anyhow::Result<(Self, LoadSubscriber)> {
        let connect = options.connect_options().await?.subscription_capacity(SUBSCRIPTION_CAPACITY);
        let client = connect.connect(options.servers.as_slice()).await;
        let client = client.context("cannot create the connection to NATS")?;
        let subject = format!("{SUBJECT_ROOT}.{}", encode_token(&options.queue));
        let subscriber =
            client.subscribe(subject.clone()).await.context("cannot subscribe on NATS")?;
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let id = format!("{:013x}-{}", started.as_millis(), uuid::Uuid::new_v4().simple());
        Ok((Self { client, subject, id, observer }, LoadSubscriber(subscriber)))
    }

    pub fn is_connected(&self) -> bool {
        self.client.connection_state() == State::Connected
    }

    /// Publishes a sample; `seq` is its number.
    pub async fn publish(&self, seq: u64, loads: &HashMap<Arc<str>, LoadSample>) {
        let loads = loads.iter().map(|(label, load)| (label.to_string(), *load)).collect();
        let (id, observer) = (self.id.clone(), self.observer);
        let template = LoadReport { id, seq, observer, ..LoadReport::default() };
        for message in LoadReport::split(&template, loads) {
            self.send(&message).await;
        }
    }

    /// Announces that this gateway stops.
    pub async fn leave(&self) {
        let message = LoadReport { id: self.id.clone(), leaving: true, ..LoadReport::default() };
        self.send(&message).await;
        // Gateways that miss the announcement notice the missing reports.
        let _ = tokio::time::timeout(SEND_TIMEOUT, self.client.flush()).await;
    }

    async fn send(&self, message: &LoadReport) {
        // The client would buffer the report, which would be outdated after the reconnect.
        if !self.is_connected() {
            return;
        }
        let Ok(payload) = serde_json::to_vec(message) else { return };
        let sent = self.client.publish(self.subject.clone(), payload.into());
        match tokio::time::timeout(SEND_TIMEOUT, sent).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "Cannot publish the load report"),
            Err(_) => tracing::debug!("Timeout while publishing the load report"),
        }
    }
}

impl LoadSubscriber {
    /// Waits for the next report. Cancel-safe.
    pub async fn recv(&mut self) -> LoadReport {
        loop {
            let Some(message) = self.0.next().await else {
                // The client is gone: the process is stopping.
                return std::future::pending().await;
            };
            match serde_json::from_slice(&message.payload) {
                Ok(message) => return message,
                Err(error) => tracing::debug!(%error, "Invalid load report"),
            }
        }
    }
}
