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

/// What is seen of NATS Streaming.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::queue) enum Sight {
    There,
    /// Nobody listens where it would.
    Absent,
    /// Somebody may listen, or one may not ask: a server of before 2.2 does not tell, and none tells what is forbidden.
    Silent,
}

/// What is seen of a NATS server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::queue) struct Seen {
    pub(in crate::queue) stan: Sight,
    pub(in crate::queue) jetstream: bool,
    /// JetStream has this queue.
    pub(in crate::queue) has_ours: bool,
}

/// What asks.
pub(in crate::queue) struct Probe {
    nats: Nats,
    cluster: String,
    queue: String,
}

impl Probe {
    /// Begins to connect.
    ///
    /// # Errors
    /// When the options cannot be.
    pub(in crate::queue) async fn open(options: &Options, cluster: &str) -> anyhow::Result<Self> {
        let (cluster, queue) = (cluster.to_owned(), options.queue.clone());
        Ok(Self { nats: Nats::open(options).await?, cluster, queue })
    }

    /// Who answers; `None`: there is no connection.
    pub(in crate::queue) async fn ask(&self) -> Option<Seen> {
        self.nats.connected(CONNECTING).await.ok()?;
        let ours = format!("$JS.API.STREAM.INFO.gateway-{}-calls", self.queue);
        let (stan, jetstream, has_ours) = tokio::join!(
            self.stan(),
            self.jetstream_knows("$JS.API.INFO".to_owned()),
            self.jetstream_knows(ours)
        );
        let (jetstream, has_ours) = (jetstream || has_ours, has_ours);
        Some(Seen { stan, jetstream, has_ours })
    }

    pub(in crate::queue) async fn stan(&self) -> Sight {
        match self.register().await {
            Ok(()) | Err(Fault::Refused(_) | Fault::Odd) => Sight::There,
            Err(Fault::Nobody) => Sight::Absent,
            Err(Fault::Away | Fault::Unconfirmed | Fault::TooLarge) => Sight::Silent,
        }
    }

    /// Registers a client, which is what the server answers for certain, and signs it off.
    async fn register(&self) -> Result<(), Fault> {
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
        Ok(())
    }

    /// Whether JetStream answers that question, and not with an error.
    async fn jetstream_knows(&self, question: String) -> bool {
        #[derive(Deserialize)]
        struct Answer {
            error: Option<serde_json::Value>,
        }
        let Ok(answer) = self.nats.ask(question, Bytes::new(), ASKING).await else { return false };
        serde_json::from_slice::<Answer>(&answer).is_ok_and(|answer| answer.error.is_none())
    }
}
