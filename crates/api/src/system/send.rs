//! Sends a client's request to the provider, with this gateway's credentials.
//!
//! While the provider may not have loaded changed credentials, the request may have to be sent again with others, so
//! its body is buffered. A body that is too long for that is sent once, after a request of the gateway's own has
//! determined which credentials are accepted.

use std::time::Instant;

use axum::extract::Request;
use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_LENGTH};
use http::{HeaderMap, Response};
use http_body::Body as _;

use crate::body::{MAX_BODY, read_body};
use crate::state::ApiState;
use gateway_http::client::body::RequestBody;
use gateway_http::client::upstream_body::UpstreamBody;
use gateway_http::client::{Origin, RequestContext, forward};
use gateway_http::credentials::attempts::CredentialAttempts;
use gateway_http::server::client_connection::ClientConnection;
use gateway_proxy::error::Error;

/// Maximum bodies, of at most `MAX_BODY` bytes each, that are buffered at a time, over all threads.
pub const MAX_REPLAY_BODIES: usize = 64;

impl ApiState {
    /// Sends a client's request to `origin`, with this gateway's credentials.
    ///
    /// # Errors
    /// The upstream does not respond, or the client aborted its body.
    pub async fn send(
        &self,
        connection: &ClientConnection,
        origin: &Origin,
        request: Request,
    ) -> Result<Response<UpstreamBody>, Error> {
        let attempts = CredentialAttempts::new(self.provider.credentials.as_ref());
        if !attempts.has_next() {
            return self
                .send_once(connection, origin, request.map(RequestBody::Api), &attempts)
                .await;
        }
        // Boxed: the future is large and rarely used.
        Box::pin(self.send_with_each_credential(connection, origin, request, attempts)).await
    }

    /// Sends a request with each of the known credentials in turn, until they are accepted.
    async fn send_with_each_credential(
        &self,
        connection: &ClientConnection,
        origin: &Origin,
        request: Request,
        mut attempts: CredentialAttempts,
    ) -> Result<Response<UpstreamBody>, Error> {
        let (parts, body) = request.into_parts();
        let mut buffered = Bytes::new();
        let mut _permit = None;
        if !body.is_end_stream() {
            _permit = self
                .replay_permits
                .try_acquire()
                .ok()
                .filter(|_| fits_replay_limit(&parts.headers));
            if _permit.is_none() {
                // If this fails, so does the request, and the client receives its error.
                let _ = self.provider.try_credentials().await;
                let attempts = CredentialAttempts::new(self.provider.credentials.as_ref());
                let request = Request::from_parts(parts, RequestBody::Api(body));
                return self.send_once(connection, origin, request, &attempts).await;
            }
            buffered = read_body(body, MAX_BODY).await?;
        }
        loop {
            let body = Some(buffered.clone()).filter(|body| !body.is_empty());
            let request = Request::from_parts(parts.clone(), RequestBody::Full(body));
            let response = self.send_once(connection, origin, request, &attempts).await?;
            if !attempts.advance(response.status()) {
                return Ok(response);
            }
        }
    }

    async fn send_once(
        &self,
        connection: &ClientConnection,
        origin: &Origin,
        mut request: http::Request<RequestBody>,
        attempts: &CredentialAttempts,
    ) -> Result<Response<UpstreamBody>, Error> {
        if let Some(authorization) = attempts.header() {
            request.headers_mut().insert(AUTHORIZATION, authorization);
        }
        let context = RequestContext {
            client_address: &connection.forwarded_for,
            deadlines: connection.deadlines.exchange(),
            started_at: Instant::now(),
            timeout: self.timeouts.upstream,
            is_client_request: true,
        };
        Ok(forward(&self.client, origin, request, context).await?.response)
    }
}

/// Returns whether `headers` declare a body of at most [`MAX_BODY`] bytes.
fn fits_replay_limit(headers: &HeaderMap) -> bool {
    let length = headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok());
    length.and_then(|length| length.parse().ok()).is_some_and(|length: usize| length <= MAX_BODY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_buffered_if_its_declared_length_is_short() {
        let check = |length: Option<&'static str>, expect: bool| {
            let length =
                length.map(|value| (CONTENT_LENGTH, http::HeaderValue::from_static(value)));
            assert_eq!(fits_replay_limit(&length.into_iter().collect()), expect);
        };
        check(Some("0"), true);
        check(Some("1048576"), true);
        check(Some("1048577"), false);
        check(Some("99999999999999999999999"), false);
        check(Some("-1"), false);
        check(None, false);
    }
}
