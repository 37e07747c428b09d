//! One attempt at a queued call: the same way to the function as any other call, and the same numbers.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use http::header::{HOST, RETRY_AFTER, USER_AGENT};
use http::{HeaderMap, HeaderValue, Method, Request, Response};
use http_body::Body;
use http_body_util::BodyExt;
use tokio::time::timeout_at as in_time;

use crate::activator::Activator;
use crate::activator::unavailable::{Hop, MAX_SENDS, RetrySafety, UnavailableSignal};
use crate::error::Error;
use crate::metrics::calls::{self, Outcome, Shard};
use crate::proxy::body::RequestBody;
use crate::proxy::client;
use crate::proxy::client::{Client, Origin};
use crate::proxy::ending::Ending;
use crate::proxy::headers::to_caller;
use crate::proxy::upstream_body::{BodyFailure, UpstreamBody};
use crate::queue::MemoryPermit;
use crate::queue::call::QueuedCall;
use crate::queue::memory::{BodyBudget, BodyBuffer};
use crate::queue::status::StoredResponse;
use crate::trace::context::Context;
use crate::watch::Watch;
use crate::worker::policies::Policies;
use crate::worker::retry::parse_retry_after;

/// The most of an answer that a callback is told.
pub const MAX_TOLD: usize = 16 << 20;
/// A response for which there is no room for this long in all, or for half of the time that is left, is cut off.
const PATIENCE: Duration = Duration::from_secs(10);
const PRODUCT: HeaderValue =
    HeaderValue::from_static(concat!("gateway-worker/", env!("CARGO_PKG_VERSION")));

/// What calls functions.
pub struct Caller {
    pub client: Arc<Client>,
    /// Where functions are called.
    pub origin: Origin,
    pub calls: Arc<Shard>,
    /// From the first byte sent to the last byte back.
    pub timeout: Duration,
    /// Wakes functions, if that is to be done.
    pub scaling: Option<Arc<Activator>>,
    /// The memory that responses share with all other bodies of queued calls.
    pub budget: BodyBudget,
}

/// How an attempt ended.
pub struct Attempt {
    /// `None`: the function was out of reach, or broke off. A change of protocols that was not asked for is 502.
    pub status: Option<u16>,
    pub headers: HeaderMap,
    pub body: Bytes,
    /// What the body takes of the memory for bodies.
    pub room: Option<MemoryPermit>,
    /// The body was longer, or there was no room for all of it.
    pub truncated: bool,
    pub took: Duration,
    pub retry_after: Option<Duration>,
    /// Why there is no answer.
    pub reason: Option<String>,
}

impl Caller {
    /// Makes `call`; reads at most `keeps` bytes of the answer, and lets the rest go by.
    ///
    /// `context` is the span that the function belongs to, if there is one. `policies` say how often a call may be
    /// executed, should it come to that.
    pub async fn make(
        &self,
        call: &QueuedCall,
        keeps: usize,
        context: Option<Context>,
        policies: &Policies,
    ) -> Attempt {
        let began = Instant::now();
        let label = call.function.to_string();
        let Some(mut counted) = self.calls.begin(&label, began) else {
            return Attempt::failed("the function's name is not valid".to_owned(), began);
        };
        let attempt =
            match self.exchange(call, &label, &mut counted, keeps, context, policies).await {
                Ok(attempt) => attempt,
                Err(error) => {
                    counted.set_status(error.status());
                    // In all other cases the function was out of reach, or broke off.
                    let is_answer = match &error {
                        Error::NoSuchFunction(_) => true,
                        Error::Upstream(error) => Ending::of_error(error) == Ending::Unasked,
                        _ => false,
                    };
                    let status = is_answer.then(|| error.status().as_u16());
                    Attempt { status, ..Attempt::failed(error.to_string(), began) }
                }
            };
        counted.finish(Outcome::Complete, Instant::now());
        attempt
    }

    /// Waits for the function where that is to be done, sends the call, and sends it again if it met nobody.
    ///
    /// How often a call is executed is for the retry policy to say: within one attempt it is sent at most
    /// [`MAX_SENDS`] times, and never more often than the policy has attempts.
    async fn exchange(
        &self,
        call: &QueuedCall,
        label: &str,
        counted: &mut calls::InFlightRecorder,
        keeps: usize,
        context: Option<Context>,
        policies: &Policies,
    ) -> Result<Attempt, Error> {
        let began = counted.began;
        let mut sends = 0;
        let mut cold_start =
            self.scaling.as_ref().map(|scaling| scaling.start_wait(&call.function));
        if let Some(cold_start) = &mut cold_start
            // A call that has one attempt must not spend it on a function that only seems to be ready.
            && (!counted.is_warm() || call.options.max_attempts == Some(1))
        {
            cold_start.wait_ready(|| counted.confirm(&self.calls)).await?;
        }
        loop {
            let request = self.request(call, label, context)?;
            let watch = Arc::new(Watch::new());
            let sent_at = Instant::now();
            let until = sent_at + self.timeout;
            watch.call_until(until);
            let sent = in_time(until.into(), self.client.send(&self.origin, request, &watch));
            let sent = sent.await.unwrap_or(Err(client::Error::Timeout));
            let ending = match &sent {
                Ok(answer) => Ending::of_head(answer, false),
                Err(error) => Ending::of_error(error),
            };
            sends += u32::from(ending != Ending::Unreached);
            if let (Some(cold_start), Some(fault)) =
                (&mut cold_start, UnavailableSignal::from_ending(ending, Hop::Provider))
            {
                let repeat = match fault {
                    UnavailableSignal::ServiceUnavailable
                        if sends < max_sends(call, policies).await =>
                    {
                        RetrySafety::IfNotDelivered
                    }
                    UnavailableSignal::ConnectFailed(_) => RetrySafety::IfNotDelivered,
                    UnavailableSignal::ServiceUnavailable | UnavailableSignal::BadGateway => {
                        RetrySafety::None
                    }
                };
                if cold_start.should_retry(fault, repeat, sent_at).await? {
                    continue;
                }
            }
            let answer = sent?;
            if ending == Ending::Unasked {
                return Err(Error::Upstream(client::Error::Unasked));
            }
            if counted.is_unregistered() && ending.confirms_existence() {
                counted.confirm(&self.calls);
            }
            counted.set_status(answer.status());
            // Most of the time is the function's.
            let patience = PATIENCE.min(until.saturating_duration_since(Instant::now()) / 2);
            let buffer = BodyBuffer::new(&self.budget);
            let reading = read(answer, keeps, began, buffer, patience);
            let read = in_time(until.into(), reading).await;
            return read.unwrap_or(Err(Error::Upstream(client::Error::Timeout)));
        }
    }

    fn request(
        &self,
        call: &QueuedCall,
        label: &str,
        context: Option<Context>,
    ) -> Result<Request<RequestBody>, Error> {
        let body = Some(call.body.clone()).filter(|body| !body.is_empty());
        let mut request = Request::new(RequestBody::Full(body));
        *request.method_mut() = Method::POST;
        let target = format!("/function/{label}{}", call.target);
        let target = target.parse().map_err(|_| Error::NoSuchPath)?;
        *request.uri_mut() = self.origin.target(&target).map_err(client::Error::Target)?;
        let mut headers = call.function_headers();
        headers.insert(HOST, self.origin.host.clone());
        headers.insert(USER_AGENT, PRODUCT);
        if let Some(context) = context {
            context.inject(&mut headers, Context::extract(&call.headers).is_some());
        }
        *request.headers_mut() = headers;
        Ok(request)
    }
}

/// How often one attempt at `call` may send it.
async fn max_sends(call: &QueuedCall, policies: &Policies) -> u32 {
    match call.options.max_attempts {
        Some(1) => 1,
        most => policies.of(call).await.at_most(most).attempts.min(MAX_SENDS),
    }
}

async fn read(
    answer: Response<UpstreamBody>,
    keeps: usize,
    began: Instant,
    mut kept: BodyBuffer<'_>,
    patience: Duration,
) -> Result<Attempt, Error> {
    let (mut head, mut body) = answer.into_parts();
    let (mut truncated, mut has_room, mut deadline) = (false, true, None);
    if let Some(length) = body.size_hint().exact().and_then(|length| usize::try_from(length).ok())
        && length > 0
    {
        // Of many responses that come at once, some are read whole before the others.
        let until = *deadline.insert(Instant::now() + patience);
        kept.reserve_expected(length.min(keeps), until.into()).await;
    }
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|failure: BodyFailure| Error::ResponseBody(failure))?;
        let Ok(data) = frame.into_data() else { continue };
        let room = keeps - kept.length();
        truncated |= data.len() > room;
        let data = &data[..data.len().min(room)];
        if !has_room {
            truncated |= !data.is_empty();
            continue;
        }
        if !kept.try_add(data) {
            // The call was executed, and will not be executed again because of its response.
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + patience);
            has_room = kept.add_before(data, deadline.into()).await;
            truncated |= !has_room;
        }
    }
    let (kept, body_room) = kept.finish();
    to_caller(&mut head.headers, false);
    let retry_after = head.headers.get(RETRY_AFTER);
    let retry_after = retry_after.and_then(|value| parse_retry_after(value, SystemTime::now()));
    Ok(Attempt {
        status: Some(head.status.as_u16()),
        headers: head.headers,
        body: kept,
        room: body_room,
        truncated,
        took: began.elapsed(),
        retry_after,
        reason: None,
    })
}

impl Attempt {
    fn failed(reason: String, began: Instant) -> Self {
        Self {
            status: None,
            headers: HeaderMap::new(),
            body: Bytes::new(),
            room: None,
            truncated: false,
            took: began.elapsed(),
            retry_after: None,
            reason: Some(reason),
        }
    }

    /// What becomes of a call that is not made: it has expired.
    pub fn expired() -> Self {
        let reason = "it was not made before it expired".to_owned();
        Self { status: Some(504), ..Self::failed(reason, Instant::now()) }
    }

    /// What becomes of one whose body is not there any more.
    pub fn lost() -> Self {
        Self { status: Some(500), ..Self::failed("its body is lost".to_owned(), Instant::now()) }
    }

    /// What is kept of the answer, if there was one: at most `most` bytes of its body.
    pub fn into_answer(self, most: usize) -> Option<StoredResponse> {
        let status = self.status?;
        let text = |value: &HeaderValue| value.to_str().ok().map(str::to_owned);
        let headers = self.headers.iter();
        let headers = headers.filter_map(|(n, v)| Some((n.as_str().to_owned(), text(v)?)));
        Some(StoredResponse {
            status,
            headers: headers.collect(),
            truncated: self.truncated || self.body.len() > most,
            // A part of it would keep all of it in memory.
            body: match self.body.get(..most) {
                Some(start) => Bytes::copy_from_slice(start),
                None => self.body,
            },
        })
    }
}
