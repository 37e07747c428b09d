//! How an exchange with an upstream ended. Calls that wait for their answer and queued calls are judged by this one
//! reading. No I/O.

use http::{Response, StatusCode};

use crate::provider::signals::X_OPENFAAS_INTERNAL;
use crate::proxy::client::Error;
use crate::proxy::upstream_body::BodyFailure;

/// How an exchange ended, as far as the gateway can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// An answer that is the function's, as far as anybody can tell.
    Answered(StatusCode),
    /// The provider answered in place of the function.
    Internal(StatusCode),
    /// The upstream changed protocols, which nobody had asked for.
    Unasked,
    /// No connection came about: the request has reached nobody.
    Unreached,
    /// The connection ended before the answer was complete, or the answer is not valid HTTP.
    Broken,
    TimedOut,
    /// The request could not be sent, for a reason that is not the upstream's.
    NotSent,
}

impl Ending {
    /// What the head of an answer shows. `agreed`: the client has asked for a change of protocols, and all of its
    /// request is out.
    pub fn of_head<B>(answer: &Response<B>, agreed: bool) -> Self {
        let status = answer.status();
        // An error alone can be the provider's own; for all others the header is not looked for.
        if status.as_u16() >= 400 && answer.headers().contains_key(X_OPENFAAS_INTERNAL) {
            return Self::Internal(status);
        }
        if status == StatusCode::SWITCHING_PROTOCOLS && !agreed {
            return Self::Unasked;
        }
        Self::Answered(status)
    }

    /// What the lack of an answer shows.
    pub fn of_error(error: &Error) -> Self {
        match error {
            Error::Connect(_) => Self::Unreached,
            Error::Unasked => Self::Unasked,
            Error::Timeout => Self::TimedOut,
            Error::Closed(_) | Error::Invalid(_) | Error::HeadTooLarge => Self::Broken,
            Error::NotAllowed
            | Error::Own
            | Error::Exhausted(_)
            | Error::Target(_)
            | Error::Body(_) => Self::NotSent,
        }
    }

    /// What the failure of an answer's body shows, whatever its head was.
    pub fn of_body(failure: &BodyFailure) -> Self {
        match failure {
            BodyFailure::Broken(_) => Self::Broken,
            BodyFailure::Timeout => Self::TimedOut,
        }
    }

    /// Whether this shows that the function exists.
    pub fn confirms_existence(self) -> bool {
        matches!(self, Self::Answered(status) if status != StatusCode::NOT_FOUND)
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    fn head(status: u16, is_internal: bool) -> Response<()> {
        let mut answer = Response::new(());
        *answer.status_mut() = StatusCode::from_u16(status).unwrap();
        if is_internal {
            answer.headers_mut().insert(X_OPENFAAS_INTERNAL, "proxy".parse().unwrap());
        }
        answer
    }

    #[test]
    fn a_head_is_the_functions_or_the_providers_or_nobodys() {
        let status = |code| StatusCode::from_u16(code).unwrap();
        for (code, is_internal, agreed, expect, confirms_existence) in [
            (200, false, false, Ending::Answered(status(200)), true),
            (404, false, false, Ending::Answered(status(404)), false),
            (503, false, false, Ending::Answered(status(503)), true),
            (503, true, false, Ending::Internal(status(503)), false),
            (404, true, false, Ending::Internal(status(404)), false),
            // A success is not an error of the provider, even if it has the header.
            (200, true, false, Ending::Answered(status(200)), true),
            (101, false, true, Ending::Answered(status(101)), true),
            (101, false, false, Ending::Unasked, false),
            (101, true, false, Ending::Unasked, false),
        ] {
            let ending = Ending::of_head(&head(code, is_internal), agreed);
            assert_eq!(
                (ending, ending.confirms_existence()),
                (expect, confirms_existence),
                "{code} {is_internal}"
            );
        }
    }

    #[test]
    fn only_a_failed_connection_has_reached_nobody() {
        let closed = || io::Error::from(io::ErrorKind::ConnectionReset);
        for (error, expect) in [
            (Error::Connect(closed()), Ending::Unreached),
            (Error::Closed(closed()), Ending::Broken),
            (Error::HeadTooLarge, Ending::Broken),
            (Error::Timeout, Ending::TimedOut),
            (Error::Unasked, Ending::Unasked),
            (Error::Exhausted(closed()), Ending::NotSent),
        ] {
            assert_eq!(Ending::of_error(&error), expect, "{error}");
        }
    }
}
