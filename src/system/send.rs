//! A client's request on its way to the provider, with this gateway's credentials.
//!
//! While the provider may not have read a change of the credentials, the request may have to be sent with others. Then
//! its body is kept; one that is too long for that is sent once, after a request of the gateway's own has shown which
//! credentials are accepted.

use std::time::Instant;

use axum::extract::Request;
use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_LENGTH};
use http::{HeaderMap, Response};
use http_body::Body as _;

use crate::auth::tries::Tries;
use crate::error::Error;
use crate::proxy::body::RequestBody;
use crate::proxy::client::Origin;
use crate::proxy::upstream_body::UpstreamBody;
use crate::proxy::{Errand, forward};
use crate::serve::caller::Caller;
use crate::system::{Api, MAX_BODY, read};

/// How many bodies of at most [`MAX_BODY`] bytes may be kept at a time, over all threads.
pub const MAX_KEPT: usize = 64;

impl Api {
    /// Sends a client's request on to `origin`, with this gateway's credentials.
    pub async fn send(
        &self,
        caller: &Caller,
        origin: &Origin,
        request: Request,
    ) -> Result<Response<UpstreamBody>, Error> {
        let tries = Tries::of(self.provider.credentials.as_ref());
        if !tries.has_next() {
            return self.send_once(caller, origin, request.map(RequestBody::Api), &tries).await;
        }
        // On the heap: it is rare, and large.
        Box::pin(self.send_with_each(caller, origin, request, tries)).await
    }

    /// Sends a request with one of the known credentials after the other, until they are accepted.
    async fn send_with_each(
        &self,
        caller: &Caller,
        origin: &Origin,
        request: Request,
        mut tries: Tries,
    ) -> Result<Response<UpstreamBody>, Error> {
        let (parts, body) = request.into_parts();
        let mut kept = Bytes::new();
        let mut _room = None;
        if !body.is_end_stream() {
            _room = self.kept.try_acquire().ok().filter(|_| is_short(&parts.headers));
            if _room.is_none() {
                // If that fails, the request meets the same, and its client is told.
                let _ = self.provider.try_credentials().await;
                let tries = Tries::of(self.provider.credentials.as_ref());
                let request = Request::from_parts(parts, RequestBody::Api(body));
                return self.send_once(caller, origin, request, &tries).await;
            }
            kept = read(body, MAX_BODY).await?;
        }
        loop {
            let body = Some(kept.clone()).filter(|body| !body.is_empty());
            let request = Request::from_parts(parts.clone(), RequestBody::Full(body));
            let answer = self.send_once(caller, origin, request, &tries).await?;
            if !tries.again(answer.status()) {
                return Ok(answer);
            }
        }
    }

    async fn send_once(
        &self,
        caller: &Caller,
        origin: &Origin,
        mut request: http::Request<RequestBody>,
        tries: &Tries,
    ) -> Result<Response<UpstreamBody>, Error> {
        if let Some(authorization) = tries.header() {
            request.headers_mut().insert(AUTHORIZATION, authorization);
        }
        let errand = Errand {
            peer: &caller.forwarded_for,
            watch: &caller.watch,
            began: Instant::now(),
            timeout: self.timeouts.upstream,
            is_clients: true,
        };
        Ok(forward(&self.client, origin, request, errand).await?.answer)
    }
}

/// Whether `headers` say that a body has at most [`MAX_BODY`] bytes.
fn is_short(headers: &HeaderMap) -> bool {
    let length = headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok());
    length.and_then(|length| length.parse().ok()).is_some_and(|length: usize| length <= MAX_BODY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_kept_if_it_says_that_it_is_short() {
        let check = |length: Option<&'static str>, expect: bool| {
            let length = length.map(|it| (CONTENT_LENGTH, http::HeaderValue::from_static(it)));
            assert_eq!(is_short(&length.into_iter().collect()), expect);
        };
        check(Some("0"), true);
        check(Some("1048576"), true);
        check(Some("1048577"), false);
        check(Some("99999999999999999999999"), false);
        check(Some("-1"), false);
        check(None, false);
    }
}
