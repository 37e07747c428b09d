//! `/system/queues`, `/system/calls`: queued calls for operators.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::response::{IntoResponse, Response};
use http::HeaderValue;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::async_api::{
    CHANGES_UNSUPPORTED, LISTING_UNSUPPORTED, change_response, dto, ingress, store,
};
use crate::state::ApiState;
use gateway_base::function::Function;
use gateway_http::names::X_TRUNCATED;
use gateway_proxy::error::Error;
use gateway_queue::{Filter, Order, now};

/// Default and maximum number of calls on a page.
const DEFAULT_LIST_LIMIT: usize = 100;
const MAX_LIST_LIMIT: usize = 1000;

/// Query parameters that select calls.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CallQuery {
    /// A state, or `dead` for dead letters.
    state: Option<String>,
    function: Option<String>,
    limit: Option<usize>,
    /// Id of the last call of the previous page.
    after: Option<String>,
    /// Sort order: `oldest` first (the default) or `newest` first.
    order: Option<String>,
}

impl CallQuery {
    fn filter(&self, default_namespace: &str) -> Result<Filter, Error> {
        let mut filter = Filter::default();
        match self.state.as_deref() {
            None | Some("") => {}
            Some("dead") => filter.dead_letter = Some(true),
            Some(word) => {
                filter.state = Some(dto::parse_state(word).ok_or_else(|| {
                    Error::BadRequest(
                        "state is none of queued, running, retrying, succeeded, failed, cancelled, dead".to_owned(),
                    )
                })?);
            }
        }
        if let Some(name) = self.function.as_deref().filter(|name| !name.is_empty()) {
            let function = Function::parse(name, default_namespace);
            let function = function
                .ok_or_else(|| Error::BadRequest("function is not a function's name".to_owned()))?;
            filter.function = Some(function);
        }
        filter.order = match self.order.as_deref() {
            None | Some("" | "oldest") => Order::OldestFirst,
            Some("newest") => Order::NewestFirst,
            Some(_) => {
                return Err(Error::BadRequest("order is neither oldest nor newest".to_owned()));
            }
        };
        Ok(filter)
    }
}

/// Number of calls of one function, by state.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct QueueRow {
    function: String,
    pending: u64,
    running: u64,
    delayed: u64,
    dead: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    oldest_age_seconds: Option<u64>,
}

/// `GET /system/queues`: the number of calls, by function.
///
/// # Errors
/// When the queue cannot be queried.
pub async fn queues(State(api): State<Arc<ApiState>>) -> Result<Response, Error> {
    let now = now();
    let counts = store(ingress(&api)?, LISTING_UNSUPPORTED)?.depths().await?;
    let rows = counts.into_iter().map(|(function, counts)| QueueRow {
        function: function.to_string(),
        pending: counts.pending,
        running: counts.running,
        delayed: counts.delayed,
        dead: counts.dead_letters,
        oldest_age_seconds: counts.oldest.map(|oldest| now.saturating_sub(oldest) / 1000),
    });
    Ok(Json(rows.collect::<Vec<_>>()).into_response())
}

/// `GET /system/calls?state=&function=&order=&limit=&after=`: lists calls, the oldest first unless `order=newest`.
///
/// # Errors
/// Bad request for an invalid parameter, or when the queue cannot be queried.
pub async fn calls(
    State(api): State<Arc<ApiState>>,
    Query(query): Query<CallQuery>,
) -> Result<Response, Error> {
    let filter = query.filter(&api.default_namespace)?;
    let limit = query.limit.unwrap_or(DEFAULT_LIST_LIMIT).min(MAX_LIST_LIMIT);
    let store = store(ingress(&api)?, LISTING_UNSUPPORTED)?;
    let found = store.list(&filter, query.after.as_deref(), limit).await?;
    let states: Vec<_> = found.calls.iter().map(dto::CallStateDto::of).collect();
    let mut response = Json(states).into_response();
    if !found.complete {
        response.headers_mut().insert(X_TRUNCATED, HeaderValue::from_static("true"));
    }
    Ok(response)
}

/// `POST /system/calls/CALL-ID/retry`: redrives a dead letter.
///
/// # Errors
/// Conflict when the call is not a dead letter; not found when it is unknown.
pub async fn retry(
    State(api): State<Arc<ApiState>>,
    Path(id): Path<String>,
) -> Result<Response, Error> {
    let store = store(ingress(&api)?, CHANGES_UNSUPPORTED)?;
    change_response(store.redrive(&id).await?, "tried again")
}

/// `DELETE /system/calls/CALL-ID`: cancels a pending call, or discards a dead letter.
///
/// # Errors
/// Conflict when the call is running or finished; not found when it is unknown.
pub async fn cancel(
    State(api): State<Arc<ApiState>>,
    Path(id): Path<String>,
) -> Result<Response, Error> {
    let store = store(ingress(&api)?, CHANGES_UNSUPPORTED)?;
    change_response(store.cancel(&id).await?, "cancelled")
}

/// `POST /system/queues/purge?function=&state=`: deletes calls that are not running, with their records.
///
/// # Errors
/// Bad request when neither a function nor a state is given.
pub async fn purge(
    State(api): State<Arc<ApiState>>,
    Query(query): Query<CallQuery>,
) -> Result<Response, Error> {
    let filter = query.filter(&api.default_namespace)?;
    // A request without parameters, sent by mistake, must not delete everything.
    if filter.function.is_none() && filter.state.is_none() && filter.dead_letter.is_none() {
        return Err(Error::BadRequest("name a function or a state to be purged".to_owned()));
    }
    let purged = store(ingress(&api)?, LISTING_UNSUPPORTED)?.purge(&filter).await?;
    Ok(Json(json!({ "purged": purged })).into_response())
}
