//! One attempt to execute a queued call, with the same upstream handling and metrics as any other invocation.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use http::header::{HOST, RETRY_AFTER, USER_AGENT};
use http::{HeaderMap, HeaderValue, Method, Request, Response};
use http_body::Body;
use http_body_util::BodyExt;
use tokio::time::timeout_at as in_time;

use crate::retry::parse_retry_after;
use crate::retry_policies::RetryPolicyCache;
use gateway_http::client;
use gateway_http::client::body::RequestBody;
use gateway_http::client::exchange_outcome::ExchangeOutcome;
use gateway_http::client::headers::to_client;
use gateway_http::client::upstream_body::{ResponseBodyError, UpstreamBody};
use gateway_http::client::{Client, Origin};
use gateway_http::deadlines::Deadlines;
use gateway_proxy::activator::Activator;
use gateway_proxy::activator::unavailable::{Hop, MAX_SENDS, RetrySafety, UnavailableSignal};
use gateway_proxy::error::Error;
use gateway_proxy::metrics::calls::{self, Outcome, Shard};
use gateway_proxy::trace::context::Context;
use gateway_queue::MemoryPermit;
use gateway_queue::call::QueuedCall;
use gateway_queue::memory::{BodyBudget, BodyBuffer};
use gateway_queue::status::StoredResponse;

/// Maximum number of bytes of a response body in a callback.
pub const MAX_CALLBACK_BODY_BYTES: usize = 16 << 20;
/// Total time to wait for memory for a response body, at most half of the remaining time. After it the body is
/// truncated.
const BODY_MEMORY_TIMEOUT: Duration = Duration::from_secs(10);
const USER_AGENT_VALUE: HeaderValue =
    HeaderValue::from_static(concat!("gateway-worker/", env!("CARGO_PKG_VERSION")));

/// Invokes functions for the worker.
pub struct FunctionClient {
    pub client: Arc<Client>,
    /// Base URL of the functions.
    pub origin: Origin,
    pub calls: Arc<Shard>,
    /// Timeout from the first byte of the request to the last byte of the response.
    pub timeout: Duration,
    /// Cold-start handling, if it is enabled.
    pub activator: Option<Arc<Activator>>,
    /// Memory budget that responses share with all other bodies of queued calls.
    pub budget: BodyBudget,
}

/// The result of an attempt.
pub struct Attempt {
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

impl FunctionClient {
    /// Executes `call`, and keeps at most `response_limit` bytes of the response body; the rest is read and discarded.
    ///
    /// `context` is the parent span for the function, if there is one. `retry_policies` is asked for the maximum
    /// number of attempts if the request may have to be sent again.
    pub async fn execute(
        &self,
        call: &QueuedCall,
        response_limit: usize,
        context: Option<Context>,
        retry_policies: &RetryPolicyCache,
    ) -> Attempt {
        let started = Instant::now();
        let label = call.function.to_string();
        let Some(mut recorder) = self.calls.begin(&label, started) else {
            return Attempt::failed("the function's name is not valid".to_owned(), started);
        };
        let attempt = match self
            .exchange(call, &label, &mut recorder, response_limit, context, retry_policies)
            .await
        {
            Ok(attempt) => attempt,
            Err(error) => {
                recorder.set_status(error.status());
                // In all other cases the function was unreachable or aborted its response.
                let has_status = match &error {
                    Error::NoSuchFunction(_) => true,
                    Error::Upstream(error) => {
                        ExchangeOutcome::from_error(error) == ExchangeOutcome::UnexpectedUpgrade
                    }
                    _ => false,
                };
                let status = has_status.then(|| error.status().as_u16());
                Attempt { status, ..Attempt::failed(error.to_string(), started) }
            }
        };
        recorder.finish(Outcome::Complete, Instant::now());
        attempt
    }

    /// Waits until the function is ready (if cold starts are handled), sends the call, and sends it again if it did
    /// not reach the function.
    ///
    /// The retry policy decides how often a call is executed: one attempt sends it at most [`MAX_SENDS`] times, and
    /// never more often than the policy has attempts.
    async fn exchange(
        &self,
        call: &QueuedCall,
        label: &str,
        recorder: &mut calls::InFlightRecorder,
        response_limit: usize,
        context: Option<Context>,
        retry_policies: &RetryPolicyCache,
    ) -> Result<Attempt, Error> {
        let started = recorder.began;
        let mut sends = 0;
        let mut cold_start =
            self.activator.as_ref().map(|activator| activator.start_wait(&call.function));
        if let Some(cold_start) = &mut cold_start
            // A call with a single attempt must not use it up on a function that only seems ready.
            && (!recorder.is_warm() || call.options.max_attempts == Some(1))
        {
            cold_start.wait_ready(|| recorder.confirm(&self.calls)).await?;
        }
        loop {
            let request = self.request(call, label, context)?;
            let deadlines = Arc::new(Deadlines::new());
            let sent_at = Instant::now();
            let until = sent_at + self.timeout;
            deadlines.set_exchange_deadline(until);
            let sent = in_time(until.into(), self.client.send(&self.origin, request, &deadlines));
            let sent = sent.await.unwrap_or(Err(client::Error::Timeout));
            let outcome = match &sent {
                Ok(response) => ExchangeOutcome::from_head(response, false),
                Err(error) => ExchangeOutcome::from_error(error),
            };
            sends += u32::from(outcome != ExchangeOutcome::ConnectFailed);
            if let (Some(cold_start), Some(signal)) =
                (&mut cold_start, UnavailableSignal::from_outcome(outcome, Hop::Provider))
            {
                let retry_safety = match signal {
                    UnavailableSignal::ServiceUnavailable
                        if sends < max_sends(call, retry_policies).await =>
                    {
                        RetrySafety::IfNotDelivered
                    }
                    UnavailableSignal::ConnectFailed(_) => RetrySafety::IfNotDelivered,
                    UnavailableSignal::ServiceUnavailable | UnavailableSignal::BadGateway => {
                        RetrySafety::None
                    }
                };
                if cold_start.should_retry(signal, retry_safety, sent_at).await? {
                    continue;
                }
            }
            let response = sent?;
            if outcome == ExchangeOutcome::UnexpectedUpgrade {
                return Err(Error::Upstream(client::Error::UnexpectedUpgrade));
            }
            if recorder.is_unregistered() && outcome.confirms_existence() {
                recorder.confirm(&self.calls);
            }
            recorder.set_status(response.status());
            // Waiting for memory must leave time for the function's response.
            let memory_timeout =
                BODY_MEMORY_TIMEOUT.min(until.saturating_duration_since(Instant::now()) / 2);
            let buffer = BodyBuffer::new(&self.budget);
            let reading = read_response(response, response_limit, started, buffer, memory_timeout);
            let read = in_time(until.into(), reading).await;
            return read.unwrap_or(Err(Error::Upstream(client::Error::Timeout)));
        }
    }

    fn request(
        &self,
        call: &QueuedCall,
        label: &str,
        context: Option<Context>,
    ) -> Result<Request<RequestBody>, Error> {
        let body = Some(call.body.clone()).filter(|body| !body.is_empty());
        let mut request = Request::new(RequestBody::Full(body));
        *request.method_mut() = Method::POST;
        let target = format!("/function/{label}{}", call.target);
        let target = target.parse().map_err(|_| Error::NoSuchPath)?;
        *request.uri_mut() = self.origin.target(&target).map_err(client::Error::InvalidTarget)?;
        let mut headers = call.function_headers();
        headers.insert(HOST, self.origin.host.clone());
        headers.insert(USER_AGENT, USER_AGENT_VALUE);
        if let Some(context) = context {
            context.inject(&mut headers, Context::extract(&call.headers).is_some());
        }
        *request.headers_mut() = headers;
        Ok(request)
    }
}

/// Returns how often one attempt may send `call`.
async fn max_sends(call: &QueuedCall, retry_policies: &RetryPolicyCache) -> u32 {
    match call.options.max_attempts {
        Some(1) => 1,
        max_attempts => retry_policies.get(call).await.capped(max_attempts).attempts.min(MAX_SENDS),
    }
}

/// Reads a response. Keeps at most `response_limit` bytes of its body, and waits for memory for at most
/// `memory_timeout` in total.
async fn read_response(
    response: Response<UpstreamBody>,
    response_limit: usize,
    started: Instant,
    mut kept: BodyBuffer<'_>,
    memory_timeout: Duration,
) -> Result<Attempt, Error> {
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
    Ok(Attempt {
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

impl Attempt {
    fn failed(reason: String, started: Instant) -> Self {
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
