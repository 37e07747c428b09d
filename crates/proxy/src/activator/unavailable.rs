//! Signs that a function cannot be reached, and the decision whether the request is retried. No I/O.

use std::time::Duration;

use http::StatusCode;

use gateway_http::client::exchange_outcome::ExchangeOutcome;

/// Maximum times that one attempt sends the request. A refused connection does not count.
pub const MAX_SENDS: u32 = gateway_http::client::MAX_SENDS;

/// Time after a function has become ready in which an error of the provider is taken for a replica that does not listen
/// yet.
pub(super) const STARTUP_WINDOW: Duration = Duration::from_secs(5);

/// A sign that a function cannot be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnavailableSignal {
    /// 502 of the provider: it could not reach the function, or received an invalid response.
    BadGateway,
    /// 503 of the provider: the function has no replica to call.
    ServiceUnavailable,
    /// The connection was refused.
    ConnectFailed(Hop),
}

/// The peer that the request is sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hop {
    /// The provider, which forwards to the function.
    Provider,
    /// The function itself.
    Function,
}

/// Whether a request can be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RetrySafety {
    /// Part of the request is no longer available.
    None,
    /// The whole request is available. It may be sent again only if the function has not received it.
    IfNotDelivered,
    /// The whole request is available, and its method is idempotent.
    Idempotent,
}

/// What to do with the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RetryAction {
    /// Return the result. It is no evidence about the function.
    Return,
    /// Return the result, and query the provider in the background.
    ReturnAndRecheck,
    /// Query the provider, wait for readiness, and send the request again if the function was starting.
    WaitAndRetry,
}

impl UnavailableSignal {
    /// Returns the sign that an exchange with this end gives, if any.
    pub fn from_outcome(outcome: ExchangeOutcome, hop: Hop) -> Option<Self> {
        match outcome {
            ExchangeOutcome::ProviderError(StatusCode::BAD_GATEWAY) => Some(Self::BadGateway),
            ExchangeOutcome::ProviderError(StatusCode::SERVICE_UNAVAILABLE) => {
                Some(Self::ServiceUnavailable)
            }
            ExchangeOutcome::ConnectFailed => Some(Self::ConnectFailed(hop)),
            _ => None,
        }
    }

    /// Returns whether there is a response to return to the client.
    pub(super) fn has_response(self) -> bool {
        !matches!(self, Self::ConnectFailed(_))
    }
}

/// Decides what to do with a request that received `signal`. `ready_for`: time since the function became ready, if the
/// activation found it not ready before.
pub(super) fn decide(
    signal: UnavailableSignal,
    safety: RetrySafety,
    ready_for: Option<Duration>,
) -> RetryAction {
    match (signal, safety) {
        // The provider is unreachable, which is no evidence about the function.
        (UnavailableSignal::ConnectFailed(Hop::Provider), _) if ready_for.is_none() => {
            RetryAction::Return
        }
        (_, RetrySafety::None) => RetryAction::ReturnAndRecheck,
        (UnavailableSignal::ConnectFailed(_) | UnavailableSignal::ServiceUnavailable, _) => {
            RetryAction::WaitAndRetry
        }
        // The function may have received the request: unlikely, but possible even during its start.
        (UnavailableSignal::BadGateway, RetrySafety::Idempotent)
            if ready_for.is_some_and(|ago| ago < STARTUP_WINDOW) =>
        {
            RetryAction::WaitAndRetry
        }
        (UnavailableSignal::BadGateway, _) => RetryAction::ReturnAndRecheck,
    }
}

/// What the provider has reported when a waiting request is released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ProviderReport {
    /// Time since the function became ready, if the activation found it not ready before.
    pub(super) ready_for: Option<Duration>,
    /// A query sent after the request reported no available replica.
    pub(super) had_no_replica: bool,
}

/// Returns whether a request that received `signal` and has waited for its function is sent again.
///
/// A function can send `X-OpenFaaS-Internal`, too, and some providers forward it. So a request that must not be
/// executed twice is sent again only if the provider's API has confirmed that there was no replica.
pub(super) fn is_retried(
    signal: UnavailableSignal,
    safety: RetrySafety,
    report: ProviderReport,
) -> bool {
    // A provider that has reported the function as ready for longer has another reason to reject the request.
    let is_start = report.ready_for.is_some_and(|ago| ago < STARTUP_WINDOW);
    match (signal, safety) {
        (_, RetrySafety::None) | (UnavailableSignal::BadGateway, RetrySafety::IfNotDelivered) => {
            false
        }
        (UnavailableSignal::ServiceUnavailable, RetrySafety::IfNotDelivered) => {
            report.had_no_replica
        }
        (UnavailableSignal::ConnectFailed(_), _) | (_, RetrySafety::Idempotent) => is_start,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(
        signal: UnavailableSignal,
        safety: RetrySafety,
        ready_for: Option<u64>,
        expect: RetryAction,
    ) {
        let ready_for = ready_for.map(Duration::from_secs);
        assert_eq!(
            decide(signal, safety, ready_for),
            expect,
            "{signal:?}, {safety:?}, {ready_for:?}"
        );
    }

    #[test]
    fn a_request_that_was_not_delivered_waits() {
        for ready_for in [None, Some(0), Some(100)] {
            for safety in [RetrySafety::IfNotDelivered, RetrySafety::Idempotent] {
                check(
                    UnavailableSignal::ConnectFailed(Hop::Function),
                    safety,
                    ready_for,
                    RetryAction::WaitAndRetry,
                );
                check(
                    UnavailableSignal::ServiceUnavailable,
                    safety,
                    ready_for,
                    RetryAction::WaitAndRetry,
                );
            }
        }
        check(
            UnavailableSignal::ConnectFailed(Hop::Provider),
            RetrySafety::IfNotDelivered,
            Some(0),
            RetryAction::WaitAndRetry,
        );
    }

    #[test]
    fn an_unreachable_provider_is_no_evidence_about_a_warm_function() {
        check(
            UnavailableSignal::ConnectFailed(Hop::Provider),
            RetrySafety::Idempotent,
            None,
            RetryAction::Return,
        );
    }

    #[test]
    fn a_bad_gateway_counts_as_a_start_only_in_the_startup_window() {
        check(
            UnavailableSignal::BadGateway,
            RetrySafety::Idempotent,
            Some(0),
            RetryAction::WaitAndRetry,
        );
        check(
            UnavailableSignal::BadGateway,
            RetrySafety::Idempotent,
            Some(4),
            RetryAction::WaitAndRetry,
        );
        check(
            UnavailableSignal::BadGateway,
            RetrySafety::Idempotent,
            Some(5),
            RetryAction::ReturnAndRecheck,
        );
        check(
            UnavailableSignal::BadGateway,
            RetrySafety::Idempotent,
            None,
            RetryAction::ReturnAndRecheck,
        );
    }

    #[test]
    fn a_non_idempotent_request_that_may_have_been_delivered_is_not_retried() {
        for ready_for in [None, Some(0), Some(100)] {
            check(
                UnavailableSignal::BadGateway,
                RetrySafety::IfNotDelivered,
                ready_for,
                RetryAction::ReturnAndRecheck,
            );
        }
    }

    #[test]
    fn a_non_idempotent_request_is_retried_only_if_the_provider_confirms_no_replica() {
        let ready_for = [None, Some(0), Some(4), Some(5)].map(|ago| ago.map(Duration::from_secs));
        for (ready_for, had_no_replica) in
            ready_for.into_iter().flat_map(|w| [(w, false), (w, true)])
        {
            let retried = |signal, safety| {
                is_retried(signal, safety, ProviderReport { ready_for, had_no_replica })
            };
            let is_start = ready_for.is_some_and(|ago| ago < STARTUP_WINDOW);
            assert_eq!(
                retried(UnavailableSignal::ServiceUnavailable, RetrySafety::IfNotDelivered),
                had_no_replica
            );
            assert!(!retried(UnavailableSignal::BadGateway, RetrySafety::IfNotDelivered));
            assert_eq!(
                retried(UnavailableSignal::ServiceUnavailable, RetrySafety::Idempotent),
                is_start
            );
            assert_eq!(retried(UnavailableSignal::BadGateway, RetrySafety::Idempotent), is_start);
            assert_eq!(
                retried(
                    UnavailableSignal::ConnectFailed(Hop::Function),
                    RetrySafety::IfNotDelivered
                ),
                is_start
            );
            assert!(!retried(UnavailableSignal::ServiceUnavailable, RetrySafety::None));
        }
    }

    #[test]
    fn a_request_that_cannot_be_replayed_is_not_retried() {
        for ready_for in [None, Some(0)] {
            check(
                UnavailableSignal::BadGateway,
                RetrySafety::None,
                ready_for,
                RetryAction::ReturnAndRecheck,
            );
            check(
                UnavailableSignal::ServiceUnavailable,
                RetrySafety::None,
                ready_for,
                RetryAction::ReturnAndRecheck,
            );
        }
    }
}
