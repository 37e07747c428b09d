//! The gateways' word to each other, on a subject of NATS.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use async_nats::connection::State;
use async_nats::{Client, Subscriber};
use futures_util::StreamExt as _;

use crate::autoscale::loads::Load;
use crate::autoscale::peers::Message;
use crate::queue::jetstream::{Options, token};

/// The root of the subject; behind it stands the name of the queue, which those gateways share that belong together.
const SUBJECT: &str = "faas-load";
/// Messages that wait to be read: some seconds' worth.
const WAITING: usize = 2048;
/// The client may be busy with its connection for so long.
const PATIENCE: Duration = Duration::from_millis(300);

/// The way to the other gateways.
pub struct Exchange {
    client: Client,
    subject: String,
    /// Who this one is to the others.
    pub id: String,
    /// It only tells.
    mute: bool,
}

/// What the others say.
pub struct Ear(Subscriber);

impl Exchange {
    /// Begins to connect; that this succeeds is not waited for. `mute`: it only tells.
    ///
    /// # Errors
    /// When a file that the credentials are in cannot be read.
    pub async fn open(options: &Options, mute: bool) -> anyhow::Result<(Self, Ear)> {
        let connect = options.connect_options().await?.subscription_capacity(WAITING);
        let client = connect.connect(options.servers.as_slice()).await;
        let client = client.context("cannot make a connection to NATS")?;
        let subject = format!("{SUBJECT}.{}", token(&options.queue));
        let ear = client.subscribe(subject.clone()).await.context("cannot listen on NATS")?;
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let id = format!("{:013x}-{}", started.as_millis(), uuid::Uuid::new_v4().simple());
        Ok((Self { client, subject, id, mute }, Ear(ear)))
    }

    pub fn is_connected(&self) -> bool {
        self.client.connection_state() == State::Connected
    }

    /// Tells the others what was seen here. `beat`: the number of what is told.
    pub async fn tell(&self, beat: u64, loads: &HashMap<Arc<str>, Load>) {
        let loads = loads.iter().map(|(label, load)| (label.to_string(), *load)).collect();
        let (id, mute) = (self.id.clone(), self.mute);
        let whole = Message { id, beat, mute, ..Message::default() };
        for message in Message::split(&whole, loads) {
            self.send(&message).await;
        }
    }

    /// Tells the others that this gateway goes.
    pub async fn leave(&self) {
        let message = Message { id: self.id.clone(), leaving: true, ..Message::default() };
        self.send(&message).await;
        // Whoever does not hear of it will notice.
        let _ = tokio::time::timeout(PATIENCE, self.client.flush()).await;
    }

    async fn send(&self, message: &Message) {
        // What is not said now is old when the connection is back.
        if !self.is_connected() {
            return;
        }
        let Ok(payload) = serde_json::to_vec(message) else { return };
        let said = self.client.publish(self.subject.clone(), payload.into());
        match tokio::time::timeout(PATIENCE, said).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "The other gateways are not told"),
            Err(_) => tracing::debug!("The other gateways are not told in time"),
        }
    }
}

impl Ear {
    /// The next thing that is said. Cancel-safe.
    pub async fn hear(&mut self) -> Message {
        loop {
            let Some(heard) = self.0.next().await else {
                // The client is gone, and with it this process.
                return std::future::pending().await;
            };
            match serde_json::from_slice(&heard.payload) {
                Ok(message) => return message,
                Err(error) => tracing::debug!(%error, "Word that is no gateway's"),
            }
        }
    }
}
