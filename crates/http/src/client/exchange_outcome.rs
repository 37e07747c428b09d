//! Classification of how an exchange with an upstream ended, shared by synchronous and queued calls. No I/O.

use http::{Response, StatusCode};

use crate::client::Error;
use crate::client::upstream_body::ResponseBodyError;
use crate::names::X_OPENFAAS_INTERNAL;

/// The outcome of an exchange, as far as the gateway can tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExchangeOutcome {
    /// A response of the function, as far as the gateway can tell.
    Response(StatusCode),
    /// An error response that the provider sent in place of the function.
    ProviderError(StatusCode),
    /// The upstream changed protocols without a request to do so.
    UnexpectedUpgrade,
    /// No connection was established: no upstream has received the request.
    ConnectFailed,
    /// The connection ended before the response was complete, or the response is not valid HTTP.
    UpstreamAborted,
    TimedOut,
    /// The request could not be sent for a reason other than the upstream.
    LocalFailure,
}

impl ExchangeOutcome {
    /// The outcome according to the head of a response. `upgrade_requested`: the client has asked for a change of
    /// protocols, and its whole request has been sent.
    pub fn from_head<B>(response: &Response<B>, upgrade_requested: bool) -> Self {
        let status = response.status();
        // Only an error can be the provider's own; other responses skip this lookup.
        if status.as_u16() >= 400 && response.headers().contains_key(X_OPENFAAS_INTERNAL) {
            return Self::ProviderError(status);
        }
        if status == StatusCode::SWITCHING_PROTOCOLS && !upgrade_requested {
            return Self::UnexpectedUpgrade;
        }
        Self::Response(status)
    }

    /// The outcome of an exchange without a response.
    pub fn from_error(error: &Error) -> Self {
        match error {
            Error::Connect(_) => Self::ConnectFailed,
            Error::UnexpectedUpgrade => Self::UnexpectedUpgrade,
            Error::Timeout => Self::TimedOut,
            Error::Closed(_) | Error::InvalidResponse(_) | Error::HeadTooLarge => {
                Self::UpstreamAborted
            }
            Error::NotAllowed
            | Error::OwnAddress
            | Error::Exhausted(_)
            | Error::InvalidTarget(_)
            | Error::RequestBody(_) => Self::LocalFailure,
        }
    }

    /// The outcome of an exchange whose response body failed, whatever its head was.
    pub fn from_body_error(error: &ResponseBodyError) -> Self {
        match error {
            ResponseBodyError::Aborted(_) => Self::UpstreamAborted,
            ResponseBodyError::TimedOut => Self::TimedOut,
        }
    }

    /// Returns whether this outcome proves that the function exists.
    pub fn confirms_existence(self) -> bool {
        matches!(self, Self::Response(status) if status != StatusCode::NOT_FOUND)
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    fn head(status: u16, is_internal: bool) -> Response<()> {
        let mut response = Response::new(());
        *response.status_mut() = StatusCode::from_u16(status).unwrap();
        if is_internal {
            response.headers_mut().insert(X_OPENFAAS_INTERNAL, "proxy".parse().unwrap());
        }
        response
    }

    #[test]
    fn a_response_comes_from_the_function_or_from_the_provider() {
        let status = |code| StatusCode::from_u16(code).unwrap();
        for (code, is_internal, upgrade_requested, expect, confirms_existence) in [
            (200, false, false, ExchangeOutcome::Response(status(200)), true),
            (404, false, false, ExchangeOutcome::Response(status(404)), false),
            (503, false, false, ExchangeOutcome::Response(status(503)), true),
            (503, true, false, ExchangeOutcome::ProviderError(status(503)), false),
            (404, true, false, ExchangeOutcome::ProviderError(status(404)), false),
            // A success is not an error of the provider, even if it has the header.
            (200, true, false, ExchangeOutcome::Response(status(200)), true),
            (101, false, true, ExchangeOutcome::Response(status(101)), true),
            (101, false, false, ExchangeOutcome::UnexpectedUpgrade, false),
            (101, true, false, ExchangeOutcome::UnexpectedUpgrade, false),
        ] {
            let outcome = ExchangeOutcome::from_head(&head(code, is_internal), upgrade_requested);
            assert_eq!(
                (outcome, outcome.confirms_existence()),
                (expect, confirms_existence),
                "{code} {is_internal}"
            );
        }
    }

    #[test]
    fn only_a_failed_connection_proves_that_no_upstream_received_the_request() {
        let closed = || io::Error::from(io::ErrorKind::ConnectionReset);
        for (error, expect) in [
            (Error::Connect(closed()), ExchangeOutcome::ConnectFailed),
            (Error::Closed(closed()), ExchangeOutcome::UpstreamAborted),
            (Error::HeadTooLarge, ExchangeOutcome::UpstreamAborted),
            (Error::Timeout, ExchangeOutcome::TimedOut),
            (Error::UnexpectedUpgrade, ExchangeOutcome::UnexpectedUpgrade),
            (Error::Exhausted(closed()), ExchangeOutcome::LocalFailure),
        ] {
            assert_eq!(ExchangeOutcome::from_error(&error), expect, "{error}");
        }
    }
}
