//! Requests about stored messages.
use std::collections::HashMap;

use async_nats::HeaderMap;
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::RawMessage;
use bytes::Bytes;
use serde::Deserialize;
use serde_json::json;

use crate::jetstream::api::JetStreamApi;
use crate::jetstream::error::{MESSAGE_NOT_FOUND, NatsError, STORE_FAILED};

/// Response to a publish.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(in crate::jetstream) struct PubAck {
    #[serde(rename = "seq")]
    pub(in crate::jetstream) sequence: u64,
    /// The server has seen the same message id before, at `sequence`.
    #[serde(default)]
    pub(in crate::jetstream) duplicate: bool,
}

/// Limits of a stream, and how much of them is used.
#[derive(Deserialize)]
struct StreamUsage {
    config: StreamLimits,
    state: StreamSize,
}

#[derive(Deserialize)]
struct StreamLimits {
    /// Not positive for no limit.
    #[serde(default)]
    max_msgs: i64,
}

#[derive(Deserialize)]
struct StreamSize {
    messages: u64,
}

impl JetStreamApi {
    /// Publishes a message. With `last`, only if the last message of the subject has that sequence.
    pub(in crate::jetstream) async fn publish(
        &self,
        subject: String,
        mut headers: HeaderMap,
        body: Bytes,
        last: Option<u64>,
    ) -> Result<PubAck, NatsError> {
        if let Some(last) = last {
            headers.insert("Nats-Expected-Last-Subject-Sequence", last.to_string());
        }
        let response = self.request(subject, Some(headers), body).await?;
        match self.parse_response(&response) {
            Err(NatsError::Rejected(STORE_FAILED, text)) => {
                Err(Box::pin(self.explain_store_failure(&response, text)).await)
            }
            parsed => parsed,
        }
    }

    /// Returns why the server has not stored a message. It reports [`STORE_FAILED`] for all reasons, so the stream is
    /// queried.
    async fn explain_store_failure(&self, response: &[u8], text: String) -> NatsError {
        #[derive(Deserialize)]
        struct Rejection {
            stream: String,
        }
        let rejected = NatsError::Rejected(STORE_FAILED, text);
        let Ok(Rejection { stream }) = serde_json::from_slice(response) else { return rejected };
        match self.stream_usage(&stream).await {
            Ok(StreamUsage { config, state })
                if u64::try_from(config.max_msgs)
                    .is_ok_and(|max| max > 0 && state.messages >= max) =>
            {
                NatsError::StreamFull
            }
            _ => rejected,
        }
    }

    /// Returns the last message of `stream` on `subject`, which may contain wildcards.
    pub(in crate::jetstream) async fn get_last(
        &self,
        stream: &str,
        subject: &str,
    ) -> Result<Option<StreamMessage>, NatsError> {
        self.request_message(stream, json!({ "last_by_subj": subject })).await
    }

    pub(in crate::jetstream) async fn get(
        &self,
        stream: &str,
        number: u64,
    ) -> Result<Option<StreamMessage>, NatsError> {
        self.request_message(stream, json!({ "seq": number })).await
    }

    /// Returns the first message of `stream` on `subject`, at or after the sequence `from`.
    pub(in crate::jetstream) async fn get_next(
        &self,
        stream: &str,
        subject: &str,
        from: u64,
    ) -> Result<Option<StreamMessage>, NatsError> {
        self.request_message(stream, json!({ "seq": from, "next_by_subj": subject })).await
    }

    async fn request_message(
        &self,
        stream: &str,
        request: serde_json::Value,
    ) -> Result<Option<StreamMessage>, NatsError> {
        #[derive(Deserialize)]
        struct Got {
            message: RawMessage,
        }
        match self.call_api::<Got>(&format!("STREAM.MSG.GET.{stream}"), &request).await {
            Ok(got) => got.message.try_into().map(Some).map_err(|_| NatsError::UnexpectedResponse),
            Err(NatsError::Rejected(MESSAGE_NOT_FOUND, _)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes a message. Returns whether it existed; a message that is already gone is no error.
    pub(in crate::jetstream) async fn delete(
        &self,
        stream: &str,
        number: u64,
    ) -> Result<bool, NatsError> {
        let request = json!({ "seq": number, "no_erase": true });
        let endpoint = format!("STREAM.MSG.DELETE.{stream}");
        match self.call_api::<serde_json::Value>(&endpoint, &request).await {
            Ok(_) => Ok(true),
            // The error code for an unknown sequence differs between server versions.
            Err(NatsError::Rejected(code, text)) => match self.get(stream, number).await? {
                Some(_) => Err(NatsError::Rejected(code, text)),
                None => Ok(false),
            },
            Err(error) => Err(error),
        }
    }

    /// Removes all messages on `subject` (which may contain wildcards), up to and including the sequence `last`.
    pub(in crate::jetstream) async fn purge(
        &self,
        stream: &str,
        subject: &str,
        last: u64,
    ) -> Result<(), NatsError> {
        let request = json!({ "filter": subject, "seq": last.saturating_add(1) });
        self.call_api::<serde_json::Value>(&format!("STREAM.PURGE.{stream}"), &request)
            .await
            .map(drop)
    }

    pub(in crate::jetstream) async fn message_count(&self, stream: &str) -> Result<u64, NatsError> {
        Ok(self.stream_usage(stream).await?.state.messages)
    }

    async fn stream_usage(&self, stream: &str) -> Result<StreamUsage, NatsError> {
        self.call_api(&format!("STREAM.INFO.{stream}"), &json!({})).await
    }

    /// Returns the subjects of `stream` that match `filter`. Stops after the page that reaches `max` subjects.
    pub(in crate::jetstream) async fn subjects(
        &self,
        stream: &str,
        filter: &str,
        max: usize,
    ) -> Result<Vec<String>, NatsError> {
        #[derive(Deserialize)]
        struct Page {
            #[serde(default)]
            total: usize,
            state: Listed,
        }
        #[derive(Deserialize)]
        struct Listed {
            subjects: Option<HashMap<String, u64>>,
        }
        let mut subjects = Vec::new();
        loop {
            let request = json!({ "subjects_filter": filter, "offset": subjects.len() });
            let page: Page = self.call_api(&format!("STREAM.INFO.{stream}"), &request).await?;
            let found = page.state.subjects.unwrap_or_default();
            let empty = found.is_empty();
            subjects.extend(found.into_keys());
            if empty || subjects.len() >= page.total.min(max) {
                return Ok(subjects);
            }
        }
    }
}
