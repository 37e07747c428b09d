//! Responses to requests whose body has not been read to its end: the connection cannot be used for another request
//! then, and the client is told so (RFC 9112, 9.6).

use std::future::poll_fn;
use std::task::Poll;

use http::{Response, StatusCode};

use crate::answer::{Answer, Content};
use crate::watch::{BodyState, Watch};

/// Whether `answer` is to say `Connection: close`, because the rest of its request will not be read. To be asked while the
/// request's body is not known to have been read.
pub async fn closes(watch: &Watch, answer: &mut Response<Answer>) -> bool {
    // After a change of protocols, `Connection` names the new one.
    if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
        return false;
    }
    if watch.body_state() == BodyState::Unread {
        // hyper learns in its next turn that the body is not wanted. It reads the rest if that has been received, and
        // otherwise says by itself that it will close the connection.
        let mut turns = 0;
        poll_fn(|cx| {
            if turns > 0 {
                return Poll::Ready(());
            }
            turns += 1;
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }
    match watch.body_state() {
        BodyState::Read | BodyState::Unread => false,
        BodyState::Broken => true,
        // It is still being passed on. An error, or a response that is complete already, will not wait for the rest.
        BodyState::InUse => is_final(answer),
    }
}

/// Whether a response that comes before the end of its request is all that the function has to say.
fn is_final(answer: &Response<Answer>) -> bool {
    let status = answer.status();
    status.is_client_error() || status.is_server_error() || answer.body().has_come_whole()
}

impl Answer {
    /// Whether all of the body has been received from where it comes from.
    fn has_come_whole(&self) -> bool {
        match &self.content {
            Content::Upstream(body) => body.has_come_whole(),
            Content::Full(_) => true,
            Content::Api(body) => http_body::Body::is_end_stream(body),
        }
    }
}
