//! Requests about consumers.
use async_nats::jetstream::consumer::Info;
use serde::{Deserialize, Deserializer};
use serde_json::json;

use crate::jetstream::api::JetStreamApi;
use crate::jetstream::error::{CONSUMER_NOT_FOUND, NatsError};

#[derive(Deserialize)]
pub(in crate::jetstream) struct ConsumerState {
    pub(in crate::jetstream) name: String,
    /// Messages that were never delivered.
    #[serde(default, rename = "num_pending")]
    pub(in crate::jetstream) pending: u64,
    /// Messages that were delivered, but not acknowledged.
    #[serde(default, rename = "num_ack_pending")]
    pub(in crate::jetstream) ack_pending: u64,
    /// All messages up to this sequence are acknowledged.
    #[serde(rename = "ack_floor", deserialize_with = "stream_sequence")]
    pub(in crate::jetstream) ack_floor: u64,
    /// All messages up to this sequence were delivered.
    #[serde(deserialize_with = "stream_sequence")]
    pub(in crate::jetstream) delivered: u64,
}

/// Reads the stream sequence of a consumer position.
fn stream_sequence<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    #[derive(Deserialize)]
    struct Position {
        stream_seq: u64,
    }
    Ok(Position::deserialize(deserializer)?.stream_seq)
}

impl JetStreamApi {
    /// Returns the state of a consumer. The server scans every message for this.
    pub(in crate::jetstream) async fn consumer_state(
        &self,
        stream: &str,
        name: &str,
    ) -> Result<ConsumerState, NatsError> {
        self.call_api(&format!("CONSUMER.INFO.{stream}.{name}"), &json!({})).await
    }

    pub(in crate::jetstream) async fn consumer_names(
        &self,
        stream: &str,
    ) -> Result<Vec<String>, NatsError> {
        #[derive(Deserialize)]
        struct Page {
            #[serde(default)]
            total: usize,
            consumers: Option<Vec<String>>,
        }
        let mut names = Vec::new();
        loop {
            let request = json!({ "offset": names.len() });
            let page: Page = self.call_api(&format!("CONSUMER.NAMES.{stream}"), &request).await?;
            let found = page.consumers.unwrap_or_default();
            let empty = found.is_empty();
            names.extend(found);
            if empty || names.len() >= page.total {
                return Ok(names);
            }
        }
    }

    /// Returns the states of all consumers of `stream`. The server scans every message for each of them.
    pub(in crate::jetstream) async fn consumers(
        &self,
        stream: &str,
    ) -> Result<Vec<ConsumerState>, NatsError> {
        #[derive(Deserialize)]
        struct Page {
            #[serde(default)]
            total: usize,
            consumers: Option<Vec<ConsumerState>>,
        }
        let mut consumers = Vec::new();
        loop {
            let request = json!({ "offset": consumers.len() });
            let page: Page = self.call_api(&format!("CONSUMER.LIST.{stream}"), &request).await?;
            let found = page.consumers.unwrap_or_default();
            let empty = found.is_empty();
            consumers.extend(found);
            if empty || consumers.len() >= page.total {
                return Ok(consumers);
            }
        }
    }

    /// Returns the state of a consumer, or `None` if it does not exist.
    pub(in crate::jetstream) async fn consumer_info(
        &self,
        stream: &str,
        name: &str,
    ) -> Result<Option<Info>, NatsError> {
        match self.call_api(&format!("CONSUMER.INFO.{stream}.{name}"), &json!({})).await {
            Ok(info) => Ok(Some(info)),
            Err(NatsError::Rejected(CONSUMER_NOT_FOUND, _)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes a consumer; a missing one is no error.
    pub(in crate::jetstream) async fn delete_consumer(
        &self,
        stream: &str,
        name: &str,
    ) -> Result<(), NatsError> {
        let endpoint = format!("CONSUMER.DELETE.{stream}.{name}");
        match self.call_api::<serde_json::Value>(&endpoint, &json!({})).await {
            Ok(_) | Err(NatsError::Rejected(CONSUMER_NOT_FOUND, _)) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
