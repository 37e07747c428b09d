//! `/system/secrets`. Responses never contain values.

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::StatusCode;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::backend::{Backend, SecretValue};
use crate::error::ApiError;
use crate::server::requests::{NamespaceQuery, Query, namespace_or_default, read_json};
use crate::types::Secret;

pub(super) async fn list<B: Backend>(
    State(backend): State<B>,
    Query(query): Query<NamespaceQuery>,
) -> Result<Json<Vec<Secret>>, ApiError> {
    let namespace = namespace_or_default(query.namespace, &backend);
    let names = backend.secrets(&namespace).await?;
    let secret = |name| Secret { name, namespace: namespace.clone(), ..Secret::default() };
    Ok(Json(names.into_iter().map(secret).collect()))
}

pub(super) async fn create<B: Backend>(
    State(backend): State<B>,
    Query(query): Query<NamespaceQuery>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let secret = decode(read_secret(body, query, &backend).await?)?;
    backend.create_secret(secret).await.map(|()| StatusCode::CREATED)
}

pub(super) async fn update<B: Backend>(
    State(backend): State<B>,
    Query(query): Query<NamespaceQuery>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let secret = decode(read_secret(body, query, &backend).await?)?;
    backend.update_secret(secret).await.map(|()| StatusCode::ACCEPTED)
}

pub(super) async fn delete<B: Backend>(
    State(backend): State<B>,
    Query(query): Query<NamespaceQuery>,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let secret = read_secret(body, query, &backend).await?;
    backend.delete_secret(secret.namespace, secret.name).await.map(|()| StatusCode::ACCEPTED)
}

/// Reads the secret in the body, and sets its namespace if it has none.
async fn read_secret<B: Backend>(
    body: Body,
    query: NamespaceQuery,
    backend: &B,
) -> Result<Secret, ApiError> {
    let mut secret: Secret = read_json(body).await?;
    if secret.namespace.is_empty() {
        secret.namespace = namespace_or_default(query.namespace, backend);
    }
    if secret.name.is_empty() {
        return Err(ApiError::Invalid("the secret's name is missing".to_owned()));
    }
    Ok(secret)
}

/// Decodes the value of a secret. Some clients send a file as text and as Base64; Base64 takes precedence, since it can
/// represent any bytes.
fn decode(secret: Secret) -> Result<SecretValue, ApiError> {
    let Secret { name, namespace, value, raw_value } = secret;
    let value = if raw_value.is_empty() {
        value.into_bytes()
    } else {
        let decoded = STANDARD.decode(&raw_value);
        decoded.map_err(|error| ApiError::Invalid(format!("rawValue is not base64: {error}")))?
    };
    Ok(SecretValue { namespace, name, value })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_text_or_base64() {
        let decoded = |value: &str, raw_value: &str| {
            let (value, raw_value) = (value.to_owned(), raw_value.to_owned());
            decode(Secret { value, raw_value, ..Secret::default() })
        };
        assert_eq!(decoded("text", "").unwrap().value, b"text");
        assert_eq!(decoded("", "AP8=").unwrap().value, b"\x00\xff");
        assert!(decoded("", "%").unwrap_err().to_string().contains("base64"));
        // Base64 takes precedence.
        assert_eq!(decoded("a", "AP8=").unwrap().value, b"\x00\xff");
    }

    #[test]
    fn the_value_is_not_printed() {
        let secret = decode(Secret { value: "hidden".to_owned(), ..Secret::default() }).unwrap();
        assert!(!format!("{secret:?}").contains("hidden"));
        assert!(!format!("{secret:?}").contains("104"));
    }
}
