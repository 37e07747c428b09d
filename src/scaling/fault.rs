//! Signs that a function cannot be reached, and the decision whether the request is retried. No I/O.

use std::time::Duration;

use http::StatusCode;

use crate::proxy::ending::Ending;

/// Maximum times that one attempt sends the request. A refused connection does not count.
pub const MAX_SENDS: u32 = crate::proxy::MAX_SENDS;

/// Time after a function has become ready in which an error of the provider is taken for a replica that does not listen
/// yet.
pub(super) const STARTING: Duration = Duration::from_secs(5);

/// A sign that a function cannot be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// 502 of the provider: it could not reach the function, or received an invalid response.
    BadGateway,
    /// 503 of the provider: the function has no replica to call.
    Unavailable,
    /// The connection was refused.
    Unreached(Way),
}

/// The peer that the request is sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Through,
    Direct,
}

/// Whether a request can be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repeat {
    /// Part of the request is no longer available.
    Never,
    /// The whole request is available. It may be sent again only if the function has not received it.
    Unseen,
    /// The whole request is available, and its method is idempotent.
    Always,
}

/// What to do with the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Return the result. It is no evidence about the function.
    Pass,
    /// Return the result, and query the provider in the background.
    Ask,
    /// Query the provider, wait for readiness, and send the request again if the function was starting.
    Wait,
}

impl Fault {
    /// Returns the sign that an exchange with this end gives, if any.
    pub fn of(ending: Ending, way: Way) -> Option<Self> {
        match ending {
            Ending::Internal(StatusCode::BAD_GATEWAY) => Some(Self::BadGateway),
            Ending::Internal(StatusCode::SERVICE_UNAVAILABLE) => Some(Self::Unavailable),
            Ending::Unreached => Some(Self::Unreached(way)),
            _ => None,
        }
    }

    /// Returns whether there is a response to return to the client.
    pub(super) fn has_answer(self) -> bool {
        !matches!(self, Self::Unreached(_))
    }
}

/// Decides what to do with a request that received `signal`. `ready_for`: time since the function became ready, if the
/// activation found it not ready before.
pub(super) fn after(fault: Fault, repeat: Repeat, woken: Option<Duration>) -> Next {
    match (fault, repeat) {
        // The provider is unreachable, which is no evidence about the function.
        (Fault::Unreached(Way::Through), _) if woken.is_none() => Next::Pass,
        (_, Repeat::Never) => Next::Ask,
        (Fault::Unreached(_) | Fault::Unavailable, _) => Next::Wait,
        // The function may have received the request: unlikely, but possible even during its start.
        (Fault::BadGateway, Repeat::Always) if woken.is_some_and(|ago| ago < STARTING) => {
            Next::Wait
        }
        (Fault::BadGateway, _) => Next::Ask,
    }
}

/// What the provider has reported when a waiting request is released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Heard {
    /// Time since the function became ready, if the activation found it not ready before.
    pub(super) woken: Option<Duration>,
    /// A query sent after the request reported no available replica.
    pub(super) had_none: bool,
}

/// Returns whether a request that received `signal` and has waited for its function is sent again.
///
/// A function can send `X-OpenFaaS-Internal`, too, and some providers forward it. So a request that must not be
/// executed twice is sent again only if the provider's API has confirmed that there was no replica.
pub(super) fn is_sent_again(fault: Fault, repeat: Repeat, heard: Heard) -> bool {
    // A provider that has reported the function as ready for longer has another reason to reject the request.
    let is_start = heard.woken.is_some_and(|ago| ago < STARTING);
    match (fault, repeat) {
        (_, Repeat::Never) | (Fault::BadGateway, Repeat::Unseen) => false,
        (Fault::Unavailable, Repeat::Unseen) => heard.had_none,
        (Fault::Unreached(_), _) | (_, Repeat::Always) => is_start,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(fault: Fault, repeat: Repeat, woken: Option<u64>, expect: Next) {
        let woken = woken.map(Duration::from_secs);
        assert_eq!(after(fault, repeat, woken), expect, "{fault:?}, {repeat:?}, {woken:?}");
    }

    #[test]
    fn a_request_that_was_not_delivered_waits() {
        for woken in [None, Some(0), Some(100)] {
            for repeat in [Repeat::Unseen, Repeat::Always] {
                check(Fault::Unreached(Way::Direct), repeat, woken, Next::Wait);
                check(Fault::Unavailable, repeat, woken, Next::Wait);
            }
        }
        check(Fault::Unreached(Way::Through), Repeat::Unseen, Some(0), Next::Wait);
    }

    #[test]
    fn an_unreachable_provider_is_no_evidence_about_a_warm_function() {
        check(Fault::Unreached(Way::Through), Repeat::Always, None, Next::Pass);
    }

    #[test]
    fn a_bad_gateway_counts_as_a_start_only_in_the_startup_window() {
        check(Fault::BadGateway, Repeat::Always, Some(0), Next::Wait);
        check(Fault::BadGateway, Repeat::Always, Some(4), Next::Wait);
        check(Fault::BadGateway, Repeat::Always, Some(5), Next::Ask);
        check(Fault::BadGateway, Repeat::Always, None, Next::Ask);
    }

    #[test]
    fn a_non_idempotent_request_that_may_have_been_delivered_is_not_retried() {
        for woken in [None, Some(0), Some(100)] {
            check(Fault::BadGateway, Repeat::Unseen, woken, Next::Ask);
        }
    }

    #[test]
    fn a_non_idempotent_request_is_retried_only_if_the_provider_confirms_no_replica() {
        let woken = [None, Some(0), Some(4), Some(5)].map(|ago| ago.map(Duration::from_secs));
        for (woken, had_none) in woken.into_iter().flat_map(|w| [(w, false), (w, true)]) {
            let again = |fault, repeat| is_sent_again(fault, repeat, Heard { woken, had_none });
            let is_start = woken.is_some_and(|ago| ago < STARTING);
            assert_eq!(again(Fault::Unavailable, Repeat::Unseen), had_none);
            assert!(!again(Fault::BadGateway, Repeat::Unseen));
            assert_eq!(again(Fault::Unavailable, Repeat::Always), is_start);
            assert_eq!(again(Fault::BadGateway, Repeat::Always), is_start);
            assert_eq!(again(Fault::Unreached(Way::Direct), Repeat::Unseen), is_start);
            assert!(!again(Fault::Unavailable, Repeat::Never));
        }
    }

    #[test]
    fn a_request_that_cannot_be_replayed_is_not_retried() {
        for woken in [None, Some(0)] {
            check(Fault::BadGateway, Repeat::Never, woken, Next::Ask);
            check(Fault::Unavailable, Repeat::Never, woken, Next::Ask);
        }
    }
}
