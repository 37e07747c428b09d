//! Access to the API: credentials, or an external authorization service.

mod auth_request;

use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::header::{CONTENT_TYPE, WWW_AUTHENTICATE};

use crate::body::read_body;
use crate::state::ApiState;
use gateway_http::client::body::RequestBody;
use gateway_http::client::{RequestContext, forward};
use gateway_http::credentials::Credentials;
use gateway_http::server::client_connection::ClientConnection;
use gateway_provider::collect_response;
use gateway_proxy::error::Error;

/// Maximum bytes of a body that is sent to the authorization service.
const MAX_AUTH_PROXY_BODY_BYTES: usize = 1 << 20;

/// Middleware that authorizes requests to the API.
pub async fn guard(State(api): State<Arc<ApiState>>, request: Request, next: Next) -> Response {
    match authorize(&api, request).await {
        Ok(Ok(request)) => next.run(request).await,
        Ok(Err(refusal)) => refusal,
        Err(error) => error.into_response(),
    }
}

/// Returns `request` if its client may use the API, otherwise the response to it. Without credentials every client may.
///
/// # Errors
/// The credentials are missing or wrong, or the authorization service does not respond.
pub async fn authorize(
    api: &ApiState,
    request: Request,
) -> Result<Result<Request, Response>, Error> {
    if api.auth_proxy.is_some() {
        return ask_auth_proxy(api, request).await;
    }
    match &api.credentials {
        Some(credentials) if !credentials.verify(request.headers()) => Err(Error::Unauthorized),
        _ => Ok(Ok(request)),
    }
}

/// Middleware of the process provider: `/system/*` requires the credentials, functions are open.
pub async fn guard_provider(
    State(credentials): State<Option<Arc<Credentials>>>,
    request: Request,
    next: Next,
) -> Response {
    match &credentials {
        Some(credentials)
            if request.uri().path().starts_with("/system/")
                && !credentials.verify_recent(request.headers()) =>
        {
            Error::Unauthorized.into_response()
        }
        _ => next.run(request).await,
    }
}

/// Sends `request` to `auth_proxy_url` for authorization. Returns the request if it is authorized, otherwise the
/// response to it.
async fn ask_auth_proxy(
    api: &ApiState,
    request: Request,
) -> Result<Result<Request, Response>, Error> {
    let Some(proxy) = &api.auth_proxy else { return Ok(Ok(request)) };
    let (parts, body) = request.into_parts();
    let connection =
        parts.extensions.get::<ClientConnection>().cloned().ok_or(Error::NoSuchPath)?;
    let (subrequest_body, body) = if proxy.pass_body {
        let bytes = read_body(body, MAX_AUTH_PROXY_BODY_BYTES).await?;
        (RequestBody::Full(Some(bytes.clone()).filter(|b| !b.is_empty())), Body::from(bytes))
    } else {
        (RequestBody::empty(), body)
    };
    let mut subrequest = http::Request::new(subrequest_body);
    *subrequest.method_mut() = parts.method.clone();
    *subrequest.uri_mut() = proxy.target.clone();
    *subrequest.headers_mut() = auth_request::headers(&parts);
    let context = RequestContext {
        client_address: &connection.forwarded_for,
        deadlines: connection.deadlines.exchange(),
        started_at: Instant::now(),
        timeout: api.timeouts.upstream,
        is_client_request: false,
    };
    let response = forward(&api.client, &proxy.origin, subrequest, context).await?.response;
    if response.status().is_success() {
        connection.deadlines.exchange().clear_deadline();
        return Ok(Ok(Request::from_parts(parts, body)));
    }
    let (status, headers, text) = collect_response(response).await?;
    let mut refusal = (status, text).into_response();
    for name in [CONTENT_TYPE, WWW_AUTHENTICATE] {
        if let Some(value) = headers.get(&name) {
            refusal.headers_mut().insert(name, value.clone());
        }
    }
    if status.is_redirection()
        && let Some(location) = headers.get(http::header::LOCATION)
    {
        refusal.headers_mut().insert(http::header::LOCATION, location.clone());
    }
    Ok(Err(refusal))
}
