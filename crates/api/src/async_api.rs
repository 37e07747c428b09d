//! `/async-function/…`: enqueues calls, and returns their state and their results.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::StreamExt;
use http::header::{ACCESS_CONTROL_REQUEST_METHOD, ALLOW, CONTENT_LENGTH, ORIGIN};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri};

use crate::async_api::call_options::{call_options, name_text};
use crate::auth;
use crate::body::body_error;
use crate::state::ApiState;
use gateway_base::function::Function;
use gateway_http::call_id::RequestIds;
use gateway_http::names::X_CALL_ID;
use gateway_http::server::client_connection::ClientConnection;
use gateway_http::{allowed_hosts, callback_chain};
use gateway_proxy::error::Error;
use gateway_proxy::functions::exists::check_function_exists;
use gateway_proxy::routing::RouteMatch;
use gateway_proxy::trace::PublishTiming;
use gateway_queue::call::QueuedCall;
use gateway_queue::ingress::{QueueIngress, function_headers};
use gateway_queue::memory::{BodyBuffer, MAX_TOTAL_BYTES};
use gateway_queue::status::CallRecord;
use gateway_queue::{self as queue, ChangeOutcome, JobQueue as _, JobStore, MemoryPermit, now};

pub mod admin;
pub(crate) mod call_options;
pub mod dto;

/// Reads `body` completely. The returned memory reservation must be held as long as the body.
async fn read_body(
    ingress: &QueueIngress,
    body: Body,
) -> Result<(Bytes, Option<MemoryPermit>), Error> {
    let limit = ingress.body_limit();
    let mut kept = BodyBuffer::new(&ingress.budget);
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
    let (body, mut memory) = kept.finish();
    // The queue makes a copy, for which memory is reserved, too. If the body takes more than half of the budget,
    // the copy gets only the rest.
    let copy = body.len().min(MAX_TOTAL_BYTES - body.len());
    let copy = ingress.budget.try_reserve(copy).ok_or(Error::Overloaded)?;
    match &mut memory {
        Some(memory) => memory.merge(copy),
        None => memory = Some(copy),
    }
    Ok((body, memory))
}

/// Returns the label (for metrics) of a request that enqueues a call; `None` for other requests to the queue.
pub fn enqueue_label(method: &Method, path: &str, route: RouteMatch) -> Option<&'static str> {
    match (route.name(path), route.rest(path)) {
        _ if method != Method::POST => None,
        ("", _) => None,
        (_, "") => Some("/async-function/{name}"),
        (_, "/") => Some("/async-function/{name}/"),
        _ => Some("/async-function/{name}/{*rest}"),
    }
}

/// `POST /async-function/NAME…`: answers 202 when the call is stored durably.
pub async fn submit(
    api: &ApiState,
    client: &ClientConnection,
    mut request: Request,
    route: RouteMatch,
) -> Response {
    let cross_origin = is_cross_origin(&request);
    let chosen_id = request.headers().get(X_CALL_ID).is_some_and(|id| !id.is_empty());
    if let (Ok(ingress), false) = (ingress(api), chosen_id)
        && let Ok((function, _)) = parse_target(request.uri(), route, &api.default_namespace)
        && let Ok(id) = HeaderValue::try_from(ingress.queue.new_call_id(&function))
    {
        request.headers_mut().insert(X_CALL_ID, id);
    }
    let ids = RequestIds::from_headers(request.headers());
    let mut response = match enqueue(api, client, request, route, &ids, chosen_id).await {
        Ok((published, duration)) => {
            let mut response = StatusCode::ACCEPTED.into_response();
            if !published.duplicate {
                response.extensions_mut().insert(PublishTiming(duration));
            }
            ids.apply_to_response(response.headers_mut());
            // A duplicate has the id of its first submission. A call whose chosen id belongs to another call gets a
            // new id.
            if let Ok(id) = HeaderValue::try_from(published.id) {
                response.headers_mut().insert(X_CALL_ID, id);
            }
            response
        }
        Err(error) => {
            let mut response = error.response(Some(&ids.call_id)).map(Body::from);
            ids.apply_to_response(response.headers_mut());
            response
        }
    };
    if cross_origin {
        add_cors_headers(&mut response);
    }
    response
}

/// Enqueues a call, and returns how long the queue took for it.
async fn enqueue(
    api: &ApiState,
    client: &ClientConnection,
    request: Request,
    route: RouteMatch,
    ids: &RequestIds,
    chosen_id: bool,
) -> Result<(queue::Published, Duration), Error> {
    let ingress = ingress(api)?;
    let (parts, body) = request.into_parts();
    allowed_hosts::check_async_request(&parts.headers, api.allowed_hosts)
        .map_err(Error::Forbidden)?;
    if callback_chain::length(&parts.headers) > callback_chain::MAX_LENGTH {
        return Err(Error::CallbackLoop);
    }
    let (function, target) = parse_target(&parts.uri, route, &api.default_namespace)?;
    let mut options = call_options(&parts.headers, chosen_id, now())?;
    if let Some(key) = &mut options.idempotency_key {
        // Idempotency keys are scoped to the function. Like a chosen id, a key can be guessed.
        *key = format!("{function} {key}");
        options.chosen_id = true;
    }
    let id = name_text(&ids.call_id, &X_CALL_ID)?;
    let length = parts.headers.get(CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    let limit = ingress.body_limit();
    if length.is_some_and(|length| length > limit) {
        return Err(Error::TooLarge(limit));
    }
    check_function_exists(&api.metrics.function_registry, &api.provider, ingress, &function, &id)
        .await?;
    let (body, memory) = read_body(ingress, body).await?;
    let headers = function_headers(&parts.headers, &client.forwarded_for, ids);
    let mut call = QueuedCall { id, function, target, headers, body, options };
    call.options.digest = Some(call.digest());
    if call.options.idempotency_key.is_some() {
        store(ingress, DUPLICATES_UNSUPPORTED)?;
    }
    let started = Instant::now();
    let published = ingress.queue.publish(call, memory).await?;
    let duration = started.elapsed();
    if !published.duplicate {
        ingress.metrics.submitted(duration);
    }
    Ok((published, duration))
}

/// `GET /async-function/CALL-ID`
///
/// # Errors
/// Not found when the call is unknown.
pub async fn status(
    State(api): State<Arc<ApiState>>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, Error> {
    Ok(match authorized_record(&api, &id, request).await? {
        Ok(status) => Json(dto::CallStateDto::of(&status)).into_response(),
        Err(rejection) => rejection,
    })
}

/// `GET /async-function/CALL-ID/result`
///
/// # Errors
/// Conflict while the call is not finished; not found when it has no result.
pub async fn result(
    State(api): State<Arc<ApiState>>,
    Path((id, rest)): Path<(String, String)>,
    request: Request,
) -> Result<Response, Error> {
    if rest != "result" {
        return Err(Error::NoSuchPath);
    }
    let status = match authorized_record(&api, &id, request).await? {
        Ok(status) => status,
        Err(rejection) => return Ok(rejection),
    };
    if !status.state.is_final() {
        return Err(Error::Conflict("the call is not finished".to_owned()));
    }
    let response = store(ingress(&api)?, RECORDS_UNSUPPORTED)?.result(&id).await?;
    let response = response.ok_or(Error::NotFound("the call has no result"))?;
    Ok(dto::result_response(response))
}

/// `DELETE /async-function/CALL-ID`
///
/// # Errors
/// Conflict when the call is running or finished; not found when it is unknown.
pub async fn cancel(
    State(api): State<Arc<ApiState>>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Response, Error> {
    if let Err(rejection) = authorized_record(&api, &id, request).await? {
        return Ok(rejection);
    }
    change_response(store(ingress(&api)?, CHANGES_UNSUPPORTED)?.cancel(&id).await?, "cancelled")
}

/// Converts the result of a change to a response. `done` is the past participle of the change, for the error text.
///
/// # Errors
/// Conflict when the call's state does not allow the change; not found when it is unknown.
pub fn change_response(changed: ChangeOutcome, done: &str) -> Result<Response, Error> {
    match changed {
        ChangeOutcome::Applied => Ok(StatusCode::NO_CONTENT.into_response()),
        ChangeOutcome::WrongState(state) => {
            let state = dto::state_name(state);
            Err(Error::Conflict(format!("the call is {state}: it cannot be {done}")))
        }
        ChangeOutcome::NotFound => Err(NO_SUCH_CALL),
    }
}

const NO_SUCH_CALL: Error = Error::NotFound("no such call, or not any more");

/// Request headers that a page of another origin may send. `X-Callback-Url` is excluded: it makes this gateway send a
/// request, which could reach addresses that the page cannot.
const CORS_ALLOWED_HEADERS: HeaderValue = HeaderValue::from_static(
    "Content-Type, X-Call-Id, X-Delay-Seconds, X-Expires-Seconds, X-Max-Attempts, Idempotency-Key",
);

/// `OPTIONS /async-function/…`: pages of any origin may enqueue calls, as they may invoke functions.
pub async fn preflight(method: Method, headers: HeaderMap) -> Response {
    const METHODS: HeaderValue = HeaderValue::from_static("POST, GET, DELETE, OPTIONS");
    let mut response = StatusCode::NO_CONTENT.into_response();
    response.headers_mut().insert(ALLOW, METHODS);
    if method == Method::OPTIONS && headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD) {
        use http::header::{
            ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
        };
        let any = HeaderValue::from_static("*");
        response.headers_mut().insert(ACCESS_CONTROL_ALLOW_ORIGIN, any);
        response.headers_mut().insert(ACCESS_CONTROL_ALLOW_METHODS, METHODS);
        response.headers_mut().insert(ACCESS_CONTROL_ALLOW_HEADERS, CORS_ALLOWED_HEADERS);
    }
    response
}

/// Middleware that lets pages of other origins read responses. Results are excluded: their CORS headers are the
/// function's.
pub async fn cors(request: Request, next: Next) -> Response {
    let cross_origin = is_cross_origin(&request);
    let mut response = next.run(request).await;
    if cross_origin {
        add_cors_headers(&mut response);
    }
    response
}

fn is_cross_origin(request: &Request) -> bool {
    request.headers().contains_key(ORIGIN) && !request.uri().path().ends_with("/result")
}

fn add_cors_headers(response: &mut Response) {
    use http::header::{ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS};
    let any = HeaderValue::from_static("*");
    response.headers_mut().insert(ACCESS_CONTROL_ALLOW_ORIGIN, any.clone());
    response.headers_mut().insert(ACCESS_CONTROL_EXPOSE_HEADERS, any);
}

/// Answers 405 with the methods in `allow`.
pub async fn unsupported_method(allow: &'static str) -> Response {
    (StatusCode::METHOD_NOT_ALLOWED, [(ALLOW, allow)], "method not allowed here\n").into_response()
}

/// Returns the queue ingress.
///
/// # Errors
/// Not implemented when this gateway has no queue.
pub fn ingress(api: &ApiState) -> Result<&QueueIngress, Error> {
    api.queue_ingress.as_deref().ok_or_else(|| {
        Error::NotImplemented(
            "this gateway has no queue: set queue=embedded to keep queued calls in a file"
                .to_owned(),
        )
    })
}

/// What a queue on NATS Streaming does not offer, for the text of the error response.
const RECORDS_UNSUPPORTED: &str = "NATS Streaming does not store the state of calls";
const CHANGES_UNSUPPORTED: &str = "NATS Streaming cannot change queued calls";
const LISTING_UNSUPPORTED: &str = "NATS Streaming cannot list queued calls";
const DUPLICATES_UNSUPPORTED: &str = "NATS Streaming does not detect duplicates";

/// Returns the stored calls of the queue. `missing`: what a queue without a store does not offer.
///
/// # Errors
/// Not implemented when the queue has no store; unavailable while it is not known whether it has one.
fn store<'a>(ingress: &'a QueueIngress, missing: &str) -> Result<&'a dyn JobStore, Error> {
    ingress
        .queue
        .store()?
        .ok_or_else(|| Error::NotImplemented(format!("the queue does not support this: {missing}")))
}

/// Returns the record of the call `id` if the client that sent `request` may access it, otherwise the response that
/// rejects the request. The same rule applies to state, result and cancelling.
///
/// Only its client knows an id that the gateway has generated, so this id grants access to its call. Any other id can
/// be guessed: its client must be authorized for the API before it learns whether the call exists.
async fn authorized_record(
    api: &ApiState,
    id: &str,
    request: Request,
) -> Result<Result<CallRecord, Response>, Error> {
    let ingress = ingress(api)?;
    let find = async || Ok::<_, Error>(store(ingress, RECORDS_UNSUPPORTED)?.status(id).await?);
    // Ids that can be guessed are not looked up before authorization: the response time would reveal whether they
    // exist.
    let status = if is_unguessable(id) { find().await? } else { None };
    let grants_access = status.as_ref().is_some_and(|status| !status.chosen_id);
    if !grants_access && let Err(rejection) = auth::authorize(api, request).await? {
        return Ok(Err(rejection));
    }
    let status = match status {
        None if !is_unguessable(id) => find().await?,
        status => status,
    };
    status.ok_or(NO_SUCH_CALL).map(Ok)
}

/// Returns whether `id` has the form of generated ids: a random UUID.
fn is_unguessable(id: &str) -> bool {
    uuid::Uuid::try_parse(id).is_ok_and(|id| id.get_version_num() == 4)
}

/// Returns the function in the path, and the path and query after its name.
fn parse_target(
    uri: &Uri,
    route: RouteMatch,
    default_namespace: &str,
) -> Result<(Function, String), Error> {
    let path = uri.path_and_query().map_or("", |path| path.as_str());
    let function = Function::parse(route.name(path), default_namespace).ok_or(Error::NoSuchPath)?;
    Ok((function, route.rest(path).to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_random_uuids_are_unguessable() {
        // The tests of the queues check that generated ids have this form.
        assert!(is_unguessable(&uuid::Uuid::new_v4().to_string()));
        // The last one is a UUID of version 5, derived from a name.
        for id in ["", "order-42", "1", "886313e1-3b8a-5372-9b90-0c9aee199e5d"] {
            assert!(!is_unguessable(id), "{id}");
        }
    }

    #[test]
    fn path_and_query_after_the_name_are_kept_unchanged() {
        let parse = |uri: &str| parse_target(&uri.parse().unwrap(), RouteMatch::of(uri), "fn");
        let check = |uri: &str, name: &str, target: &str| {
            let (function, rest) = parse(uri).unwrap();
            assert_eq!((function.to_string().as_str(), rest.as_str()), (name, target), "{uri}");
        };
        check("/async-function/echo", "echo.fn", "");
        check("/async-function/echo.dev/", "echo.dev", "/");
        check("/async-function/echo/a%2Fb//c?x=%20", "echo.fn", "/a%2Fb//c?x=%20");
        check("/async-function/echo?x=1/2", "echo.fn", "?x=1/2");
        assert!(parse("/async-function/").is_err());
        assert!(parse("/async-function/a%20b").is_err());
    }
}
