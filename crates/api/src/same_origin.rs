//! Protects the API and the metrics port from web pages of other origins.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::Method;

use gateway_http::allowed_hosts::{AllowedHosts, InternalHosts, check_origin, is_from_page};
use gateway_http::names::{SYSTEM_PREFIX, X_GATEWAY_CALLBACK};
use gateway_proxy::error::Error;

/// Rejects requests to `/system/` that were sent by a callback or a page of another origin. Functions may be called by
/// any page.
pub async fn guard(State(allowed): State<AllowedHosts>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    if !path.starts_with(SYSTEM_PREFIX) {
        return next.run(request).await;
    }
    let headers = request.headers();
    let checked = match check_origin(headers, allowed) {
        // The target of a callback is chosen by a client, which may have no access to the API.
        _ if headers.contains_key(X_GATEWAY_CALLBACK) => Err("a callback cannot use the API"),
        Ok(()) if is_from_page(headers) && !is_allowed_for_pages(request.method(), path) => Err(
            "a web page cannot change functions, since responses of functions have the same origin: use a command line",
        ),
        checked => checked,
    };
    run_if_ok(checked, request, next).await
}

/// Rejects requests to the metrics port that a web page of another origin can have sent.
pub async fn guard_internal(
    State(hosts): State<Arc<InternalHosts>>,
    request: Request,
    next: Next,
) -> Response {
    let authority = request.uri().authority().map(http::uri::Authority::as_str);
    let checked = hosts.check(request.headers(), authority);
    run_if_ok(checked, request, next).await
}

async fn run_if_ok(checked: Result<(), &'static str>, request: Request, next: Next) -> Response {
    match checked {
        Ok(()) => next.run(request).await,
        Err(reason) => Error::Forbidden(reason).into_response(),
    }
}

/// Returns whether a page may send such a request to the API: pages may read, and do what the page under `/ui/` does. A
/// page that a function returned has the same origin, and its content may come from a third party.
fn is_allowed_for_pages(method: &Method, path: &str) -> bool {
    method.is_safe() || path.starts_with("/system/calls/")
}
