//! What comes in with requests to the API: JSON bodies, queries, names in paths.

use std::time::Duration;

use axum::body::Body;
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use crate::function::Function;
use crate::provider::process::{ApiError, DEFAULT_NAMESPACE};

/// The largest body of a request, and how long it may take.
const MAX_BODY_BYTES: usize = 1 << 20;
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// Parameters of a query. Unlike axum's, a mistake is refused as all others are.
pub(super) struct Query<T>(pub(super) T);

/// `?namespace=`
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct NamespaceQuery {
    namespace: String,
}

/// The query of `GET /system/function/NAME`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct StatusQuery {
    namespace: String,
    usage: String,
}

impl NamespaceQuery {
    pub(super) fn namespace_or_default(&self) -> String {
        namespace_or_default(&self.namespace)
    }

    /// The function in a path; the query's namespace wins over one behind a dot.
    pub(super) fn parse_function(&self, name: &str) -> Result<Function, ApiError> {
        parse_function(name, &self.namespace)
    }
}

impl StatusQuery {
    pub(super) fn parse_function(&self, name: &str) -> Result<Function, ApiError> {
        parse_function(name, &self.namespace)
    }

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

/// A namespace, or the default one for none.
pub(super) fn namespace_or_default(namespace: &str) -> String {
    if namespace.is_empty() { DEFAULT_NAMESPACE.to_owned() } else { namespace.to_owned() }
}

/// The function that `name` means when `namespace` is given with it.
pub(super) fn parse_function(name: &str, namespace: &str) -> Result<Function, ApiError> {
    let missing = || ApiError::NoSuchFunction(name.to_owned());
    let function = Function::parse(name, DEFAULT_NAMESPACE).ok_or_else(missing)?;
    match namespace {
        "" => Ok(function),
        namespace => Ok(Function { namespace: namespace.to_owned(), ..function }),
    }
}

/// A body that has to be JSON.
pub(super) async fn read_json<T: DeserializeOwned>(body: Body) -> Result<T, ApiError> {
    parse_json(&read_body(body).await?)
}

/// A body that has to be JSON, if there is one.
pub(super) async fn read_json_or_default<T: DeserializeOwned + Default>(
    body: Body,
) -> Result<T, ApiError> {
    let bytes = read_body(body).await?;
    if bytes.is_empty() { Ok(T::default()) } else { parse_json(&bytes) }
}

/// A body, up to the limits.
pub(super) async fn read_body(body: Body) -> Result<Bytes, ApiError> {
    let reading = timeout(BODY_TIMEOUT, Limited::new(body, MAX_BODY_BYTES).collect());
    match reading.await.map_err(|_| ApiError::TooSlow)? {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(ApiError::TooLarge(MAX_BODY_BYTES)),
        Err(_) => Err(ApiError::Invalid("the body broke off".to_owned())),
    }
}

fn parse_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(bytes)
        .map_err(|error| ApiError::Invalid(format!("the body is not what is expected: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(name: &str, namespace: &str, expect: Option<&str>) {
        let function = parse_function(name, namespace).ok().map(|function| function.to_string());
        assert_eq!(function.as_deref(), expect);
    }

    #[test]
    fn the_querys_namespace_wins() {
        check("f", "", Some("f.openfaas-fn"));
        check("f.dev", "", Some("f.dev"));
        check("f.dev", "prod", Some("f.prod"));
        check("f", "prod", Some("f.prod"));
        check("f%20", "", None);
    }
}
