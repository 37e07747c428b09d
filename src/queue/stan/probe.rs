//! Asks a NATS server who keeps queues there.

use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use serde::Deserialize;

use crate::queue::jetstream::Options;
use crate::queue::stan::client::discover;
use crate::queue::stan::nats::{Fault, Nats};
use crate::queue::stan::proto::{ConnectRequest, ConnectResponse};

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
            // It is there, and will answer.
            (Err(Fault::Away), _) => None,
            (_, Ok(true)) => Some(Kind::JetStream),
            _ => None,
        }
    }

    /// A client without an id is refused; that somebody does so is what was asked.
    async fn is_stan(&self) -> Result<bool, Fault> {
        let nobody = ConnectRequest::default().encode_to_vec().into();
        let answer = self.nats.ask(discover(&self.cluster), nobody, ASKING).await?;
        Ok(ConnectResponse::decode(answer).is_ok())
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
