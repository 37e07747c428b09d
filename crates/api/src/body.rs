//! Reads request bodies within a limit.

use axum::body::Body;
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};

use gateway_http::client::body::RequestBodyError;
use gateway_proxy::error::Error;

/// Maximum bytes of the body of an alert or a scale request.
pub(crate) const MAX_BODY: usize = 1 << 20;

/// Reads a body of at most `limit` bytes.
///
/// # Errors
/// The body is longer, or the client aborted it.
pub(crate) async fn read_body(body: Body, limit: usize) -> Result<Bytes, Error> {
    match Limited::new(body, limit).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) => Err(body_error(&*error, limit)),
    }
}

/// Maps the error of reading a body of at most `limit` bytes.
pub(crate) fn body_error(error: &(dyn std::error::Error + 'static), limit: usize) -> Error {
    if error.is::<LengthLimitError>() {
        return Error::TooLarge(limit);
    }
    Error::Body(RequestBodyError::find_in_chain(error).unwrap_or(RequestBodyError::Malformed))
}
