//! Signs that a function cannot be called after all, and what they mean for the call that met them. No I/O.

use std::time::Duration;

use http::{HeaderName, Response, StatusCode};

use crate::proxy::client;
use crate::proxy::upstream_body::UpstreamBody;

/// In an answer: the provider made this error itself.
pub const X_OPENFAAS_INTERNAL: HeaderName = HeaderName::from_static("x-openfaas-internal");

/// For so long after a function has become ready, its calls are made with care: an error of the provider's is taken for
/// a replica that does not listen yet.
pub(super) const STARTING: Duration = Duration::from_secs(5);

/// A sign that a function cannot be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The provider says that it could not reach the function, or got no valid answer of it.
    BadGateway,
    /// The provider says that the function has nobody to call.
    Unavailable,
    /// Nobody accepts connections where the call goes.
    Unreached(Way),
}

/// Where a call goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// To the provider.
    Through,
    /// To the function itself.
    Direct,
}

/// What becomes of the call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Its outcome is passed on, and says nothing of the function.
    Pass,
    /// It is passed on, and somebody asks the provider how the function is.
    Ask,
    /// It waits for that, and is made again if the function was starting.
    Wait,
}

impl Fault {
    /// What an answer shows.
    pub fn of_answer(answer: &Response<UpstreamBody>) -> Option<Self> {
        let fault = match answer.status() {
            StatusCode::BAD_GATEWAY => Self::BadGateway,
            StatusCode::SERVICE_UNAVAILABLE => Self::Unavailable,
            _ => return None,
        };
        answer.headers().contains_key(X_OPENFAAS_INTERNAL).then_some(fault)
    }

    /// What the lack of an answer shows.
    pub fn of_error(error: &client::Error, way: Way) -> Option<Self> {
        error.is_connect().then_some(Self::Unreached(way))
    }

    /// Whether somebody has answered the call.
    pub(super) fn has_answer(self) -> bool {
        !matches!(self, Self::Unreached(_))
    }
}

/// What becomes of a call that met `fault`. `whole`: all of it can be sent once more; `woken`: how long ago the
/// function became ready, if it was not at first.
pub(super) fn after(fault: Fault, whole: bool, woken: Option<Duration>) -> Next {
    match fault {
        // The provider is away, which says nothing of the function.
        Fault::Unreached(Way::Through) if woken.is_none() => Next::Pass,
        Fault::Unreached(_) | Fault::Unavailable if whole => Next::Wait,
        // The function may have seen the call: only while it starts is that unlikely.
        Fault::BadGateway if whole && woken.is_some_and(|ago| ago < STARTING) => Next::Wait,
        Fault::BadGateway | Fault::Unavailable | Fault::Unreached(_) => Next::Ask,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(fault: Fault, whole: bool, woken: Option<u64>, expect: Next) {
        let woken = woken.map(Duration::from_secs);
        assert_eq!(after(fault, whole, woken), expect, "{fault:?}, {whole}, {woken:?}");
    }

    #[test]
    fn a_call_that_reached_nobody_waits() {
        for woken in [None, Some(0), Some(100)] {
            check(Fault::Unreached(Way::Direct), true, woken, Next::Wait);
            check(Fault::Unavailable, true, woken, Next::Wait);
        }
        check(Fault::Unreached(Way::Through), true, Some(0), Next::Wait);
    }

    #[test]
    fn a_provider_that_is_away_says_nothing_of_a_warm_function() {
        check(Fault::Unreached(Way::Through), true, None, Next::Pass);
    }

    #[test]
    fn a_bad_gateway_is_a_start_only_right_after_one() {
        check(Fault::BadGateway, true, Some(0), Next::Wait);
        check(Fault::BadGateway, true, Some(4), Next::Wait);
        check(Fault::BadGateway, true, Some(5), Next::Ask);
        check(Fault::BadGateway, true, None, Next::Ask);
    }

    #[test]
    fn what_cannot_be_sent_again_is_not() {
        for woken in [None, Some(0)] {
            check(Fault::BadGateway, false, woken, Next::Ask);
            check(Fault::Unavailable, false, woken, Next::Ask);
        }
    }
}
