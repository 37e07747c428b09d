//! HTTP mode: forwards a call to a replica, and its response to the client.

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

use crate::backend::Invocation;
use crate::process::invocation::{InvocationError, set_duration_header};
use crate::process::launcher::ProcessTasks;
use crate::process::pool::ReplicaPermit;
use crate::process::replica_client::{ReplicaRequest, SendError};
use crate::process::workload::Workload;
use crate::signals;

/// Timeout of a function without `exec_timeout`: long enough to be no limit in practice.
const NO_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 3600);

/// Maximum number of replicas that are tried for one call.
const MAX_REPLICA_ATTEMPTS: usize = 8;

/// Forwards the call to the replica of `permit`. If the connection is refused, the function has received nothing of the
/// call, and another replica from `next_permit` is tried.
///
/// `exec_timeout` limits the wait for the response head, and then the time between two chunks of the body: a stream
/// that keeps sending data is not limited.
pub(super) async fn invoke(
    tasks: &ProcessTasks,
    workload: &Workload,
    mut permit: ReplicaPermit,
    next_permit: impl Fn(&ReplicaPermit) -> Result<ReplicaPermit, InvocationError>,
    invocation: Invocation,
) -> Result<Response, InvocationError> {
    let function = &workload.function;
    let started = invocation.started;
    let invalid = |error: anyhow::Error| InvocationError::InvalidResponse(function.clone(), error);
    let request = replica_request(invocation, &permit).map_err(|error| invalid(error.into()))?;
    let mut request = ReplicaRequest::new(request, permit.address).map_err(invalid)?;
    let exec_timeout = workload.spec.exec_timeout.unwrap_or(NO_TIMEOUT);
    let sending = timeout(exec_timeout, async {
        for _ in 0..MAX_REPLICA_ATTEMPTS {
            match request.send(tasks, permit.address).await {
                Ok(response) => return Ok(response),
                Err(SendError::Refused) => permit = next_permit(&permit)?,
                Err(SendError::Other(error)) => return Err(invalid(error)),
            }
        }
        Err(InvocationError::NotReady(function.clone()))
    });
    let response =
        sending.await.map_err(|_| InvocationError::Timeout(function.clone(), exec_timeout))?;
    let mut response = response?;
    signals::remove_reserved(response.headers_mut());
    let mut response = response.map(|body| {
        let idle_timer = Box::pin(tokio::time::sleep(exec_timeout));
        Body::new(BodyWithPermit { body, idle_timer, exec_timeout, permit: Some(permit) })
    });
    set_duration_header(&mut response, started.elapsed());
    Ok(response)
}

fn replica_request(
    invocation: Invocation,
    permit: &ReplicaPermit,
) -> Result<Request<Body>, http::Error> {
    let path_and_query = match invocation.head.uri.query() {
        Some(query) => format!("{}?{query}", invocation.path),
        None => invocation.path,
    };
    let mut request = Request::from_parts(invocation.head, invocation.body);
    *request.uri_mut() = Uri::builder().path_and_query(path_and_query).build()?;
    *request.version_mut() = Version::HTTP_11;
    if !request.headers().contains_key(HOST) {
        let host = HeaderValue::from_str(&permit.address.to_string())?;
        request.headers_mut().insert(HOST, host);
    }
    Ok(request)
}

/// A response body that holds the permit of its replica until it ends or is dropped.
struct BodyWithPermit {
    body: Body,
    idle_timer: Pin<Box<Sleep>>,
    exec_timeout: Duration,
    permit: Option<ReplicaPermit>,
}

impl http_body::Body for BodyWithPermit {
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
                    signals::remove_reserved(trailers);
                }
                // Releases the permit before the response ends: the client's next call must not be rejected.
                if !matches!(frame, Some(Ok(_))) || self.body.is_end_stream() {
                    self.permit = None;
                }
                let next = Instant::now() + self.exec_timeout;
                self.idle_timer.as_mut().reset(next);
                Poll::Ready(frame)
            }
            Poll::Pending => self.idle_timer.as_mut().poll(cx).map(|()| {
                let reason = format!("the function sent no data for {:?}", self.exec_timeout);
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
