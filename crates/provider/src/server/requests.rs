//! Parses requests to the API: JSON bodies, query parameters, names in paths.

use std::time::Duration;

use axum::body::Body;
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use crate::backend::Backend;
use crate::error::ApiError;
use gateway_base::function::Function;

/// Maximum size of a request body, and limit for reading it.
const MAX_BODY_BYTES: usize = 1 << 20;
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// Query parameters. Unlike axum's extractor, it rejects invalid ones with an `ApiError`.
pub(super) struct Query<T>(pub(super) T);

/// The query `?namespace=`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct NamespaceQuery {
    pub(super) namespace: String,
}

/// The query of `GET /system/function/NAME`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct StatusQuery {
    pub(super) namespace: String,
    usage: String,
}

impl StatusQuery {
    pub(super) fn wants_usage(&self) -> bool {
        matches!(self.usage.to_ascii_lowercase().as_str(), "1" | "t" | "true")
    }
}

impl<S: Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, ApiError> {
        let query = axum::extract::Query::<T>::try_from_uri(&parts.uri);
        query.map(|query| Self(query.0)).map_err(|error| ApiError::Invalid(error.body_text()))
    }
}

/// Returns `namespace`, or the default namespace if it is empty.
pub(super) fn namespace_or_default<B: Backend>(namespace: String, backend: &B) -> String {
    if namespace.is_empty() { backend.default_namespace().to_owned() } else { namespace }
}

/// Parses `NAME` or `NAME.NAMESPACE`. A non-empty `namespace` overrides the one in `name`.
pub(super) fn parse_function(
    name: &str,
    namespace: &str,
    default_namespace: &str,
) -> Result<Function, ApiError> {
    let missing = || ApiError::NoSuchFunction(name.to_owned());
    let function = Function::parse(name, default_namespace).ok_or_else(missing)?;
    match namespace {
        "" => Ok(function),
        namespace => Ok(Function { namespace: namespace.to_owned(), ..function }),
    }
}

/// Reads a JSON body.
pub(super) async fn read_json<T: DeserializeOwned>(body: Body) -> Result<T, ApiError> {
    parse_json(&read_body(body).await?)
}

/// Reads a JSON body; an empty body is the default value.
pub(super) async fn read_json_or_default<T: DeserializeOwned + Default>(
    body: Body,
) -> Result<T, ApiError> {
    let bytes = read_body(body).await?;
    if bytes.is_empty() { Ok(T::default()) } else { parse_json(&bytes) }
}

/// Reads a body within `MAX_BODY_BYTES` and `BODY_TIMEOUT`.
pub(super) async fn read_body(body: Body) -> Result<Bytes, ApiError> {
    let reading = timeout(BODY_TIMEOUT, Limited::new(body, MAX_BODY_BYTES).collect());
    match reading.await.map_err(|_| ApiError::TooSlow)? {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(ApiError::TooLarge(MAX_BODY_BYTES)),
        Err(_) => Err(ApiError::Invalid("the body was aborted".to_owned())),
    }
}

fn parse_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(bytes)
        .map_err(|error| ApiError::Invalid(format!("the body is not the expected JSON: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(name: &str, namespace: &str, expect: Option<&str>) {
        let function = parse_function(name, namespace, "openfaas-fn");
        let function = function.ok().map(|function| function.to_string());
        assert_eq!(function.as_deref(), expect);
    }

    #[test]
    fn the_namespace_in_the_query_overrides_that_in_the_name() {
        check("f", "", Some("f.openfaas-fn"));
        check("f.dev", "", Some("f.dev"));
        check("f.dev", "prod", Some("f.prod"));
        check("f", "prod", Some("f.prod"));
        check("f%20", "", None);
    }
}
