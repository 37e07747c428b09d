//! HTTP mode: a call is passed on to a replica, and its answer passed back.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::http::header::HOST;
use axum::http::{HeaderValue, Request, Uri, Version};
use axum::response::Response;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::time::{Instant, Sleep, timeout};

use crate::provider::process::call::{Call, CallError, note_duration};
use crate::provider::process::replica::Seat;
use crate::provider::process::replica_client::{Failure, ReplicaRequest};
use crate::provider::process::runner::RunnerTasks;
use crate::provider::process::workload::Workload;
use crate::provider::signals;

/// An answer that never begins nor goes on, when its function sets no limit. Long enough to be no limit in practice.
const UNLIMITED: Duration = Duration::from_secs(365 * 24 * 3600);

/// How many replicas one call is offered to, at most.
const MAX_OFFERS: usize = 8;

/// Passes `call` on to the replica of `seat`. Where nobody accepts connections, nothing of the call has reached a
/// function: it goes to `another` replica instead.
///
/// `exec_timeout` bounds the wait for the answer's head, and then between two pieces of its body: a stream that keeps
/// flowing may go on.
pub(super) async fn call(
    tasks: &RunnerTasks,
    workload: &Workload,
    mut seat: Seat,
    another: impl Fn(&Seat) -> Result<Seat, CallError>,
    call: Call,
) -> Result<Response, CallError> {
    let function = &workload.function;
    let started = call.started;
    let invalid = |error: anyhow::Error| CallError::Replica(function.clone(), error);
    let request = request(call, &seat).map_err(|error| invalid(error.into()))?;
    let mut request = ReplicaRequest::new(request, seat.address).map_err(invalid)?;
    let patience = workload.spec.exec_timeout.unwrap_or(UNLIMITED);
    let sending = timeout(patience, async {
        for _ in 0..MAX_OFFERS {
            match request.send(tasks, seat.address).await {
                Ok(response) => return Ok(response),
                Err(Failure::Refused) => seat = another(&seat)?,
                Err(Failure::Other(error)) => return Err(invalid(error)),
            }
        }
        Err(CallError::NotReady(function.clone()))
    });
    let response = sending.await.map_err(|_| CallError::Timeout(function.clone(), patience))?;
    let mut response = response?;
    signals::remove(response.headers_mut());
    let mut response = response.map(|body| {
        let silence = Box::pin(tokio::time::sleep(patience));
        Body::new(Seated { body, silence, patience, seat: Some(seat) })
    });
    note_duration(&mut response, started.elapsed());
    Ok(response)
}

fn request(call: Call, seat: &Seat) -> Result<Request<Body>, http::Error> {
    let path_and_query = match call.head.uri.query() {
        Some(query) => format!("{}?{query}", call.path),
        None => call.path,
    };
    let mut request = Request::from_parts(call.head, call.body);
    *request.uri_mut() = Uri::builder().path_and_query(path_and_query).build()?;
    *request.version_mut() = Version::HTTP_11;
    if !request.headers().contains_key(HOST) {
        let host = HeaderValue::from_str(&seat.address.to_string())?;
        request.headers_mut().insert(HOST, host);
    }
    Ok(request)
}

/// An answer's body. Its replica is busy with it until it has ended or is dropped.
struct Seated {
    body: Body,
    silence: Pin<Box<Sleep>>,
    patience: Duration,
    seat: Option<Seat>,
}

impl http_body::Body for Seated {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        match Pin::new(&mut self.body).poll_frame(cx) {
            Poll::Ready(mut frame) => {
                if let Some(Ok(frame)) = &mut frame
                    && let Some(trailers) = frame.trailers_mut()
                {
                    signals::remove(trailers);
                }
                // Before the caller learns of the end: its next call must find room.
                if !matches!(frame, Some(Ok(_))) || self.body.is_end_stream() {
                    self.seat = None;
                }
                let next = Instant::now() + self.patience;
                self.silence.as_mut().reset(next);
                Poll::Ready(frame)
            }
            Poll::Pending => self.silence.as_mut().poll(cx).map(|()| {
                let reason = format!("the function was silent for {:?}", self.patience);
                Some(Err(axum::Error::new(std::io::Error::other(reason))))
            }),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
