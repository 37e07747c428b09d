//! Executes a queued call: one attempt, dispatched like any other invocation.

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::header::{HOST, USER_AGENT};
use http::{HeaderValue, Method, Request};
use tokio::sync::SemaphorePermit;
use tokio::time::timeout_at;

use crate::attempt_result::{AttemptResult, read_response};
use crate::retry_policies::RetryPolicies;
use gateway_http::client::body::RequestBody;
use gateway_http::client::exchange_outcome::ExchangeOutcome;
use gateway_http::client::{self, Client, Origin, UpstreamResponse};
use gateway_http::deadlines::ExchangeDeadlines;
use gateway_http::names::FUNCTION_PREFIX;
use gateway_proxy::activator::Activator;
use gateway_proxy::activator::unavailable::{Hop, MAX_SENDS, RetrySafety, UnavailableSignal};
use gateway_proxy::error::Error;
use gateway_proxy::invoke::dispatcher::{
    Dispatcher, InvocationRequest, SendResult, UpstreamTarget, classify,
};
use gateway_proxy::metrics::calls::{InFlightRecorder, Outcome};
use gateway_proxy::trace::context::Context;
use gateway_queue::call::QueuedCall;
use gateway_queue::memory::{BodyBudget, BodyBuffer};

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
    pub dispatcher: Dispatcher,
    /// Timeout from the first byte of the request to the last byte of the response.
    pub timeout: Duration,
    /// Memory budget that responses share with all other bodies of queued calls.
    pub budget: BodyBudget,
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
        retry_policies: &RetryPolicies,
    ) -> AttemptResult {
        let started = Instant::now();
        let label = call.function.to_string();
        let Some(mut recorder) = self.dispatcher.shard.begin(&label, started) else {
            let reason = "the function's name is not valid".to_owned();
            return AttemptResult::failed(reason, started);
        };
        let request = QueuedRequest {
            function_client: self,
            call,
            label: &label,
            context,
            retry_policies,
            sends: 0,
            deadline: started,
        };
        let exchange = self.exchange(request, &mut recorder, response_limit);
        let result = exchange.await.unwrap_or_else(|error| {
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
            AttemptResult { status, ..AttemptResult::failed(error.to_string(), started) }
        });
        recorder.finish(Outcome::Complete, Instant::now());
        result
    }

    async fn exchange(
        &self,
        mut request: QueuedRequest<'_>,
        recorder: &mut InFlightRecorder,
        response_limit: usize,
    ) -> Result<AttemptResult, Error> {
        let started = recorder.began;
        // A call with a single attempt must not use it up on a function that only seems ready.
        let is_single = request.call.options.max_attempts == Some(1);
        let target = UpstreamTarget { origin: &self.origin, hop: Hop::Provider };
        let sent = self.dispatcher.dispatch(recorder, target, &mut request, is_single).await?;
        recorder.set_status(sent.response.status());
        // Waiting for memory must leave time for the function's response.
        let remaining = request.deadline.saturating_duration_since(Instant::now());
        let memory_timeout = BODY_MEMORY_TIMEOUT.min(remaining / 2);
        let buffer = BodyBuffer::new(&self.budget);
        let reading = read_response(sent.response, response_limit, started, buffer, memory_timeout);
        let read = timeout_at(request.deadline.into(), reading).await;
        read.unwrap_or(Err(Error::Upstream(client::Error::Timeout)))
    }
}

/// A queued call as a request, which can be built any number of times.
struct QueuedRequest<'a> {
    function_client: &'a FunctionClient,
    call: &'a QueuedCall,
    /// The function's name in the path.
    label: &'a str,
    context: Option<Context>,
    retry_policies: &'a RetryPolicies,
    /// Number of requests that the function may have received.
    sends: u32,
    /// End of the last exchange.
    deadline: Instant,
}

impl InvocationRequest for QueuedRequest<'_> {
    async fn send(&mut self, origin: &Origin) -> SendResult {
        let request = self.build()?;
        self.deadline = Instant::now() + self.function_client.timeout;
        let deadlines = Arc::new(ExchangeDeadlines::new());
        deadlines.set_deadline(self.deadline);
        let sending = self.function_client.client.send(origin, request, &deadlines);
        let sent = timeout_at(self.deadline.into(), sending).await;
        let result = sent.unwrap_or(Err(client::Error::Timeout)).and_then(|response| {
            match ExchangeOutcome::from_head(&response, false) {
                ExchangeOutcome::UnexpectedUpgrade => Err(client::Error::UnexpectedUpgrade),
                outcome => Ok(UpstreamResponse { response, outcome, tunnel: None }),
            }
        });
        self.sends += u32::from(classify(&result) != ExchangeOutcome::ConnectFailed);
        result
    }

    async fn retry_safety(&mut self, signal: UnavailableSignal, _: bool) -> RetrySafety {
        match signal {
            UnavailableSignal::ServiceUnavailable if self.sends < self.max_sends().await => {
                RetrySafety::IfNotDelivered
            }
            UnavailableSignal::ConnectFailed(_) => RetrySafety::IfNotDelivered,
            UnavailableSignal::ServiceUnavailable | UnavailableSignal::BadGateway => {
                RetrySafety::None
            }
        }
    }

    async fn wait<T: Send>(
        &mut self,
        ready: impl Future<Output = Result<T, Error>> + Send,
    ) -> Result<T, Error> {
        ready.await
    }

    fn keep_for_retry<'a>(&mut self, _: &'a Activator) -> Option<SemaphorePermit<'a>> {
        // The queue's memory budget includes the body.
        None
    }

    fn recover(&mut self, _: &mut UpstreamResponse) -> bool {
        true
    }
}

impl QueuedRequest<'_> {
    fn build(&self) -> Result<Request<RequestBody>, client::Error> {
        let (call, origin) = (self.call, &self.function_client.origin);
        let body = Some(call.body.clone()).filter(|body| !body.is_empty());
        let mut request = Request::new(RequestBody::Full(body));
        *request.method_mut() = Method::POST;
        let target = format!("{FUNCTION_PREFIX}{}{}", self.label, call.target);
        let target = target.parse().map_err(http::Error::from);
        let target = target.map_err(client::Error::InvalidTarget)?;
        *request.uri_mut() = origin.target(&target).map_err(client::Error::InvalidTarget)?;
        let mut headers = call.function_headers();
        headers.insert(HOST, origin.host.clone());
        headers.insert(USER_AGENT, USER_AGENT_VALUE);
        if let Some(context) = self.context {
            context.inject(&mut headers, Context::extract(&call.headers).is_some());
        }
        *request.headers_mut() = headers;
        Ok(request)
    }

    /// Returns how often one attempt may send the call: at most [`MAX_SENDS`] times, and never more often than the retry
    /// policy has attempts.
    async fn max_sends(&self) -> u32 {
        match self.call.options.max_attempts {
            Some(1) => 1,
            max_attempts => {
                let policy = self.retry_policies.get(self.call).await.capped(max_attempts);
                policy.attempts.min(MAX_SENDS)
            }
        }
    }
}
