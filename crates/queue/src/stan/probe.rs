//! Detects whether a NATS server offers NATS Streaming or JetStream.

use std::time::Duration;

use bytes::Bytes;
use serde::Deserialize;

use crate::jetstream::Options;
use crate::stan::client::{PING_INTERVAL_SECONDS, PING_MAX_OUT, discover_subject, unique_name};
use crate::stan::nats::{NatsConnection, NatsError};
use crate::stan::proto::{Close, Closed, ConnectRequest, ConnectResponse, PROTOCOL_VERSION};

const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Presence of a NATS Streaming server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StanPresence {
    Present,
    /// There is no subscriber to its subject.
    Absent,
    /// Unknown: servers before 2.2 do not report missing subscribers, and none does where publishing is forbidden.
    Unknown,
}

/// The result of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ProbeResult {
    pub(crate) stan: StanPresence,
    pub(crate) jetstream: bool,
    /// JetStream has a stream of this queue.
    pub(crate) has_queue_stream: bool,
}

/// A connection for probes.
pub(crate) struct Probe {
    nats: NatsConnection,
    cluster: String,
    queue: String,
}

impl Probe {
    /// Starts to connect.
    ///
    /// # Errors
    /// When the options are invalid.
    pub(crate) async fn open(options: &Options, cluster: &str) -> anyhow::Result<Self> {
        let (cluster, queue) = (cluster.to_owned(), options.queue.clone());
        Ok(Self { nats: NatsConnection::open(options).await?, cluster, queue })
    }

    /// Probes the server; `None` if there is no connection.
    pub(crate) async fn run(&self) -> Option<ProbeResult> {
        self.nats.wait_connected(CONNECT_TIMEOUT).await.ok()?;
        let ours = format!("$JS.API.STREAM.INFO.gateway-{}-calls", self.queue);
        let (stan, jetstream, has_queue_stream) = tokio::join!(
            self.stan_presence(),
            self.jetstream_answers("$JS.API.INFO".to_owned()),
            self.jetstream_answers(ours)
        );
        let (jetstream, has_queue_stream) = (jetstream || has_queue_stream, has_queue_stream);
        Some(ProbeResult { stan, jetstream, has_queue_stream })
    }

    /// Checks only for NATS Streaming.
    pub(crate) async fn stan_presence(&self) -> StanPresence {
        match self.register().await {
            Ok(()) | Err(NatsError::Rejected(_) | NatsError::UnexpectedResponse) => {
                StanPresence::Present
            }
            Err(NatsError::NoResponders) => StanPresence::Absent,
            Err(NatsError::Unreachable | NatsError::Unconfirmed | NatsError::TooLarge) => {
                StanPresence::Unknown
            }
        }
    }

    /// Registers a client, the one request that every server answers, and closes its session.
    async fn register(&self) -> Result<(), NatsError> {
        let client_id = format!("gateway-probe-{}", unique_name());
        let request = ConnectRequest {
            client_id: client_id.clone(),
            heartbeat_inbox: self.nats.inbox(),
            protocol: PROTOCOL_VERSION,
            connection: unique_name().into(),
            ping_interval: PING_INTERVAL_SECONDS,
            ping_max_out: PING_MAX_OUT,
        };
        let subject = discover_subject(&self.cluster);
        let server: ConnectResponse =
            self.nats.request(&subject, &request, REQUEST_TIMEOUT).await?;
        if server.error.is_empty() {
            // If the request is lost, the server drops the client, which answers no heartbeats.
            let close = Close { client_id };
            let _: Result<Closed, _> =
                self.nats.request(&server.close, &close, REQUEST_TIMEOUT).await;
        }
        Ok(())
    }

    /// Returns whether JetStream answers a request, and without an error.
    async fn jetstream_answers(&self, request: String) -> bool {
        #[derive(Deserialize)]
        struct Response {
            error: Option<serde_json::Value>,
        }
        let Ok(response) = self.nats.request_raw(request, Bytes::new(), REQUEST_TIMEOUT).await
        else {
            return false;
        };
        serde_json::from_slice::<Response>(&response).is_ok_and(|response| response.error.is_none())
    }
}
