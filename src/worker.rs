//! Makes queued calls: takes them from the queue, calls their functions, decides what comes next, and says so.

pub mod attempt;
pub mod callback;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod notes;
pub mod policies;
pub mod retry;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;

use crate::chain;
use crate::error::ErrorChain;
use crate::queue::call::{QueuedCall, UnixMillis};
use crate::queue::status::{CallState, Settlement, StoredResponse};
use crate::queue::{Delivery, Error, MemoryPermit, memory, now};
use crate::queued::Intake;
use crate::shutdown::Stages;
use crate::trace::context::{Context, TRACEPARENT, TRACESTATE};
use crate::trace::span::SpanKind;
use crate::trace::{ActiveSpan, Tracer};
use crate::worker::attempt::{Attempt, Caller};
use crate::worker::callback::{Callbacks, Report, random};
use crate::worker::notes::Notes;
use crate::worker::policies::Policies;
use crate::worker::retry::{Decision, Outcome, decide};

/// How long to wait before a queue that failed is asked again.
const PAUSE: Duration = Duration::from_secs(1);
/// So much of a body is logged.
const PRINTED: usize = 1024;
/// What has become of so many calls is being noted at a time, at most, for each place where one is made.
const UNNOTED: usize = 2;

/// What makes queued calls.
pub struct Worker {
    pub intake: Arc<Intake>,
    /// Calls made at a time. What becomes of a call is noted when it has left its place.
    pub places: usize,
    pub caller: Arc<Caller>,
    pub policies: Arc<Policies>,
    pub callbacks: Callbacks,
    /// So much of an answer's body is kept.
    pub max_result_body_bytes: usize,
    pub prints: Prints,
    /// Tells of each attempt, if somebody wants to know.
    pub tracer: Option<Tracer>,
}

/// What of each call is logged beside its failures.
#[derive(Clone, Copy, Debug, Default)]
pub struct Prints {
    /// The start of its body.
    pub bodies: bool,
    /// That it was made, and what came of it.
    pub calls: bool,
}

impl Worker {
    /// Makes calls until `stages.closing`, then finishes those that run, or gives them back at `stages.cut`.
    pub async fn run(self: Arc<Self>, stages: &Stages) {
        let places = Arc::new(Semaphore::new(self.places));
        let notes = Arc::new(Notes::new(self.places.saturating_mul(UNNOTED)));
        let running = TaskTracker::new();
        // Cancel-safe: a place or a call that was not received goes back.
        while let Some(next) = tokio::select! {
            () = stages.closing.cancelled() => None,
            next = self.next(&places) => Some(next),
        } {
            let (place, delivery, room) = next;
            let (worker, notes) = (Arc::clone(&self), Arc::clone(&notes));
            running.spawn(async move { worker.carry_out(delivery, place, room, &notes).await });
        }
        self.intake.queue.stop_receiving();
        running.close();
        // What is cut here is dropped unsettled: it is made again, by whoever takes it next.
        tokio::select! {
            () = running.wait() => {}
            () = stages.cut.cancelled() => {
                tracing::warn!(calls = running.len(), "Queued calls cut at the end of shutdown_grace");
            }
        }
    }

    /// A place, a call for it, and room for its body in memory.
    async fn next(
        &self,
        places: &Arc<Semaphore>,
    ) -> (OwnedSemaphorePermit, Delivery, Option<MemoryPermit>) {
        loop {
            // The semaphore is never closed.
            let Ok(place) = Arc::clone(places).acquire_owned().await else {
                std::future::pending().await
            };
            self.intake.budget.wait_until_available().await;
            match self.intake.queue.receive(self.places).await {
                Ok(delivery) => {
                    let room = self.intake.budget.reserve(delivery.call.body.len()).await;
                    return (place, delivery, room);
                }
                Err(error) => {
                    tracing::warn!(%error, "No queued calls can be taken");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    /// Makes a call in its place, and notes what becomes of it beside those for which there is room in `notes`.
    async fn carry_out(
        &self,
        mut delivery: Delivery,
        place: OwnedSemaphorePermit,
        room: Option<MemoryPermit>,
        notes: &Notes,
    ) {
        let call = &delivery.call;
        match self.intake.queue.claim(&delivery).await {
            Ok(true) => {}
            Ok(false) => return,
            // It is dropped unsettled, and so taken again.
            Err(error) => {
                let (id, function) = (&call.id, &call.function);
                return tracing::warn!(call_id = id, %function, %error, "A queued call cannot be begun");
            }
        }
        // Held until the response is stored.
        let mut response_room: Option<MemoryPermit> = None;
        let mut settlement = if delivery.body_missing {
            let reason = Box::pin(self.not_made(&delivery, &Attempt::lost())).await;
            Settlement::DeadLetter { status: None, reason, response: None }
        } else if call.options.expires_at.is_some_and(|at| at <= now()) {
            let reason = Box::pin(self.not_made(&delivery, &Attempt::expired())).await;
            let (state, status) = (CallState::Failed, None);
            Settlement::Finished { state, status, reason, response: None, executed: false }
        } else {
            let span = self.begin_span(&delivery);
            let context = span.as_ref().and_then(ActiveSpan::context);
            let mut attempt = self.attempt(call, context).await;
            if let Some(span) = span {
                end_span(span, &attempt);
            }
            response_room = attempt.room.take();
            self.settlement(&delivery, attempt, context).await
        };
        self.print(&delivery, &settlement);
        // It is not made any more, and may have to wait for the queue.
        delivery.call.body = Bytes::new();
        drop(room);
        // The queue stores a copy of what is kept.
        memory::shrink_permit(&mut response_room, 2 * settlement.response_length());
        let (id, function) = (&delivery.call.id, &delivery.call.function);
        let _noting = notes.room(function).await;
        self.intake.queue.release_slot(&delivery);
        drop(place);
        // One that cannot be settled must not be made again at once: the queue would be asked until it can.
        while let Err(error) = self.intake.queue.settle(&delivery, &settlement).await {
            tracing::warn!(call_id = id, %function, %error, "A queued call cannot be settled");
            if error == Error::Gone {
                return;
            }
            // It would never be taken as it is.
            if matches!(error, Error::TooLarge(_)) && settlement.has_response() {
                settlement = settlement.without_response();
                continue;
            }
            tokio::time::sleep(PAUSE).await;
        }
        match settlement {
            Settlement::Retry { .. } => self.intake.metrics.retried(),
            Settlement::DeadLetter { .. } => self.intake.metrics.dead_lettered(),
            Settlement::Finished { .. } => self.intake.metrics.processed(),
        }
    }

    /// Makes the call. How it is to be retried is asked meanwhile, if that was never heard: if it takes the provider
    /// down with it, nobody says.
    async fn attempt(&self, call: &QueuedCall, context: Option<Context>) -> Attempt {
        self.intake.metrics.attempted();
        let learn = async {
            self.policies.learn(&call.function).await;
            std::future::pending::<Attempt>().await
        };
        // What was not heard when the call is over is asked again if it is needed.
        tokio::select! {
            attempt = self.caller.make(call, self.keeps(call), context, &self.policies) => attempt,
            never = learn => never,
        }
    }

    fn begin_span(&self, delivery: &Delivery) -> Option<ActiveSpan> {
        let call = &delivery.call;
        let mut span = self.tracer.as_ref()?.start_span(&call.id, &call.headers, "process")?;
        let waited = now().saturating_sub(call.options.submitted_at);
        span.set_attribute("gateway.call_id", call.id.as_str());
        span.set_attribute("faas.invoked_name", call.function.to_string().as_str());
        span.set_attribute("gateway.attempt", delivery.attempts + 1);
        span.set_attribute("gateway.queued_ms", i64::try_from(waited).unwrap_or(i64::MAX));
        Some(span)
    }

    fn print(&self, delivery: &Delivery, settlement: &Settlement) {
        let (id, function) = (&delivery.call.id, &delivery.call.function);
        let attempt = delivery.attempts + 1;
        let (state, status) = settlement.outcome();
        if self.prints.calls {
            tracing::info!(call_id = id, %function, attempt, ?state, status, "Queued call made");
        } else {
            tracing::debug!(call_id = id, %function, attempt, ?state, status, "Queued call made");
        }
        if self.prints.bodies {
            let body = &delivery.call.body;
            let body = String::from_utf8_lossy(&body[..body.len().min(PRINTED)]);
            tracing::info!(call_id = id, %function, %body, "Body of a queued call");
        }
    }

    /// So much of an answer is read: all that a callback can be told, or what is kept.
    fn keeps(&self, call: &QueuedCall) -> usize {
        let told = if call.options.callback.is_some() { attempt::MAX_TOLD } else { 0 };
        self.max_result_body_bytes.max(told)
    }

    async fn settlement(
        &self,
        delivery: &Delivery,
        attempt: Attempt,
        context: Option<Context>,
    ) -> Settlement {
        let call = &delivery.call;
        let made = delivery.attempts + 1;
        // A success that nobody is told of needs no policy, and so no question to the provider.
        let policy = match attempt.status {
            Some(..400) if call.options.callback.is_none() => retry::Policy::default(),
            _ => Box::pin(self.policies.of(call)).await,
        };
        let policy = policy.at_most(call.options.max_attempts);
        let outcome = Outcome { status: attempt.status, retry_after: attempt.retry_after };
        let decision = decide(&policy, made, outcome, random());
        let (status, mut reason) = (attempt.status, attempt.reason.clone());
        if let Decision::RetryIn(pause) = decision {
            let at = now() + UnixMillis::try_from(pause.as_millis()).unwrap_or(UnixMillis::MAX / 2);
            return Settlement::Retry { at, status, reason };
        }
        if let Some(failure) = self.tell(call, &attempt, made, policy.attempts, context).await {
            reason = Some(failure);
        }
        let answer = attempt.into_answer(self.max_result_body_bytes);
        let over = |state, answer: Option<StoredResponse>| Settlement::Finished {
            state,
            status,
            reason: reason.clone(),
            response: answer,
            executed: true,
        };
        match decision {
            Decision::Succeeded => over(CallState::Succeeded, answer),
            Decision::Bury => Settlement::DeadLetter { status, reason, response: answer },
            Decision::Failed | Decision::RetryIn(_) => over(CallState::Failed, answer),
        }
    }

    /// Why a call is not made, as `attempt` says; whoever wants to be called back is told.
    async fn not_made(&self, delivery: &Delivery, attempt: &Attempt) -> Option<String> {
        let (call, made) = (&delivery.call, delivery.attempts);
        let reason = attempt.reason.clone();
        if call.options.callback.is_none() {
            return reason;
        }
        let most = self.policies.of(call).await.at_most(call.options.max_attempts).attempts;
        match self.tell(call, attempt, made, most, None).await {
            Some(failure) => reason.map(|reason| format!("{reason}; {failure}")),
            None => reason,
        }
    }

    /// Calls back whoever asked for it; why that failed, if it did.
    async fn tell(
        &self,
        call: &QueuedCall,
        attempt: &Attempt,
        attempts: u32,
        max_attempts: u32,
        context: Option<Context>,
    ) -> Option<String> {
        let url = call.options.callback.as_ref()?;
        let span = self.tracer.as_ref().zip(context);
        let span = span.and_then(|(it, context)| it.child(context, SpanKind::Client, "callback"));
        let report = Report {
            call_id: call.id.clone(),
            function: call.function.to_string(),
            // Out of reach.
            status: attempt.status.unwrap_or(503),
            headers: attempt.headers.clone(),
            body: attempt.body.clone(),
            truncated: attempt.truncated,
            took: attempt.took,
            attempts,
            max_attempts,
            callbacks: chain::length(&call.headers),
            trace: trace_of(call, span.as_ref()),
        };
        let error = Box::pin(self.callbacks.send(url, &report)).await.err();
        if let Some(span) = span {
            span.finish(error.as_ref().map(ToString::to_string));
        }
        let error = error?;
        tracing::warn!(call_id = call.id, function = %call.function, error = %ErrorChain(&error), "A callback failed");
        Some(format!("the callback failed: {error}"))
    }
}

fn end_span(mut span: ActiveSpan, attempt: &Attempt) {
    if let Some(status) = attempt.status {
        span.set_attribute("http.response.status_code", status);
    }
    let failed = attempt.status.is_some_and(|status| status >= 500);
    let reason = attempt.reason.clone();
    span.finish(reason.or_else(|| failed.then(|| "the function failed".to_owned())));
}

/// What the receiver of a callback is told of the trace that its call belongs to.
fn trace_of(call: &QueuedCall, span: Option<&ActiveSpan>) -> HeaderMap {
    let of_call = [TRACEPARENT, TRACESTATE]
        .into_iter()
        .filter_map(|name| Some((call.headers.get(&name)?.clone(), name)));
    let mut headers: HeaderMap = of_call.map(|(value, name)| (name, value)).collect();
    if let Some(context) = span.and_then(ActiveSpan::context) {
        context.inject(&mut headers, Context::extract(&call.headers).is_some());
    }
    headers
}
