//! `/system/*`: requests that are proxied to the provider, some with additions to the response.

mod change;
mod list;
mod send;

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Extension, Path, Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::header::{
    ACCEPT_ENCODING, CONTENT_TYPE, IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE, RANGE,
};
use http::{HeaderMap, Method, StatusCode};
use serde_json::{Value, json};

use crate::body::{MAX_BODY, read_body};
use crate::state::ApiState;
use gateway_base::function::Function;
use gateway_http::client::upstream_body::UpstreamBody;
use gateway_http::server::client_connection::ClientConnection;
use gateway_provider::types::ScaleRequest;
use gateway_provider::{collect_response, parse_json};
use gateway_proxy::error::Error;

pub use change::change;
pub use list::list;
pub use send::MAX_REPLAY_BODIES;

/// Proxies a request unchanged.
pub async fn proxy(
    State(api): State<Arc<ApiState>>,
    Extension(connection): Extension<ClientConnection>,
    request: Request,
) -> Response {
    api.send(&connection, &api.provider.origin, request).await.map(stream_response).into_response()
}

/// Proxies a request whose path names a function or namespace.
pub async fn proxy_named(
    state: State<Arc<ApiState>>,
    connection: Extension<ClientConnection>,
    Path(name): Path<String>,
    request: Request,
) -> Response {
    if !name.bytes().all(gateway_base::function::is_name_byte) {
        return Error::NoSuchPath.into_response();
    }
    proxy(state, connection, request).await
}

/// `POST /system/scale-function/NAME`: only a valid body is proxied.
///
/// # Errors
/// The path names no function, the body is invalid, or the provider does not respond.
pub async fn scale(
    State(api): State<Arc<ApiState>>,
    Extension(connection): Extension<ClientConnection>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response, Error> {
    let function = Function::parse(&name, &api.default_namespace).ok_or(Error::NoSuchPath)?;
    let (parts, body) = request.into_parts();
    let bytes = read_body(body, MAX_BODY).await?;
    let wanted = serde_json::from_slice::<ScaleRequest>(&bytes).map_err(|error| {
        Error::BadRequest(format!(
            "the body is not {{\"serviceName\":NAME,\"replicas\":COUNT}}: {error}"
        ))
    })?;
    let request = Request::from_parts(parts, Body::from(bytes));
    let _changed = [function.name, wanted.service_name]
        .map(|name| change::InvalidateOnDrop::named(&api, name));
    api.send(&connection, &api.provider.origin, request).await.map(stream_response)
}

/// `GET /system/info`: the provider's information, and this gateway's.
///
/// # Errors
/// The provider does not respond, or not with JSON.
pub async fn info(
    State(api): State<Arc<ApiState>>,
    Extension(connection): Extension<ClientConnection>,
    request: Request,
) -> Result<Response, Error> {
    let (status, _, body) = api.fetch_json(&connection, request).await?;
    if !status.is_success() {
        return Ok((status, body).into_response());
    }
    let provider: Value = parse_json(&body)?;
    Ok(axum::Json(json!({
        "provider": provider,
        "version": {
            "release": api.build.release,
            "sha": api.build.commit,
            "commit_message": api.build.commit_message,
        },
        "arch": std::env::consts::ARCH,
    }))
    .into_response())
}

impl ApiState {
    /// Fetches a JSON response that is read here, so neither compressed nor partial, whatever the client accepts. HEAD
    /// is sent as GET.
    async fn fetch_json(
        &self,
        connection: &ClientConnection,
        mut request: Request,
    ) -> Result<(StatusCode, HeaderMap, Bytes), Error> {
        *request.method_mut() = Method::GET;
        for name in [ACCEPT_ENCODING, IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE, RANGE] {
            request.headers_mut().remove(name);
        }
        let response = self.send(connection, &self.provider.origin, request).await?;
        Ok(collect_response(response).await?)
    }
}

/// Converts an upstream's response to a response of the router.
pub fn stream_response(response: http::Response<UpstreamBody>) -> Response {
    response.map(Body::new)
}

/// Returns a 200 with a JSON body.
pub fn json_response(body: Vec<u8>) -> Response {
    (StatusCode::OK, [(CONTENT_TYPE, "application/json")], body).into_response()
}
