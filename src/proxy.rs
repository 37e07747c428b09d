//! A caller's request, made one to an upstream; the upstream's answer, made one to the caller. Nothing is collected.

pub mod body;
mod buffers;
pub mod client;
pub mod codings;
mod dial;
pub mod ending;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
pub mod guard;
pub mod headers;
mod link;
pub mod outgoing;
mod sniff;
mod stream;
pub mod tunnel;
mod upload;
pub mod upstream_body;
mod wire;

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http::header::{CONTENT_ENCODING, CONTENT_TYPE};
use http::{HeaderName, HeaderValue, Request, Response, StatusCode, Version};
use hyper::upgrade::OnUpgrade;

use crate::call_id::RequestIds;
use crate::proxy::body::{BodyError, RequestBody};
use crate::proxy::client::{Client, Error, Origin};
use crate::proxy::ending::Ending;
use crate::proxy::tunnel::Tunnel;
use crate::proxy::upload::Upload;
use crate::proxy::upstream_body::UpstreamBody;
use crate::proxy::wire::request::{path_and_query, write_header, write_start};
use crate::watch::Watch;

/// What answers for as long as it has something to say: its deadline is one for each pause.
const STREAMS: [&str; 5] = [
    "text/event-stream",
    "application/x-ndjson",
    "application/ndjson",
    "application/stream+json",
    "application/grpc",
];

/// The most times that one request is sent, should it turn out that nobody has executed it. A connection that fails
/// before anything is written counts as nothing sent.
pub const MAX_SENDS: u32 = 3;

/// On whose behalf a request is made, and how long it may take.
#[derive(Clone, Copy)]
pub struct Errand<'a> {
    /// The caller's address, for `X-Forwarded-For`.
    pub peer: &'a HeaderValue,
    pub watch: &'a Arc<Watch>,
    pub began: Instant,
    /// From `began` to the last byte; for a stream the longest pause.
    pub timeout: Duration,
    /// Whether it is the client's own request: then interim responses to it are for the client.
    pub is_clients: bool,
}

/// A caller's request as it will be sent.
pub struct Prepared {
    /// Gone while the request is under way.
    /// Boxed: it is moved several times before it is sent.
    upload: Box<Upload>,
    /// The caller's connection, if it wants to change protocols.
    upgrade: Option<OnUpgrade>,
    idempotent: bool,
}

impl Prepared {
    /// Whether the request's method promises that twice is as once.
    pub fn is_idempotent(&self) -> bool {
        self.idempotent
    }

    /// Keeps the request to be sent once more, for as long as it has no more than `most` bytes.
    pub fn keep(&mut self, most: usize) {
        self.upload.keep(most);
    }

    /// How long what is left of the body is, if that is known.
    pub fn body_length(&self) -> Option<u64> {
        self.upload.body_length()
    }

    /// Takes in what comes of the body before it can be sent, as far as it is kept. Ready when there is no more to do.
    ///
    /// # Errors
    /// Why the body does not come.
    pub fn poll_ahead(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        self.upload.poll_ahead(cx)
    }

    /// Takes back the request that `answer` answers, to send it once more. Whether that can be done.
    pub fn take_back(&mut self, answer: &mut Response<UpstreamBody>) -> bool {
        if !answer.body().can_give_back_request() {
            return false;
        }
        match answer.body_mut().give_back_request() {
            Some(upload) => *self.upload = upload,
            None => return false,
        }
        true
    }

    /// Whether the request that `answer` answers could be taken back.
    pub fn can_take_back(answer: &Response<UpstreamBody>) -> bool {
        answer.body().can_give_back_request()
    }
}

/// An answer on its way to the caller; with a tunnel if both sides change protocols.
pub struct Forwarded {
    pub answer: Response<UpstreamBody>,
    /// What its head shows.
    pub ending: Ending,
    pub tunnel: Option<Tunnel>,
}

/// Makes `request` one to `origin`, at the same path and query. Its time runs from now on.
///
/// # Errors
/// `client::Error::Target` when the path is too long.
pub fn prepare(
    origin: &Origin,
    mut request: Request<RequestBody>,
    ids: Option<&RequestIds>,
    errand: Errand<'_>,
) -> Result<Prepared, Error> {
    errand.watch.call_until(errand.began + errand.timeout);
    if !origin.path().is_empty() {
        origin.target(request.uri())?;
    }
    let body = std::mem::replace(request.body_mut(), RequestBody::empty());
    let (method, headers) = (request.method(), request.headers());
    let mut wanted = None;
    let mut upload = Box::new(Upload::write(method, headers, body, |out| {
        write_start(out, method, [origin.path(), path_and_query(request.uri())]);
        let put = |name: &HeaderName, value: &HeaderValue| write_header(out, name, value);
        wanted = headers::to_upstream(headers, &origin.host, errand.peer, ids, put);
    }));
    if !errand.is_clients || request.version() < Version::HTTP_11 {
        // RFC 9110, 15.2.
        upload.drop_interim();
    }
    let idempotent = method.is_idempotent();
    let upgrade = wanted.map(|_| hyper::upgrade::on(&mut request));
    Ok(Prepared { upload, upgrade, idempotent })
}

/// Sends what was prepared to `origin`, and returns with the head of the answer.
///
/// # Errors
/// `client::Error` when there is none; its text can be shown to the caller. After one that `is_connect`, all that was
/// prepared is still there, and can be sent once more.
pub async fn send(
    client: &Arc<Client>,
    origin: &Origin,
    prepared: &mut Prepared,
    errand: Errand<'_>,
) -> Result<Forwarded, Error> {
    let mut answer = client.carry(origin, &mut prepared.upload, errand.watch).await?;
    let mut wanted = None;
    if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
        // An upstream that changes in the middle of the request would take its rest for the new protocol.
        wanted = prepared.upgrade.take().filter(|_| answer.body().is_request_sent());
    }
    let ending = Ending::of_head(&answer, wanted.is_some());
    if ending == Ending::Unasked {
        return Err(Error::Unasked);
    }
    let tunnel = wanted.map(|caller| Tunnel::new(caller, &mut answer, errand.timeout));
    match answer.headers().get(CONTENT_TYPE) {
        Some(content_type) if is_stream(content_type) => {
            answer.body_mut().bound_pauses(errand.timeout);
        }
        Some(_) => {}
        None => name_content(&mut answer),
    }
    Ok(Forwarded { answer, ending, tunnel })
}

/// Prepares `request`, which is not a call, and sends it.
///
/// # Errors
/// Those of `send`.
pub async fn forward(
    client: &Arc<Client>,
    origin: &Origin,
    request: Request<RequestBody>,
    errand: Errand<'_>,
) -> Result<Forwarded, Error> {
    send(client, origin, &mut prepare(origin, request, None, errand)?, errand).await
}

/// Says what an answer is that does not say so itself, if the beginning of its content came along with its head.
fn name_content(answer: &mut Response<UpstreamBody>) {
    if answer.headers().contains_key(CONTENT_ENCODING) {
        return;
    }
    let content_type = match answer.body().beginning() {
        [] => return,
        beginning => sniff::content_type(beginning),
    };
    answer.headers_mut().insert(CONTENT_TYPE, content_type);
}

fn is_stream(content_type: &HeaderValue) -> bool {
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
        let value = HeaderValue::from_static(content_type);
        assert_eq!(is_stream(&value), expect, "{content_type}");
    }

    #[test]
    fn streams_are_known_by_their_content_type() {
        check("text/event-stream", true);
        check("Text/Event-Stream; charset=utf-8", true);
        check("application/x-ndjson", true);
        check("application/grpc+proto", true);
        check("application/json", false);
        check("text/event-streams", false);
    }
}
