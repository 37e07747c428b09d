//! `GET /system/logs`: streams the response of the log provider.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Extension, Query, Request, State};
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde::Deserialize;

use crate::state::ApiState;
use crate::system::stream_response;
use gateway_http::names::X_GATEWAY_REASON;
use gateway_http::server::client_connection::ClientConnection;
use gateway_provider::signals::NO_SUCH_FUNCTION;
use gateway_proxy::error::Error;

/// A followed log may have no lines for a long time.
const STREAM_IDLE_TIMEOUT: Duration = Duration::from_secs(3600);

/// The checked query parameters. The log provider reads the others.
#[derive(Default, Deserialize)]
#[serde(default)]
struct LogQuery {
    name: String,
    tail: String,
}

/// Rejects a query that no log provider could handle.
fn check(request: &Request) -> Result<(), Error> {
    let query = Query::<LogQuery>::try_from_uri(request.uri());
    let Query(LogQuery { name, tail }) =
        query.map_err(|error| Error::BadRequest(error.body_text()))?;
    if name.is_empty() {
        let reason = "the query names no function: /system/logs?name=NAME";
        return Err(Error::BadRequest(reason.to_owned()));
    }
    let tail = tail.trim();
    if !tail.is_empty() && tail.parse::<i64>().is_err() {
        return Err(Error::BadRequest(format!("tail: {tail:?} is not a whole number")));
    }
    Ok(())
}

/// Handles `GET /system/logs`.
///
/// # Errors
/// The query is invalid, or the log provider does not respond or returns an unexpected status.
pub async fn logs(
    State(api): State<Arc<ApiState>>,
    Extension(connection): Extension<ClientConnection>,
    request: Request,
) -> Result<Response, Error> {
    check(&request)?;
    let mut response = api.send(&connection, &api.logs, request).await?;
    match response.status() {
        // The function does not exist. Without this header the log provider has no such endpoint.
        StatusCode::NOT_FOUND
            if response.headers().get(X_GATEWAY_REASON) == Some(&NO_SUCH_FUNCTION) =>
        {
            Ok(stream_response(response))
        }
        StatusCode::NOT_FOUND | StatusCode::NOT_IMPLEMENTED => {
            Ok(StatusCode::NOT_IMPLEMENTED.into_response())
        }
        StatusCode::BAD_REQUEST => Ok(stream_response(response)),
        status if status.is_success() => {
            response.body_mut().set_idle_timeout(STREAM_IDLE_TIMEOUT);
            Ok(stream_response(response))
        }
        status => Err(Error::Provider(format!("the log provider returned {status}"))),
    }
}
