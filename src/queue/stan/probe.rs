//! Asks a NATS server who keeps queues there.

use std::time::Duration;

use bytes::Bytes;
use serde::Deserialize;

use crate::queue::jetstream::Options;
use crate::queue::stan::client::{PING_INTERVAL, PING_MAX_OUT, discover, name};
use crate::queue::stan::nats::{Fault, Nats};
use crate::queue::stan::proto::{Close, Closed, ConnectRequest, ConnectResponse, PROTOCOL};

const ASKING: Duration = Duration::from_secs(2);
const CONNECTING: Duration = Duration::from_secs(5);

/// Who keeps queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::queue) enum Kind {
    JetStream,
    Stan,
}

/// What asks.
pub(in crate::queue) struct Probe {
    nats: Nats,
    cluster: String,
}

impl Probe {
    /// Begins to connect.
    ///
    /// # Errors
    /// When the options cannot be.
    pub(in crate::queue) async fn open(options: &Options, cluster: &str) -> anyhow::Result<Self> {
        Ok(Self { nats: Nats::open(options).await?, cluster: cluster.to_owned() })
    }

    /// Who answers, if anybody does. NATS Streaming comes first: whoever runs it has queued calls there.
    pub(in crate::queue) async fn ask(&self) -> Option<Kind> {
        self.nats.connected(CONNECTING).await.ok()?;
        let (stan, jetstream) = tokio::join!(self.is_stan(), self.is_jetstream());
        match (stan, jetstream) {
            (Ok(true), _) => Some(Kind::Stan),
            // Somebody is asked, and will answer: nobody else is taken meanwhile. A server of before 2.2 does not tell
            // whether there is somebody; it has no JetStream, either.
            (Err(Fault::Away), _) => None,
            (_, Ok(true)) => Some(Kind::JetStream),
            _ => None,
        }
    }

    /// Registers a client, which is what the server answers for certain, and signs it off.
    async fn is_stan(&self) -> Result<bool, Fault> {
        let client_id = format!("gateway-probe-{}", name());
        let request = ConnectRequest {
            client_id: client_id.clone(),
            heartbeat_inbox: self.nats.inbox(),
            protocol: PROTOCOL,
            connection: name().into(),
            ping_interval: PING_INTERVAL,
            ping_max_out: PING_MAX_OUT,
        };
        let subject = discover(&self.cluster);
        let server: ConnectResponse = self.nats.request(&subject, &request, ASKING).await?;
        if server.error.is_empty() {
            // One that is lost is found out by the server, since nobody answers for the client.
            let close = Close { client_id };
            let _: Result<Closed, _> = self.nats.request(&server.close, &close, ASKING).await;
        }
        Ok(true)
    }

    async fn is_jetstream(&self) -> Result<bool, Fault> {
        #[derive(Deserialize)]
        struct Account {
            error: Option<serde_json::Value>,
        }
        let answer = self.nats.ask("$JS.API.INFO".to_owned(), Bytes::new(), ASKING).await?;
        Ok(serde_json::from_slice::<Account>(&answer).is_ok_and(|account| account.error.is_none()))
    }
}
