//! Effect of an alert on the replicas of a function. No I/O.

use gateway_proxy::functions::policy::scaling::ScalingPolicy;

/// Status of an alert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AlertStatus {
    Firing,
    Resolved,
}

/// Returns the new number of replicas; `None` if it does not change.
pub(super) fn replicas_after(
    status: AlertStatus,
    replicas: u64,
    policy: &ScalingPolicy,
) -> Option<u64> {
    if policy.factor == 0 {
        return None;
    }
    let wanted = match status {
        AlertStatus::Firing => {
            let step = policy.max.saturating_mul(policy.factor).div_ceil(100);
            replicas.saturating_add(step).min(policy.max)
        }
        AlertStatus::Resolved => policy.min,
    };
    (wanted != replicas).then_some(wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(
        status: AlertStatus,
        replicas: u64,
        min: u64,
        max: u64,
        factor: u64,
        expect: Option<u64>,
    ) {
        let policy = ScalingPolicy { min, max, factor, ..ScalingPolicy::default() };
        assert_eq!(replicas_after(status, replicas, &policy), expect);
    }

    #[test]
    fn a_firing_alert_adds_a_step_up_to_max() {
        check(AlertStatus::Firing, 1, 1, 5, 40, Some(3));
        check(AlertStatus::Firing, 4, 1, 5, 100, Some(5));
        check(AlertStatus::Firing, 1, 1, 20, 10, Some(3));
        check(AlertStatus::Firing, 1, 1, 4, 10, Some(2));
        check(AlertStatus::Firing, 5, 1, 5, 40, None);
        check(AlertStatus::Firing, 9, 1, 5, 40, Some(5));
        check(AlertStatus::Firing, 0, 0, u64::MAX, 100, Some(u64::MAX.div_ceil(100)));
    }

    #[test]
    fn a_resolved_alert_scales_to_min() {
        check(AlertStatus::Resolved, 4, 2, 20, 10, Some(2));
        check(AlertStatus::Resolved, 1, 1, 20, 10, None);
    }

    #[test]
    fn factor_zero_disables_alerts() {
        check(AlertStatus::Firing, 1, 1, 5, 0, None);
        check(AlertStatus::Resolved, 4, 1, 5, 0, None);
    }
}
