//! `GET /system/functions`: the provider's list, with the invocation count of each function.

use std::collections::HashMap;
use std::sync::Arc;

use axum::extract::{Extension, Request, State};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value};

use crate::state::ApiState;
use crate::system::json_response;
use gateway_http::server::client_connection::ClientConnection;
use gateway_provider::parse_json;
use gateway_proxy::error::Error;

/// Returns the list. Counts are left out if they are unavailable: the list is worth more.
///
/// # Errors
/// The provider does not respond, or not with a list.
pub async fn list(
    State(api): State<Arc<ApiState>>,
    Extension(connection): Extension<ClientConnection>,
    request: Request,
) -> Result<Response, Error> {
    let (status, headers, body) = api.fetch_json(&connection, request).await?;
    if !status.is_success() {
        let mut response = (status, body).into_response();
        if let Some(kind) = headers.get(http::header::CONTENT_TYPE) {
            response.headers_mut().insert(http::header::CONTENT_TYPE, kind.clone());
        }
        return Ok(response);
    }
    let mut functions = parse_json::<Option<Vec<Map<String, Value>>>>(&body)?.unwrap_or_default();
    if !functions.is_empty() {
        let counts = api.invocation_counts.by_function(&api.client, &api.metrics).await;
        add_invocation_counts(&mut functions, &counts, &api.default_namespace);
    }
    let body = serde_json::to_vec(&functions)
        .map_err(|error| Error::Provider(format!("cannot encode the list: {error}")))?;
    Ok(json_response(body))
}

/// Sets `invocationCount` of each function whose count is known.
fn add_invocation_counts(
    functions: &mut [Map<String, Value>],
    counts: &HashMap<String, u64>,
    default_namespace: &str,
) {
    for function in functions {
        let Some(name) = function.get("name").and_then(Value::as_str) else { continue };
        let namespace = match function.get("namespace").and_then(Value::as_str) {
            Some(namespace) if !namespace.is_empty() => namespace,
            _ => default_namespace,
        };
        let label =
            if namespace.is_empty() { name.to_owned() } else { format!("{name}.{namespace}") };
        if let Some(count) = counts.get(&label) {
            function.insert("invocationCount".to_owned(), Value::from(*count));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_found_by_name_and_namespace() {
        let mut functions: Vec<Map<String, Value>> = serde_json::from_str(
            r#"[{"name":"a","namespace":"dev","x":1},{"name":"b"},{"name":"c"},{"odd":true}]"#,
        )
        .unwrap();
        let counts = HashMap::from([("a.dev".to_owned(), 3), ("b.fn".to_owned(), 0)]);
        add_invocation_counts(&mut functions, &counts, "fn");
        assert_eq!(
            serde_json::to_string(&functions).unwrap(),
            r#"[{"name":"a","namespace":"dev","x":1,"invocationCount":3},{"name":"b","invocationCount":0},{"name":"c"},{"odd":true}]"#
        );
    }
}
