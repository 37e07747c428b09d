//! Responses that are sent before the request body has been read to its end. The connection cannot be reused then, and
//! the response says so (RFC 9112, 9.6).

use std::future::poll_fn;
use std::task::Poll;

use http::{Response, StatusCode};

use crate::response_body::{BodySource, TrackedBody};
use gateway_http::deadlines::{BodyState, ConnectionDeadlines};

/// Returns whether `response` must have `Connection: close`, because the rest of the request will not be read. Call
/// this only if the request body has not been read to its end.
pub async fn must_close(
    deadlines: &ConnectionDeadlines,
    response: &mut Response<TrackedBody>,
) -> bool {
    // In a 101, `Connection` names the new protocol.
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        return false;
    }
    if deadlines.exchange().body_state() == BodyState::Unread {
        // hyper notices in its next poll that the body is not wanted. If the rest has been received, it reads it;
        // otherwise it adds `Connection: close` itself.
        let mut polls = 0;
        poll_fn(|cx| {
            if polls > 0 {
                return Poll::Ready(());
            }
            polls += 1;
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }
    match deadlines.exchange().body_state() {
        BodyState::Complete | BodyState::Unread => false,
        BodyState::Aborted => true,
        // The body is still being forwarded. An error response, or a response that is complete, will not wait for the
        // rest.
        BodyState::Reading => is_complete(response),
    }
}

/// Returns whether a response that precedes the end of its request is final.
fn is_complete(response: &Response<TrackedBody>) -> bool {
    let status = response.status();
    status.is_client_error() || status.is_server_error() || response.body().is_fully_received()
}

impl TrackedBody {
    /// Returns whether the whole body has been received from its source.
    fn is_fully_received(&self) -> bool {
        match &self.source {
            BodySource::Upstream(body) => body.is_fully_received(),
            BodySource::Full(_) => true,
            BodySource::Api(body) => http_body::Body::is_end_stream(body),
        }
    }
}
