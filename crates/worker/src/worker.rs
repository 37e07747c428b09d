//! The worker: receives queued calls, executes them, decides about retries, sends callbacks, and settles.

use futures_util::future::BoxFuture;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;

use crate::attempt_result::AttemptResult;
use crate::callback::{CallbackPayload, CallbackSender};
use crate::function_client::{FunctionClient, MAX_CALLBACK_BODY_BYTES};
use crate::retry::{Decision, Outcome, decide};
use crate::retry_policies::RetryPolicies;
use crate::settlement_limit::SettlementLimiter;
use gateway_base::error_chain::ErrorChain;
use gateway_base::shutdown::ShutdownPhases;
use gateway_http::callback_chain;
use gateway_proxy::functions::policy::retry::RetryPolicy;
use gateway_proxy::trace::context::{Context, TRACEPARENT, TRACESTATE};
use gateway_proxy::trace::span::SpanKind;
use gateway_proxy::trace::{ActiveSpan, Tracer};
use gateway_queue::call::{QueuedCall, UnixMillis};
use gateway_queue::ingress::QueueIngress;
use gateway_queue::status::{CallState, Settlement, StoredResponse};
use gateway_queue::{Delivery, Error, JobQueue as _, MemoryPermit, memory, now};

/// Delay before a failed queue operation is retried.
const QUEUE_RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// Number of bytes of a body that are logged.
const MAX_LOGGED_BODY_BYTES: usize = 1024;
/// Maximum number of calls that await settlement, per execution slot.
const UNSETTLED_PER_SLOT: usize = 2;

/// Executes queued calls.
pub struct Worker {
    pub ingress: Arc<QueueIngress>,
    /// Maximum number of parallel executions. A call releases its slot before it is settled.
    pub concurrency: usize,
    pub function_client: Arc<FunctionClient>,
    pub retry_policies: Arc<RetryPolicies>,
    pub callbacks: CallbackSender,
    /// Maximum number of bytes of a response body that are stored.
    pub max_result_body_bytes: usize,
    pub logging: CallLogging,
    /// Creates a span for each attempt, if tracing is enabled.
    pub tracer: Option<Tracer>,
}

/// Details of each call that are logged in addition to failures.
#[derive(Clone, Copy, Debug, Default)]
pub struct CallLogging {
    /// The beginning of its body.
    pub bodies: bool,
    /// Its execution and outcome.
    pub calls: bool,
}

impl Worker {
    /// Executes calls until `phases.draining`, then waits for the running ones, or drops them unsettled at
    /// `phases.forced`.
    pub fn run(self: Arc<Self>, phases: &ShutdownPhases) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let slots = Arc::new(Semaphore::new(self.concurrency));
            let limiter = Arc::new(SettlementLimiter::new(
                self.concurrency.saturating_mul(UNSETTLED_PER_SLOT),
            ));
            let running = TaskTracker::new();
            // Cancel-safe: a permit or a call that was not returned here is released.
            while let Some(next) = tokio::select! {
                () = phases.draining.cancelled() => None,
                next = self.receive(&slots) => Some(next),
            } {
                let (slot_permit, delivery, body_memory) = next;
                let (worker, limiter) = (Arc::clone(&self), Arc::clone(&limiter));
                running.spawn(async move {
                    worker.process(delivery, slot_permit, body_memory, &limiter).await
                });
            }
            self.ingress.queue.stop_receiving();
            running.close();
            // Calls that are aborted here are dropped unsettled, so the queue delivers them again.
            tokio::select! {
                () = running.wait() => {}
                () = phases.forced.cancelled() => {
                    tracing::warn!(calls = running.len(), "Queued calls aborted at the end of shutdown_grace");
                }
            }
        })
    }

    /// Waits for an execution slot, a call, and memory for its body.
    async fn receive(
        &self,
        slots: &Arc<Semaphore>,
    ) -> (OwnedSemaphorePermit, Delivery, Option<MemoryPermit>) {
        loop {
            // The semaphore is never closed.
            let Ok(slot_permit) = Arc::clone(slots).acquire_owned().await else {
                std::future::pending().await
            };
            self.ingress.budget.wait_until_available().await;
            match self.ingress.queue.receive(self.concurrency).await {
                Ok(delivery) => {
                    let body_memory = self.ingress.budget.reserve(delivery.call.body.len()).await;
                    return (slot_permit, delivery, body_memory);
                }
                Err(error) => {
                    tracing::warn!(%error, "Queued calls cannot be received");
                    tokio::time::sleep(QUEUE_RETRY_INTERVAL).await;
                }
            }
        }
    }

    /// Processes one call: executes it, releases its slot, and settles it within the limit of `limiter`.
    async fn process(
        &self,
        mut delivery: Delivery,
        slot_permit: OwnedSemaphorePermit,
        body_memory: Option<MemoryPermit>,
        limiter: &SettlementLimiter,
    ) {
        let call = &delivery.call;
        match delivery.claim().await {
            Ok(true) => {}
            Ok(false) => return,
            // Dropped unsettled, so the queue delivers it again.
            Err(error) => {
                let (id, function) = (&call.id, &call.function);
                return tracing::warn!(call_id = id, %function, %error, "A queued call cannot be started");
            }
        }
        // Held until the response is stored.
        let mut response_memory: Option<MemoryPermit> = None;
        let mut settlement = if delivery.body_missing {
            let reason = Box::pin(self.skip(&delivery, &AttemptResult::body_missing())).await;
            Settlement::DeadLetter { status: None, reason, response: None }
        } else if call.options.expires_at.is_some_and(|at| at <= now()) {
            let reason = Box::pin(self.skip(&delivery, &AttemptResult::expired())).await;
            let (state, status) = (CallState::Failed, None);
            Settlement::Finished { state, status, reason, response: None, executed: false }
        } else {
            let span = self.start_span(&delivery);
            let context = span.as_ref().and_then(ActiveSpan::context);
            let mut attempt = self.attempt(call, context).await;
            if let Some(span) = span {
                end_span(span, &attempt);
            }
            response_memory = attempt.memory.take();
            self.settlement(&delivery, attempt, context).await
        };
        self.log_outcome(&delivery, &settlement);
        // The body is not needed any more, and settling may take long.
        delivery.call.body = Bytes::new();
        drop(body_memory);
        // The queue makes a copy of the stored part.
        memory::shrink_permit(&mut response_memory, 2 * settlement.response_length());
        let (id, function) = (&delivery.call.id, &delivery.call.function);
        let _settlement_permit = limiter.acquire(function).await;
        delivery.release_slot();
        drop(slot_permit);
        // A call that cannot be settled is not dropped: the queue would deliver it again, and it would be executed
        // again.
        while let Err(error) = delivery.settle(&settlement).await {
            tracing::warn!(call_id = id, %function, %error, "A queued call cannot be settled");
            if error == Error::Gone {
                return;
            }
            // The queue would reject it each time.
            if matches!(error, Error::TooLarge(_)) && settlement.has_response() {
                settlement = settlement.without_response();
                continue;
            }
            tokio::time::sleep(QUEUE_RETRY_INTERVAL).await;
        }
        match settlement {
            Settlement::Retry { .. } => self.ingress.metrics.retried(),
            Settlement::DeadLetter { .. } => self.ingress.metrics.dead_lettered(),
            Settlement::Finished { .. } => self.ingress.metrics.processed(),
        }
    }

    /// Executes the call. Meanwhile fetches its retry policy if it is not cached: if the call crashes the provider,
    /// the policy is not available afterwards.
    async fn attempt(&self, call: &QueuedCall, context: Option<Context>) -> AttemptResult {
        self.ingress.metrics.attempted();
        let prefetch = async {
            self.retry_policies.prefetch(&call.function).await;
            std::future::pending::<AttemptResult>().await
        };
        // A fetch that is cancelled here is repeated if the policy is needed.
        tokio::select! {
            attempt = self.function_client.execute(
                call, self.response_limit(call), context, &self.retry_policies
            ) => attempt,
            never = prefetch => never,
        }
    }

    fn start_span(&self, delivery: &Delivery) -> Option<ActiveSpan> {
        let call = &delivery.call;
        let mut span = self.tracer.as_ref()?.start_span(&call.id, &call.headers, "process")?;
        let waited = now().saturating_sub(call.options.submitted_at);
        span.set_attribute("gateway.call_id", call.id.as_str());
        span.set_attribute("faas.invoked_name", call.function.to_string().as_str());
        span.set_attribute("gateway.attempt", delivery.attempts + 1);
        span.set_attribute("gateway.queued_ms", i64::try_from(waited).unwrap_or(i64::MAX));
        Some(span)
    }

    fn log_outcome(&self, delivery: &Delivery, settlement: &Settlement) {
        let (id, function) = (&delivery.call.id, &delivery.call.function);
        let attempt = delivery.attempts + 1;
        let (state, status) = settlement.outcome();
        if self.logging.calls {
            tracing::info!(call_id = id, %function, attempt, ?state, status, "Queued call executed");
        } else {
            tracing::debug!(call_id = id, %function, attempt, ?state, status, "Queued call executed");
        }
        if self.logging.bodies {
            let body = &delivery.call.body;
            let body = String::from_utf8_lossy(&body[..body.len().min(MAX_LOGGED_BODY_BYTES)]);
            tracing::info!(call_id = id, %function, %body, "Body of a queued call");
        }
    }

    /// Returns how many bytes of the response are read: the maximum for a callback, if there is one, or for storage.
    fn response_limit(&self, call: &QueuedCall) -> usize {
        let callback_limit =
            if call.options.callback.is_some() { MAX_CALLBACK_BODY_BYTES } else { 0 };
        self.max_result_body_bytes.max(callback_limit)
    }

    async fn settlement(
        &self,
        delivery: &Delivery,
        attempt: AttemptResult,
        context: Option<Context>,
    ) -> Settlement {
        let call = &delivery.call;
        let attempts_made = delivery.attempts + 1;
        // A success without a callback needs no policy, and thus no request to the provider.
        let policy = match attempt.status {
            Some(..400) if call.options.callback.is_none() => RetryPolicy::default(),
            _ => Box::pin(self.retry_policies.get(call)).await,
        };
        let policy = policy.capped(call.options.max_attempts);
        let outcome = Outcome { status: attempt.status, retry_after: attempt.retry_after };
        let decision = decide(&policy, attempts_made, outcome, fastrand::f64());
        let (status, mut reason) = (attempt.status, attempt.reason.clone());
        if let Decision::RetryIn(delay) = decision {
            let at = now() + UnixMillis::try_from(delay.as_millis()).unwrap_or(UnixMillis::MAX / 2);
            return Settlement::Retry { at, status, reason };
        }
        if let Some(failure) =
            self.send_callback(call, &attempt, attempts_made, policy.attempts, context).await
        {
            reason = Some(failure);
        }
        let response = attempt.into_response(self.max_result_body_bytes);
        let finished = |state, response: Option<StoredResponse>| Settlement::Finished {
            state,
            status,
            reason: reason.clone(),
            response,
            executed: true,
        };
        match decision {
            Decision::Succeeded => finished(CallState::Succeeded, response),
            Decision::DeadLetter => Settlement::DeadLetter { status, reason, response },
            Decision::Failed | Decision::RetryIn(_) => finished(CallState::Failed, response),
        }
    }

    /// Returns why a call is not executed (the reason in `attempt`), after it has sent the callback.
    async fn skip(&self, delivery: &Delivery, attempt: &AttemptResult) -> Option<String> {
        let (call, attempts_made) = (&delivery.call, delivery.attempts);
        let reason = attempt.reason.clone();
        if call.options.callback.is_none() {
            return reason;
        }
        let max_attempts =
            self.retry_policies.get(call).await.capped(call.options.max_attempts).attempts;
        match self.send_callback(call, attempt, attempts_made, max_attempts, None).await {
            Some(failure) => reason.map(|reason| format!("{reason}; {failure}")),
            None => reason,
        }
    }

    /// Sends the callback, if one was requested. Returns the reason if it failed.
    async fn send_callback(
        &self,
        call: &QueuedCall,
        attempt: &AttemptResult,
        attempts: u32,
        max_attempts: u32,
        context: Option<Context>,
    ) -> Option<String> {
        let url = call.options.callback.as_ref()?;
        let span = self.tracer.as_ref().zip(context);
        let span =
            span.and_then(|(tracer, context)| tracer.child(context, SpanKind::Client, "callback"));
        let payload = CallbackPayload {
            call_id: call.id.clone(),
            function: call.function.to_string(),
            // 503 stands for an unreachable function.
            status: attempt.status.unwrap_or(503),
            headers: attempt.headers.clone(),
            body: attempt.body.clone(),
            truncated: attempt.truncated,
            duration: attempt.duration,
            attempts,
            max_attempts,
            callbacks: callback_chain::length(&call.headers),
            trace: callback_trace_headers(call, span.as_ref()),
        };
        let error = Box::pin(self.callbacks.send(url, &payload)).await.err();
        if let Some(span) = span {
            span.finish(error.as_ref().map(ToString::to_string));
        }
        let error = error?;
        tracing::warn!(call_id = call.id, function = %call.function, error = %ErrorChain(&error), "A callback failed");
        Some(format!("the callback failed: {error}"))
    }
}

fn end_span(mut span: ActiveSpan, attempt: &AttemptResult) {
    if let Some(status) = attempt.status {
        span.set_attribute("http.response.status_code", status);
    }
    let failed = attempt.status.is_some_and(|status| status >= 500);
    let reason = attempt.reason.clone();
    span.finish(reason.or_else(|| failed.then(|| "the function failed".to_owned())));
}

/// Returns the trace headers of a callback: those of the call, or of the callback's span if there is one.
fn callback_trace_headers(call: &QueuedCall, span: Option<&ActiveSpan>) -> HeaderMap {
    let of_call = [TRACEPARENT, TRACESTATE]
        .into_iter()
        .filter_map(|name| Some((call.headers.get(&name)?.clone(), name)));
    let mut headers: HeaderMap = of_call.map(|(value, name)| (name, value)).collect();
    if let Some(context) = span.and_then(ActiveSpan::context) {
        context.inject(&mut headers, Context::extract(&call.headers).is_some());
    }
    headers
}
