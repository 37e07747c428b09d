//! The result of one attempt to execute a queued call, and the reading of its response.

use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use http::header::RETRY_AFTER;
use http::{HeaderMap, HeaderValue, Response};
use http_body::Body;
use http_body_util::BodyExt;

use crate::retry::parse_retry_after;
use gateway_http::client::upstream_body::{ResponseBodyError, UpstreamBody};
use gateway_http::headers::to_client;
use gateway_proxy::error::Error;
use gateway_queue::MemoryPermit;
use gateway_queue::memory::BodyBuffer;
use gateway_queue::status::StoredResponse;

/// The result of an attempt.
pub struct AttemptResult {
    /// Status of the response; `None` if the function was unreachable or aborted its response. A protocol switch that
    /// was not requested is a 502.
    pub status: Option<u16>,
    pub headers: HeaderMap,
    pub body: Bytes,
    /// The body's reservation in the memory budget.
    pub memory: Option<MemoryPermit>,
    /// The body was longer than the limit, or memory did not suffice.
    pub truncated: bool,
    pub duration: Duration,
    pub retry_after: Option<Duration>,
    /// Why there is no response.
    pub reason: Option<String>,
}

/// Reads a response. Keeps at most `response_limit` bytes of its body, and waits for memory for at most
/// `memory_timeout` in total.
pub(crate) async fn read_response(
    response: Response<UpstreamBody>,
    response_limit: usize,
    started: Instant,
    mut kept: BodyBuffer<'_>,
    memory_timeout: Duration,
) -> Result<AttemptResult, Error> {
    let (mut head, mut body) = response.into_parts();
    let (mut truncated, mut has_memory, mut deadline) = (false, true, None);
    if let Some(length) = body.size_hint().exact().and_then(|length| usize::try_from(length).ok())
        && length > 0
    {
        // Memory for the whole body is reserved in advance, so that of many concurrent responses some are read
        // completely first.
        let until = *deadline.insert(Instant::now() + memory_timeout);
        kept.reserve_expected(length.min(response_limit), until.into()).await;
    }
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|failure: ResponseBodyError| Error::ResponseBody(failure))?;
        let Ok(data) = frame.into_data() else { continue };
        let remaining = response_limit - kept.length();
        truncated |= data.len() > remaining;
        let data = &data[..data.len().min(remaining)];
        if !has_memory {
            truncated |= !data.is_empty();
            continue;
        }
        if !kept.try_add(data) {
            // The call has been executed, and is not executed again because its response is too large.
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + memory_timeout);
            has_memory = kept.add_before(data, deadline.into()).await;
            truncated |= !has_memory;
        }
    }
    let (kept, body_memory) = kept.finish();
    to_client(&mut head.headers, false);
    let retry_after = head.headers.get(RETRY_AFTER);
    let retry_after = retry_after.and_then(|value| parse_retry_after(value, SystemTime::now()));
    Ok(AttemptResult {
        status: Some(head.status.as_u16()),
        headers: head.headers,
        body: kept,
        memory: body_memory,
        truncated,
        duration: started.elapsed(),
        retry_after,
        reason: None,
    })
}

impl AttemptResult {
    pub(crate) fn failed(reason: String, started: Instant) -> Self {
        Self {
            status: None,
            headers: HeaderMap::new(),
            body: Bytes::new(),
            memory: None,
            truncated: false,
            duration: started.elapsed(),
            retry_after: None,
            reason: Some(reason),
        }
    }

    /// The result of a call that has expired before its execution.
    pub fn expired() -> Self {
        let reason = "it expired before it was executed".to_owned();
        Self { status: Some(504), ..Self::failed(reason, Instant::now()) }
    }

    /// The result of a call whose stored body is missing.
    pub fn body_missing() -> Self {
        Self { status: Some(500), ..Self::failed("its body is missing".to_owned(), Instant::now()) }
    }

    /// Returns the response to store, if there was one, with at most `max_attempts` bytes of its body.
    pub fn into_response(self, max_attempts: usize) -> Option<StoredResponse> {
        let status = self.status?;
        let text = |value: &HeaderValue| value.to_str().ok().map(str::to_owned);
        let headers = self.headers.iter();
        let headers = headers.filter_map(|(n, v)| Some((n.as_str().to_owned(), text(v)?)));
        Some(StoredResponse {
            status,
            headers: headers.collect(),
            truncated: self.truncated || self.body.len() > max_attempts,
            // A slice would keep the whole body in memory.
            body: match self.body.get(..max_attempts) {
                Some(start) => Bytes::copy_from_slice(start),
                None => self.body,
            },
        })
    }
}
