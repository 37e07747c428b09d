//! `/async-function/…`: calls that are made later, what became of them, and their answers.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use axum::Json;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::StreamExt;
use http::header::{ACCESS_CONTROL_REQUEST_METHOD, ALLOW, CONTENT_LENGTH, HOST, ORIGIN};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};

use crate::auth::body_error;
use crate::call_id::{RequestIds, X_CALL_ID};
use crate::error::Error;
use crate::function::Function;
use crate::metrics::queue::{DepthGauges, QueueMetrics};
use crate::metrics::registry::FunctionRegistry;
use crate::provider::Provider;
use crate::proxy::headers::to_upstream;
use crate::queue::call::QueuedCall;
use crate::queue::memory::{BodyBudget, BodyBuffer, MAX_TOTAL_BYTES};
use crate::queue::status::CallRecord;
use crate::queue::{self, ChangeOutcome, MemoryPermit, Queue, QueueDepth, now};
use crate::queued::unverified::Unverified;
use crate::queued::wishes::{X_DELAY_SECONDS, X_EXPIRES_SECONDS, X_MAX_ATTEMPTS, options, text};
use crate::serve::caller::Caller;
use crate::system::ApiState;
use crate::trace::PublishTiming;
use crate::{auth, chain, same_origin};

pub mod operate;
mod unverified;
pub mod view;
pub(crate) mod wishes;

/// A provider that has not said within this time whether there is a function is away.
const LONGEST_QUESTION: Duration = Duration::from_secs(2);

/// What takes calls in. One for the process, and a clone for each thread that has much to do with it.
#[derive(Clone)]
pub struct Intake {
    pub queue: Queue,
    pub max_body: usize,
    pub metrics: Arc<QueueMetrics>,
    /// What waits for the queue, and what a worker holds, must not fill the memory.
    pub budget: BodyBudget,
    /// What could be made now or is being made, as it was counted last.
    held: Arc<ArcSwapOption<HashMap<Arc<str>, u64>>>,
    unverified: Arc<Unverified>,
}

impl Intake {
    pub fn new(queue: Queue, max_body: usize, metrics: QueueMetrics) -> Arc<Self> {
        let (budget, metrics) = (BodyBudget::default(), Arc::new(metrics));
        let (held, unverified) = (Arc::default(), Arc::default());
        Arc::new(Self { queue, max_body, metrics, budget, held, unverified })
    }

    /// This one, for the current thread and its runtime.
    #[must_use]
    pub fn for_thread(&self) -> Arc<Self> {
        Arc::new(Self { queue: self.queue.for_thread(), ..self.clone() })
    }

    /// Counts what the queue holds.
    pub async fn count(&self) -> Result<(), queue::Error> {
        let now = now();
        let counts = match self.queue.depths().await {
            // One that cannot tell holds nothing, for all that is known.
            Err(queue::Error::Unsupported(_)) => Vec::new(),
            counts => counts?,
        };
        let held = counts.iter().filter(|(_, counts)| counts.pending + counts.running > 0);
        let held = held.map(|(function, counts)| {
            (function.to_string().into(), counts.pending + counts.running)
        });
        self.held.store(Some(Arc::new(held.collect())));
        let gauges = |(function, counts): (Function, QueueDepth)| DepthGauges {
            label: function.to_string(),
            pending: counts.pending,
            running: counts.running,
            delayed: counts.delayed,
            dead_letters: counts.dead_letters,
            oldest_age: Duration::from_millis(counts.oldest.map_or(0, |at| now.saturating_sub(at))),
        };
        self.metrics.set_depths(counts.into_iter().map(gauges).collect());
        Ok(())
    }

    /// Calls by function that run or could be made, as they were counted last; `None`: they were not yet.
    pub fn held(&self) -> Option<Arc<HashMap<Arc<str>, u64>>> {
        self.held.load_full()
    }

    /// The largest body that is taken in.
    pub fn limit(&self) -> usize {
        self.queue.max_body_bytes().map_or(self.max_body, |most| most.min(self.max_body))
    }

    /// Reads `body` whole. It has its room until that is dropped.
    async fn read(&self, body: Body) -> Result<(Bytes, Option<MemoryPermit>), Error> {
        let limit = self.limit();
        let mut kept = BodyBuffer::new(&self.budget);
        let mut frames = body.into_data_stream();
        while let Some(data) = frames.next().await {
            let data = data.map_err(|error| body_error(&error, limit))?;
            if data.len() > limit - kept.length() {
                return Err(Error::TooLarge(limit));
            }
            if !kept.try_add(&data) {
                return Err(Error::Overloaded);
            }
        }
        let (body, mut room) = kept.finish();
        // The queue stores a copy. A body that takes half of the budget has no more room than it has.
        let copy = body.len().min(MAX_TOTAL_BYTES - body.len());
        let copy = self.budget.try_reserve(copy).ok_or(Error::Overloaded)?;
        match &mut room {
            Some(room) => room.merge(copy),
            None => room = Some(copy),
        }
        Ok((body, room))
    }
}

/// The route that a request to queue a call belongs to, as its numbers are labelled; `None` if it is none.
pub fn route(method: &Method, path: &str) -> Option<&'static str> {
    let rest = path.strip_prefix("/async-function/").filter(|_| method == Method::POST)?;
    match rest.split_once('/') {
        None if rest.is_empty() => None,
        None => Some("/async-function/{name}"),
        Some(("", _)) => None,
        Some((_, "")) => Some("/async-function/{name}/"),
        Some(_) => Some("/async-function/{name}/{*rest}"),
    }
}

/// `POST /async-function/NAME…`: 202 when the call is durable.
pub async fn submit(api: &ApiState, caller: &Caller, mut request: Request) -> Response {
    let from_page = is_from_page(&request);
    let chosen_id = request.headers().get(X_CALL_ID).is_some_and(|id| !id.is_empty());
    if let (Ok(intake), false) = (intake(api), chosen_id)
        && let Ok((function, _)) = destination(request.uri(), &api.default_namespace)
        && let Ok(id) = HeaderValue::try_from(intake.queue.new_call_id(&function))
    {
        request.headers_mut().insert(X_CALL_ID, id);
    }
    let ids = RequestIds::from_headers(request.headers());
    let mut answer = match take_in(api, caller, request, &ids, chosen_id).await {
        Ok((published, took)) => {
            let mut answer = StatusCode::ACCEPTED.into_response();
            if !published.duplicate {
                answer.extensions_mut().insert(PublishTiming(took));
            }
            ids.apply_to_response(answer.headers_mut());
            // One that was queued before is known by its first id; one whose id is another call's, by one of its own.
            if let Ok(id) = HeaderValue::try_from(published.id) {
                answer.headers_mut().insert(X_CALL_ID, id);
            }
            answer
        }
        Err(error) => {
            let mut answer = error.response(Some(&ids.call_id)).map(Body::from);
            ids.apply_to_response(answer.headers_mut());
            answer
        }
    };
    if from_page {
        let_pages_read(&mut answer);
    }
    answer
}

/// Takes a call in, and says how long the queue took for that.
async fn take_in(
    api: &ApiState,
    caller: &Caller,
    request: Request,
    ids: &RequestIds,
    chosen_id: bool,
) -> Result<(queue::Published, Duration), Error> {
    let intake = intake(api)?;
    let (parts, body) = request.into_parts();
    same_origin::check_async_request(&parts.headers, api.allowed_hosts)
        .map_err(Error::Forbidden)?;
    if chain::length(&parts.headers) > chain::MAX {
        return Err(Error::CallbackLoop);
    }
    let (function, target) = destination(&parts.uri, &api.default_namespace)?;
    let mut options = options(&parts.headers, chosen_id, now())?;
    if let Some(key) = &mut options.idempotency_key {
        // One function's keys are none of another's. And a key can be guessed, as a chosen id can.
        *key = format!("{function} {key}");
        options.chosen_id = true;
    }
    let id = text(&ids.call_id, &X_CALL_ID)?;
    let length = parts.headers.get(CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    let limit = intake.limit();
    if length.is_some_and(|length| length > limit) {
        return Err(Error::TooLarge(limit));
    }
    must_exist(&api.metrics.function_registry, &api.provider, intake, &function, &id).await?;
    let (body, room) = intake.read(body).await?;
    let headers = passed_on(&parts.headers, &caller.forwarded_for, ids);
    let mut call = QueuedCall { id, function, target, headers, body, options };
    call.options.digest = Some(call.digest());
    let began = Instant::now();
    let published = intake.queue.publish_with_permit(call, room).await?;
    let took = began.elapsed();
    if !published.duplicate {
        intake.metrics.submitted(took);
    }
    Ok((published, took))
}

/// The headers that the function will see. The worker says where it goes; what the caller called is told as for any call.
pub fn passed_on(headers: &HeaderMap, peer: &HeaderValue, ids: &RequestIds) -> HeaderMap {
    const NOT_PASSED_ON: [HeaderName; 5] =
        [HOST, CONTENT_LENGTH, X_DELAY_SECONDS, X_MAX_ATTEMPTS, X_EXPIRES_SECONDS];
    let mut kept = HeaderMap::with_capacity(headers.len() + 4);
    let put = |name: &HeaderName, value: &HeaderValue| {
        if !NOT_PASSED_ON.contains(name) {
            kept.append(name, value.clone());
        }
    };
    to_upstream(headers, &HeaderValue::from_static("queued"), peer, Some(ids), put);
    kept
}

/// `GET /async-function/CALL-ID`
pub async fn status(
    State(api): State<Arc<ApiState>>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, Error> {
    Ok(match known(&api, &id, request).await? {
        Ok(status) => Json(view::State::of(&status)).into_response(),
        Err(refusal) => refusal,
    })
}

/// `GET /async-function/CALL-ID/result`
pub async fn result(
    State(api): State<Arc<ApiState>>,
    Path((id, rest)): Path<(String, String)>,
    request: Request,
) -> Result<Response, Error> {
    if rest != "result" {
        return Err(Error::NoSuchPath);
    }
    let status = match known(&api, &id, request).await? {
        Ok(status) => status,
        Err(refusal) => return Ok(refusal),
    };
    if !status.state.is_final() {
        return Err(Error::Conflict("the call is not finished".to_owned()));
    }
    let answer = intake(&api)?.queue.result(&id).await?;
    let answer = answer.ok_or(Error::NotFound("the call has no answer"))?;
    Ok(view::answer(answer))
}

/// `DELETE /async-function/CALL-ID`
pub async fn cancel(
    State(api): State<Arc<ApiState>>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, Error> {
    if let Err(refusal) = known(&api, &id, request).await? {
        return Ok(refusal);
    }
    changed(intake(&api)?.queue.cancel(&id).await?, "cancelled")
}

/// What is said of an attempt to change a call.
pub fn changed(changed: ChangeOutcome, done: &str) -> Result<Response, Error> {
    match changed {
        ChangeOutcome::Applied => Ok(StatusCode::NO_CONTENT.into_response()),
        ChangeOutcome::WrongState(state) => {
            let state = view::word(state);
            Err(Error::Conflict(format!("the call is {state}: it cannot be {done}")))
        }
        ChangeOutcome::NotFound => Err(NO_SUCH_CALL),
    }
}

const NO_SUCH_CALL: Error = Error::NotFound("no such call, or not any more");

/// What a page of another origin may say of a call that it queues. `X-Callback-Url` is not among it: it has this machine
/// make a request, which may reach what the page cannot.
const PAGE_HEADERS: HeaderValue = HeaderValue::from_static(
    "Content-Type, X-Call-Id, X-Delay-Seconds, X-Expires-Seconds, X-Max-Attempts, Idempotency-Key",
);

/// `OPTIONS /async-function/…`: any page may queue a call, as it may make one.
pub async fn preflight(method: Method, headers: HeaderMap) -> Response {
    const METHODS: HeaderValue = HeaderValue::from_static("POST, GET, DELETE, OPTIONS");
    let mut answer = StatusCode::NO_CONTENT.into_response();
    answer.headers_mut().insert(ALLOW, METHODS);
    if method == Method::OPTIONS && headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD) {
        use http::header::{
            ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
        };
        let any = HeaderValue::from_static("*");
        answer.headers_mut().insert(ACCESS_CONTROL_ALLOW_ORIGIN, any);
        answer.headers_mut().insert(ACCESS_CONTROL_ALLOW_METHODS, METHODS);
        answer.headers_mut().insert(ACCESS_CONTROL_ALLOW_HEADERS, PAGE_HEADERS);
    }
    answer
}

/// Lets pages read the answers to what [`preflight`] lets them ask. What a function answered is the function's to allow.
pub async fn allow_pages(request: Request, next: Next) -> Response {
    let from_page = is_from_page(&request);
    let mut answer = next.run(request).await;
    if from_page {
        let_pages_read(&mut answer);
    }
    answer
}

fn is_from_page(request: &Request) -> bool {
    request.headers().contains_key(ORIGIN) && !request.uri().path().ends_with("/result")
}

fn let_pages_read(answer: &mut Response) {
    use http::header::{ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS};
    let any = HeaderValue::from_static("*");
    answer.headers_mut().insert(ACCESS_CONTROL_ALLOW_ORIGIN, any.clone());
    answer.headers_mut().insert(ACCESS_CONTROL_EXPOSE_HEADERS, any);
}

/// A method that no call can be asked by; one can be by those in `allow`.
pub async fn other_method(allow: &'static str) -> Response {
    (StatusCode::METHOD_NOT_ALLOWED, [(ALLOW, allow)], "method not allowed here\n").into_response()
}

/// What takes calls in, if this gateway has a queue.
pub fn intake(api: &ApiState) -> Result<&Intake, Error> {
    api.queue_ingress.as_deref().ok_or_else(|| {
        Error::NotImplemented(
            "this gateway has no queue: set queue=embedded to keep queued calls in a file"
                .to_owned(),
        )
    })
}

/// The status of the call with `id` if the client that sent `request` may know it, else the response to it. The one rule
/// for state, result and cancelling.
///
/// An id that the gateway made is known to its client alone, and opens its call while that is remembered. For any other
/// id the client needs to be admitted to the API, before it learns whether there is such a call: an id that a client
/// chose can be guessed.
async fn known(
    api: &ApiState,
    id: &str,
    request: Request,
) -> Result<Result<CallRecord, Response>, Error> {
    let queue = &intake(api)?.queue;
    // Ids that can be guessed are not looked up before: even the time that takes would tell whether they are there.
    let status = if is_unguessable(id) { queue.status(id).await? } else { None };
    let opens = status.as_ref().is_some_and(|status| !status.chosen_id);
    if !opens && let Err(refusal) = auth::authorize(api, request).await? {
        return Ok(Err(refusal));
    }
    let status = match status {
        None if !is_unguessable(id) => queue.status(id).await?,
        status => status,
    };
    status.ok_or(NO_SUCH_CALL).map(Ok)
}

/// Whether `id` has the form of those that gateways make: a random UUID.
fn is_unguessable(id: &str) -> bool {
    uuid::Uuid::try_parse(id).is_ok_and(|id| id.get_version_num() == 4)
}

/// The function that the path names, and path and query behind its name.
fn destination(uri: &Uri, default_namespace: &str) -> Result<(Function, String), Error> {
    let path = uri.path_and_query().map_or("", |path| path.as_str());
    let rest = path.strip_prefix("/async-function/").ok_or(Error::NoSuchPath)?;
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let function = Function::parse(&rest[..end], default_namespace).ok_or(Error::NoSuchPath)?;
    Ok((function, rest[end..].to_owned()))
}

/// A provider that says that there is no such function is believed. One that is away is no reason to refuse: waiting is
/// what a queue is for; but of names that it has not answered for, only so many are taken.
pub async fn must_exist(
    known: &FunctionRegistry,
    provider: &Provider,
    intake: &Intake,
    function: &Function,
    id: &str,
) -> Result<(), Error> {
    if known.contains(function) {
        return Ok(());
    }
    let timeout = provider.timeout.min(LONGEST_QUESTION);
    let provider = Provider { timeout, ..provider.clone() };
    // On the heap: it is rare, and large.
    match Box::pin(provider.status(function)).await {
        Ok(_) => {
            intake.unverified.forget();
            known.confirm(function);
            Ok(())
        }
        Err(error @ Error::NoSuchFunction(_)) => {
            intake.unverified.forget();
            Err(error)
        }
        Err(error) => {
            tracing::debug!(call_id = id, %function, %error, "Nobody says whether the function of a queued call exists");
            intake.unverified.admit(function)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_gateways_make_cannot_be_guessed_and_others_may_be() {
        // Both queues test that their ids have this form.
        assert!(is_unguessable(&uuid::Uuid::new_v4().to_string()));
        // The last is a UUID of version 5, made of a name.
        for id in ["", "order-42", "1", "886313e1-3b8a-5372-9b90-0c9aee199e5d"] {
            assert!(!is_unguessable(id), "{id}");
        }
    }

    #[test]
    fn what_stands_behind_the_name_is_kept_as_it_is() {
        let check = |uri: &str, name: &str, target: &str| {
            let (function, rest) = destination(&uri.parse().unwrap(), "fn").unwrap();
            assert_eq!((function.to_string().as_str(), rest.as_str()), (name, target), "{uri}");
        };
        check("/async-function/echo", "echo.fn", "");
        check("/async-function/echo.dev/", "echo.dev", "/");
        check("/async-function/echo/a%2Fb//c?x=%20", "echo.fn", "/a%2Fb//c?x=%20");
        check("/async-function/echo?x=1/2", "echo.fn", "?x=1/2");
        assert!(destination(&"/async-function/".parse().unwrap(), "fn").is_err());
        assert!(destination(&"/async-function/a%20b".parse().unwrap(), "fn").is_err());
    }
}
