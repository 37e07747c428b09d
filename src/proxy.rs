//! A caller's request, made one to an upstream; the upstream's answer, made one to the caller. Nothing is collected.

pub mod body;
pub mod client;
mod guard;
pub mod headers;
mod link;
mod stream;
pub mod tunnel;
mod upload;
pub mod upstream_body;
mod wire;

use std::sync::Arc;
use std::time::{Duration, Instant};

use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use hyper::upgrade::OnUpgrade;

use crate::proxy::body::RequestBody;
use crate::proxy::client::{Client, Error, Origin};
use crate::proxy::tunnel::Tunnel;
use crate::proxy::upload::Upload;
use crate::proxy::upstream_body::UpstreamBody;
use crate::watch::Watch;

/// What answers for as long as it has something to say: its deadline is one for each pause.
const STREAMS: [&str; 5] = [
    "text/event-stream",
    "application/x-ndjson",
    "application/ndjson",
    "application/stream+json",
    "application/grpc",
];

/// On whose behalf a request is made, and how long it may take.
#[derive(Clone, Copy)]
pub struct Errand<'a> {
    /// The caller's address, for `X-Forwarded-For`.
    pub peer: &'a HeaderValue,
    pub watch: &'a Arc<Watch>,
    pub began: Instant,
    /// From `began` to the last byte; for a stream the longest pause.
    pub timeout: Duration,
}

/// A caller's request as it will be sent.
pub struct Prepared {
    upload: Upload,
    /// The caller's connection, if it wants to change protocols.
    upgrade: Option<OnUpgrade>,
}

/// An answer on its way to the caller; with a tunnel if both sides change protocols.
pub struct Forwarded {
    pub answer: Response<UpstreamBody>,
    pub tunnel: Option<Tunnel>,
}

/// Makes `request` one to `origin`, at the same path and query. Its time runs from now on.
///
/// # Errors
/// `client::Error::Target` when the path is too long.
pub fn prepare(
    origin: &Origin,
    mut request: Request<RequestBody>,
    errand: Errand<'_>,
) -> Result<Prepared, Error> {
    errand.watch.call_until(errand.began + errand.timeout);
    let wanted = headers::to_upstream(request.headers_mut(), &origin.host, errand.peer);
    let upgrade = wanted.is_some().then(|| hyper::upgrade::on(&mut request));
    *request.uri_mut() = origin.target(request.uri())?;
    let (head, body) = request.into_parts();
    Ok(Prepared { upload: Upload::new(&head, body), upgrade })
}

/// Sends what was prepared to `origin`, and returns with the head of the answer.
///
/// # Errors
/// `client::Error` when there is none; its text can be shown to the caller.
pub async fn send(
    client: &Arc<Client>,
    origin: &Origin,
    prepared: Prepared,
    errand: Errand<'_>,
) -> Result<Forwarded, Error> {
    let Prepared { upload, upgrade } = prepared;
    let mut answer = client.carry(origin, upload, errand.watch).await?;
    let switches = answer.status() == StatusCode::SWITCHING_PROTOCOLS;
    headers::to_caller(answer.headers_mut(), switches);
    let tunnel = match upgrade {
        // One that changes in the middle of the request would take its rest for the new protocol.
        Some(caller) if switches && answer.body().is_request_sent() => {
            Some(Tunnel::new(caller, &mut answer, errand.timeout))
        }
        _ if switches => return Err(Error::Unasked),
        _ => None,
    };
    if is_stream(answer.headers()) {
        answer.body_mut().bound_pauses(errand.timeout);
    }
    Ok(Forwarded { answer, tunnel })
}

/// Prepares `request` and sends it.
///
/// # Errors
/// Those of both.
pub async fn forward(
    client: &Arc<Client>,
    origin: &Origin,
    request: Request<RequestBody>,
    errand: Errand<'_>,
) -> Result<Forwarded, Error> {
    send(client, origin, prepare(origin, request, errand)?, errand).await
}

fn is_stream(headers: &HeaderMap) -> bool {
    let Some(content_type) = headers.get(CONTENT_TYPE) else { return false };
    let content_type = content_type.as_bytes();
    STREAMS.iter().any(|stream| {
        content_type.get(..stream.len()).is_some_and(|start| {
            start.eq_ignore_ascii_case(stream.as_bytes())
                && matches!(content_type.get(stream.len()), None | Some(b';' | b' ' | b'+' | b'-'))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(content_type: &'static str, expect: bool) {
        let headers =
            HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(content_type))]);
        assert_eq!(is_stream(&headers), expect, "{content_type}");
    }

    #[test]
    fn streams_are_known_by_their_content_type() {
        check("text/event-stream", true);
        check("Text/Event-Stream; charset=utf-8", true);
        check("application/x-ndjson", true);
        check("application/grpc+proto", true);
        check("application/json", false);
        check("text/event-streams", false);
        assert!(!is_stream(&HeaderMap::new()));
    }
}
