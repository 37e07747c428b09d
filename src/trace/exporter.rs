//! Sends spans to a collector, by OTLP over HTTP with JSON. What the collector does not take is dropped: no
//! call waits for it, and no memory grows.

use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST, USER_AGENT};
use http::{HeaderMap, HeaderValue, Method, Request};
use http_body_util::{BodyExt, Limited};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::call_id::USER_AGENT_VALUE;
use crate::config::base_url::BaseUrl;
use crate::metrics::traces::SpansDropped;
use crate::proxy::body::RequestBody;
use crate::proxy::client::{Client, Origin};
use crate::trace::span::{Span, export};
use crate::watch::Watch;

/// Spans that wait to be sent.
pub(super) const WAITING: usize = 8192;
/// So many are sent at once.
const TOGETHER: usize = 512;
/// Spans wait so long for others to go with.
const GATHER: Duration = Duration::from_secs(1);
/// A collector that takes longer is away.
const ANSWER: Duration = Duration::from_secs(5);
/// So much of an answer is read.
const LONGEST_ANSWER: usize = 64 << 10;
/// What is left at the end is sent within this time, or not at all.
const LAST: Duration = Duration::from_secs(1);

/// The way to a collector.
pub struct Exporter {
    pub client: Arc<Client>,
    /// `otlp_endpoint`
    pub endpoint: BaseUrl,
    /// `otlp_headers`
    pub headers: HeaderMap,
    pub service: &'static str,
    pub(super) dropped: SpansDropped,
    pub(super) spans: mpsc::Receiver<Span>,
}

impl Exporter {
    /// Sends what comes until `stopping`, and then what is left.
    pub async fn run(mut self, stopping: CancellationToken) {
        let mut away = false;
        loop {
            let mut batch = Vec::new();
            // Cancel-safe: what was received is in `batch`.
            let over = tokio::select! {
                () = stopping.cancelled() => true,
                received = self.gather(&mut batch) => !received,
            };
            if over {
                return self.finish(batch).await;
            }
            let patience = async {
                stopping.cancelled().await;
                tokio::time::sleep(LAST).await;
            };
            // What is being sent at the stop has as long as what is left. It may have arrived: it is not sent twice.
            let sent = tokio::select! {
                () = patience => return,
                sent = self.send(&batch) => sent,
            };
            away = self.note(sent, batch.len(), away);
        }
    }

    /// Fills `batch`; `false` when nothing will come any more.
    async fn gather(&mut self, batch: &mut Vec<Span>) -> bool {
        if self.spans.recv_many(batch, TOGETHER).await == 0 {
            return false;
        }
        let more = async {
            while batch.len() < TOGETHER {
                let room = TOGETHER - batch.len();
                if self.spans.recv_many(batch, room).await == 0 {
                    return;
                }
            }
        };
        // Running out of time is how a batch usually ends.
        let _ = tokio::time::timeout(GATHER, more).await;
        true
    }

    async fn finish(mut self, mut batch: Vec<Span>) {
        self.spans.close();
        let all = async {
            loop {
                self.spans.recv_many(&mut batch, TOGETHER).await;
                if batch.is_empty() || self.send(&batch).await.is_err() {
                    return;
                }
                batch.clear();
            }
        };
        let _ = tokio::time::timeout(LAST, all).await;
    }

    /// Says once when the collector goes away, and when it is back.
    fn note(&self, sent: anyhow::Result<u64>, spans: usize, was_away: bool) -> bool {
        self.dropped.refused(sent.as_ref().map_or(spans as u64, |refused| *refused));
        match sent {
            Ok(1..) if !was_away => tracing::debug!(?sent, "The collector refused some spans"),
            Ok(_) if was_away => tracing::info!("The collector of traces takes spans again"),
            Ok(_) => {}
            Err(error) if was_away => {
                tracing::debug!(error = format!("{error:#}"), spans, "Spans dropped");
                return true;
            }
            Err(error) => {
                let error = format!("{error:#}");
                tracing::warn!(
                    error,
                    spans,
                    "The collector of traces takes no spans: they are dropped"
                );
                return true;
            }
        }
        false
    }

    /// Sends `spans`; how many of them the collector has refused one by one.
    async fn send(&self, spans: &[Span]) -> anyhow::Result<u64> {
        let origin = Origin::new(self.endpoint.clone());
        let body = Bytes::from(export(self.service, spans));
        let mut request = Request::new(RequestBody::Full(Some(body)));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = origin.target(&http::Uri::from_static("/v1/traces"))?;
        let headers = request.headers_mut();
        headers.insert(HOST, origin.host.clone());
        headers.insert(USER_AGENT, USER_AGENT_VALUE);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.extend(self.headers.clone());
        let watch = Arc::new(Watch::new());
        let answered = async {
            let answer = self.client.send(&origin, request, &watch).await?;
            let status = answer.status();
            // Read to its end, so that the connection can be used again.
            let body = Limited::new(answer.into_body(), LONGEST_ANSWER).collect().await;
            anyhow::Ok((status, body.map_or(0, |body| rejected(&body.to_bytes()))))
        };
        match tokio::time::timeout(ANSWER, answered).await {
            Err(_) => bail!("it did not answer in time"),
            Ok(answered) => match answered? {
                (status, rejected) if status.is_success() => Ok(rejected.min(spans.len() as u64)),
                (status, _) => bail!("it answered {status}"),
            },
        }
    }
}

/// How many spans an answer says were rejected. JSON writes a number of 64 bits as text, or as a number.
fn rejected(answer: &[u8]) -> u64 {
    let answer: serde_json::Value = serde_json::from_slice(answer).unwrap_or_default();
    let spans = &answer["partialSuccess"]["rejectedSpans"];
    spans.as_u64().or_else(|| spans.as_str()?.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_collector_says_how_many_it_has_refused() {
        assert_eq!(rejected(br#"{"partialSuccess":{"rejectedSpans":"3"}}"#), 3);
        assert_eq!(rejected(br#"{"partialSuccess":{"rejectedSpans":2,"errorMessage":"x"}}"#), 2);
        for answer in ["", "{}", "[]", "ok", r#"{"partialSuccess":null}"#] {
            assert_eq!(rejected(answer.as_bytes()), 0, "{answer}");
        }
    }
}
