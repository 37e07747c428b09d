//! `/system/queues`, `/system/calls`: queued calls as their operators see them.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::response::{IntoResponse, Response};
use http::HeaderValue;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::error::Error;
use crate::function::Function;
use crate::queue::{Filter, Order, now};
use crate::queued::{changed, intake, view};
use crate::system::ApiState;

/// Calls that are listed unless another number is asked for, and at most.
const USUAL_LIST: usize = 100;
const LONGEST_LIST: usize = 1000;

/// Which calls are meant.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Selection {
    /// A state, or `dead`: failed for good and kept.
    state: Option<String>,
    function: Option<String>,
    limit: Option<usize>,
    /// The id of the last call that has been seen.
    after: Option<String>,
    /// `oldest` (the default) or `newest`: which call comes first.
    order: Option<String>,
}

impl Selection {
    fn filter(&self, default_namespace: &str) -> Result<Filter, Error> {
        let mut filter = Filter::default();
        match self.state.as_deref() {
            None | Some("") => {}
            Some("dead") => filter.dead_letter = Some(true),
            Some(word) => {
                filter.state = Some(view::state(word).ok_or_else(|| {
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

/// The calls of one function.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    function: String,
    pending: u64,
    running: u64,
    delayed: u64,
    dead: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    oldest_age_seconds: Option<u64>,
}

/// `GET /system/queues`: how many calls there are, by function.
pub async fn queues(State(api): State<Arc<ApiState>>) -> Result<Response, Error> {
    let now = now();
    let counts = intake(&api)?.queue.depths().await?;
    let lines = counts.into_iter().map(|(function, counts)| Line {
        function: function.to_string(),
        pending: counts.pending,
        running: counts.running,
        delayed: counts.delayed,
        dead: counts.dead_letters,
        oldest_age_seconds: counts.oldest.map(|oldest| now.saturating_sub(oldest) / 1000),
    });
    Ok(Json(lines.collect::<Vec<_>>()).into_response())
}

/// `GET /system/calls?state=&function=&order=&limit=&after=`: calls, the oldest first unless `order=newest`.
pub async fn calls(
    State(api): State<Arc<ApiState>>,
    Query(selection): Query<Selection>,
) -> Result<Response, Error> {
    let filter = selection.filter(&api.default_namespace)?;
    let limit = selection.limit.unwrap_or(USUAL_LIST).min(LONGEST_LIST);
    let found = intake(&api)?.queue.list(&filter, selection.after.as_deref(), limit).await?;
    let states: Vec<_> = found.calls.iter().map(view::State::of).collect();
    let mut response = Json(states).into_response();
    if !found.complete {
        response.headers_mut().insert(view::X_TRUNCATED, HeaderValue::from_static("true"));
    }
    Ok(response)
}

/// `POST /system/calls/CALL-ID/retry`: has a dead call made again.
pub async fn retry(
    State(api): State<Arc<ApiState>>,
    Path(id): Path<String>,
) -> Result<Response, Error> {
    changed(intake(&api)?.queue.redrive(&id).await?, "tried again")
}

/// `DELETE /system/calls/CALL-ID`: takes back a call that waits, or lets go of a dead one.
pub async fn cancel(
    State(api): State<Arc<ApiState>>,
    Path(id): Path<String>,
) -> Result<Response, Error> {
    changed(intake(&api)?.queue.cancel(&id).await?, "cancelled")
}

/// `POST /system/queues/purge?function=&state=`: removes calls that do not run, all trace of them.
pub async fn purge(
    State(api): State<Arc<ApiState>>,
    Query(selection): Query<Selection>,
) -> Result<Response, Error> {
    let filter = selection.filter(&api.default_namespace)?;
    // Everything there is, by a slip of the hand, is too much.
    if filter.function.is_none() && filter.state.is_none() && filter.dead_letter.is_none() {
        return Err(Error::BadRequest("name a function or a state to be purged".to_owned()));
    }
    let purged = intake(&api)?.queue.purge(&filter).await?;
    Ok(Json(json!({ "purged": purged })).into_response())
}
