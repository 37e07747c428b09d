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

use crate::call_id::PRODUCT;
use crate::config::base_url::BaseUrl;
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
    fn note(&self, sent: anyhow::Result<()>, spans: usize, was_away: bool) -> bool {
        match sent {
            Ok(()) if was_away => tracing::info!("The collector of traces takes spans again"),
            Ok(()) => {}
            Err(error) if was_away => {
                tracing::debug!(%error, spans, "Spans dropped");
                return true;
            }
            Err(error) => {
                tracing::warn!(%error, spans, "The collector of traces takes no spans: they are dropped");
                return true;
            }
        }
        false
    }

    async fn send(&self, spans: &[Span]) -> anyhow::Result<()> {
        let origin = Origin::new(self.endpoint.clone());
        let body = Bytes::from(export(self.service, spans));
        let mut request = Request::new(RequestBody::Full(Some(body)));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = origin.target(&http::Uri::from_static("/v1/traces"))?;
        let headers = request.headers_mut();
        headers.insert(HOST, origin.host.clone());
        headers.insert(USER_AGENT, PRODUCT);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.extend(self.headers.clone());
        let watch = Arc::new(Watch::new());
        let answered = async {
            let answer = self.client.send(&origin, request, &watch).await?;
            let status = answer.status();
            // Read to its end, so that the connection can be used again.
            let _ = Limited::new(answer.into_body(), LONGEST_ANSWER).collect().await;
            anyhow::Ok(status)
        };
        match tokio::time::timeout(ANSWER, answered).await {
            Err(_) => bail!("it did not answer in time"),
            Ok(status) => match status? {
                status if status.is_success() => Ok(()),
                status => bail!("it answered {status}"),
            },
        }
    }
}
