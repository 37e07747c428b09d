//! Exports spans to a collector by OTLP over HTTP with JSON. Spans that the collector does not accept are dropped: no
//! call waits for it, and memory is bounded.

use futures_util::future::BoxFuture;
use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST, USER_AGENT};
use http::{HeaderMap, HeaderValue, Method, Request};
use http_body_util::{BodyExt, Limited};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::metrics::traces::SpansDropped;
use crate::trace::span::{Span, export_request};
use gateway_base::base_url::BaseUrl;
use gateway_http::call_id::USER_AGENT_VALUE;
use gateway_http::client::body::RequestBody;
use gateway_http::client::{Client, Origin};
use gateway_http::deadlines::ExchangeDeadlines;

/// Maximum spans that wait for export.
pub(super) const QUEUE_CAPACITY: usize = 8192;
/// Maximum spans in one request.
const MAX_BATCH_SPANS: usize = 512;
/// Time to wait for more spans of a batch.
const BATCH_DELAY: Duration = Duration::from_secs(1);
/// Timeout of an export request.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum bytes of a response that are read.
const MAX_RESPONSE_BYTES: usize = 64 << 10;
/// Timeout for the remaining spans at shutdown.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// Exports the spans of a [`Tracer`](super::Tracer).
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
    /// Exports spans until `stopping`, then flushes the queue.
    pub fn run(mut self, stopping: CancellationToken) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            let mut failing = false;
            loop {
                let mut batch = Vec::new();
                // Cancel-safe: received spans are in `batch`.
                let ended = tokio::select! {
                    () = stopping.cancelled() => true,
                    received = self.collect_batch(&mut batch) => !received,
                };
                if ended {
                    return self.flush(batch).await;
                }
                let deadline = async {
                    stopping.cancelled().await;
                    tokio::time::sleep(FLUSH_TIMEOUT).await;
                };
                // At shutdown, a request in progress has the same timeout as the flush. It is not repeated, as it may have
                // been received.
                let sent = tokio::select! {
                    () = deadline => return,
                    sent = self.send(&batch) => sent,
                };
                failing = self.record_result(sent, batch.len(), failing);
            }
        })
    }

    /// Fills `batch`; returns `false` when the channel is closed.
    async fn collect_batch(&mut self, batch: &mut Vec<Span>) -> bool {
        if self.spans.recv_many(batch, MAX_BATCH_SPANS).await == 0 {
            return false;
        }
        let more = async {
            while batch.len() < MAX_BATCH_SPANS {
                let free = MAX_BATCH_SPANS - batch.len();
                if self.spans.recv_many(batch, free).await == 0 {
                    return;
                }
            }
        };
        // The timeout is the usual end of a batch.
        let _ = tokio::time::timeout(BATCH_DELAY, more).await;
        true
    }

    async fn flush(mut self, mut batch: Vec<Span>) {
        self.spans.close();
        let all = async {
            loop {
                self.spans.recv_many(&mut batch, MAX_BATCH_SPANS).await;
                if batch.is_empty() || self.send(&batch).await.is_err() {
                    return;
                }
                batch.clear();
            }
        };
        let _ = tokio::time::timeout(FLUSH_TIMEOUT, all).await;
    }

    /// Counts dropped spans, and logs once when the collector fails and when it recovers. Returns whether it fails.
    fn record_result(&self, sent: anyhow::Result<u64>, spans: usize, was_failing: bool) -> bool {
        self.dropped.export_failed(sent.as_ref().map_or(spans as u64, |rejected| *rejected));
        match sent {
            Ok(1..) if !was_failing => {
                tracing::debug!(?sent, "The trace collector rejected some spans")
            }
            Ok(_) if was_failing => tracing::info!("The trace collector accepts spans again"),
            Ok(_) => {}
            Err(error) if was_failing => {
                tracing::debug!(error = format!("{error:#}"), spans, "Spans dropped");
                return true;
            }
            Err(error) => {
                let error = format!("{error:#}");
                tracing::warn!(
                    error,
                    spans,
                    "The trace collector does not accept spans: they are dropped"
                );
                return true;
            }
        }
        false
    }

    /// Sends `spans`; returns how many of them the collector rejected.
    async fn send(&self, spans: &[Span]) -> anyhow::Result<u64> {
        let origin = Origin::new(self.endpoint.clone());
        let body = Bytes::from(export_request(self.service, spans));
        let mut request = Request::new(RequestBody::Full(Some(body)));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = origin.target(&http::Uri::from_static("/v1/traces"))?;
        let headers = request.headers_mut();
        headers.insert(HOST, origin.host.clone());
        headers.insert(USER_AGENT, USER_AGENT_VALUE);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.extend(self.headers.clone());
        let deadlines = Arc::new(ExchangeDeadlines::new());
        let exchange = async {
            let response = self.client.send(&origin, request, &deadlines).await?;
            let status = response.status();
            // Read to the end, so that the connection can be reused.
            let body = Limited::new(response.into_body(), MAX_RESPONSE_BYTES).collect().await;
            anyhow::Ok((status, body.map_or(0, |body| rejected_spans(&body.to_bytes()))))
        };
        match tokio::time::timeout(EXPORT_TIMEOUT, exchange).await {
            Err(_) => bail!("timeout"),
            Ok(exchange) => match exchange? {
                (status, rejected) if status.is_success() => Ok(rejected.min(spans.len() as u64)),
                (status, _) => bail!("status {status}"),
            },
        }
    }
}

/// Returns the number of rejected spans in a response. JSON encodes 64-bit integers as strings or as numbers.
fn rejected_spans(response: &[u8]) -> u64 {
    let response: serde_json::Value = serde_json::from_slice(response).unwrap_or_default();
    let spans = &response["partialSuccess"]["rejectedSpans"];
    spans.as_u64().or_else(|| spans.as_str()?.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_rejected_spans_is_parsed() {
        assert_eq!(rejected_spans(br#"{"partialSuccess":{"rejectedSpans":"3"}}"#), 3);
        assert_eq!(
            rejected_spans(br#"{"partialSuccess":{"rejectedSpans":2,"errorMessage":"x"}}"#),
            2
        );
        for response in ["", "{}", "[]", "ok", r#"{"partialSuccess":null}"#] {
            assert_eq!(rejected_spans(response.as_bytes()), 0, "{response}");
        }
    }
}
