//! Signs that a function cannot be called after all, and what they mean for the call that met them. No I/O.

use std::time::Duration;

use http::StatusCode;

use crate::proxy::ending::Ending;

/// The most times that one attempt at a call sends it. A refused connection counts as nothing sent.
pub const MAX_SENDS: u32 = crate::proxy::MAX_SENDS;

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

/// Whether a call can be made again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repeat {
    /// Part of it is gone.
    Never,
    /// All of it can be sent once more, if no function has seen it.
    Unseen,
    /// All of it can be sent once more, and its method promises that twice is as once.
    Always,
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
    /// The sign that an exchange which ended in this way gives, if any.
    pub fn of(ending: Ending, way: Way) -> Option<Self> {
        match ending {
            Ending::Internal(StatusCode::BAD_GATEWAY) => Some(Self::BadGateway),
            Ending::Internal(StatusCode::SERVICE_UNAVAILABLE) => Some(Self::Unavailable),
            Ending::Unreached => Some(Self::Unreached(way)),
            _ => None,
        }
    }

    /// Whether somebody has answered the call.
    pub(super) fn has_answer(self) -> bool {
        !matches!(self, Self::Unreached(_))
    }
}

/// What becomes of a call that met `fault`. `woken`: how long ago the function became ready, if it was not at first.
pub(super) fn after(fault: Fault, repeat: Repeat, woken: Option<Duration>) -> Next {
    match (fault, repeat) {
        // The provider is away, which says nothing of the function.
        (Fault::Unreached(Way::Through), _) if woken.is_none() => Next::Pass,
        (_, Repeat::Never) => Next::Ask,
        (Fault::Unreached(_) | Fault::Unavailable, _) => Next::Wait,
        // The function may have seen the call: even while it starts that is only unlikely.
        (Fault::BadGateway, Repeat::Always) if woken.is_some_and(|ago| ago < STARTING) => {
            Next::Wait
        }
        (Fault::BadGateway, _) => Next::Ask,
    }
}

/// What the provider has said by the time that a waiting call may go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Heard {
    /// How long ago the function became ready, if it was not at first.
    pub(super) woken: Option<Duration>,
    /// The provider, asked after the call was sent, reported that it had no replica to call.
    pub(super) had_none: bool,
}

/// Whether a call that met `fault` and has waited for its function is sent again.
///
/// `X-OpenFaaS-Internal` is a header that a function can send, too, and some providers pass it on. So a call that must
/// not be executed twice is sent again only if the provider's API has confirmed that nobody was there.
pub(super) fn is_sent_again(fault: Fault, repeat: Repeat, heard: Heard) -> bool {
    // A provider that calls the function ready for that long has another reason to refuse.
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
    fn a_call_that_reached_nobody_waits() {
        for woken in [None, Some(0), Some(100)] {
            for repeat in [Repeat::Unseen, Repeat::Always] {
                check(Fault::Unreached(Way::Direct), repeat, woken, Next::Wait);
                check(Fault::Unavailable, repeat, woken, Next::Wait);
            }
        }
        check(Fault::Unreached(Way::Through), Repeat::Unseen, Some(0), Next::Wait);
    }

    #[test]
    fn a_provider_that_is_away_says_nothing_of_a_warm_function() {
        check(Fault::Unreached(Way::Through), Repeat::Always, None, Next::Pass);
    }

    #[test]
    fn a_bad_gateway_is_a_start_only_right_after_one() {
        check(Fault::BadGateway, Repeat::Always, Some(0), Next::Wait);
        check(Fault::BadGateway, Repeat::Always, Some(4), Next::Wait);
        check(Fault::BadGateway, Repeat::Always, Some(5), Next::Ask);
        check(Fault::BadGateway, Repeat::Always, None, Next::Ask);
    }

    #[test]
    fn what_a_function_may_have_seen_and_must_not_see_twice_is_not_sent_again() {
        for woken in [None, Some(0), Some(100)] {
            check(Fault::BadGateway, Repeat::Unseen, woken, Next::Ask);
        }
    }

    #[test]
    fn a_call_that_must_not_run_twice_needs_the_providers_word_that_nobody_was_there() {
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
    fn what_cannot_be_sent_again_is_not() {
        for woken in [None, Some(0)] {
            check(Fault::BadGateway, Repeat::Never, woken, Next::Ask);
            check(Fault::Unavailable, Repeat::Never, woken, Next::Ask);
        }
    }
}
