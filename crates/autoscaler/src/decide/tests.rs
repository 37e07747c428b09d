use proptest::prelude::*;

use super::*;
use gateway_proxy::functions::policy::scaling::Kind;

const RULES: AutoscaleRules = AutoscaleRules { window: 60_000, zero_allowed: true };

/// 1 to 10 replicas of 10 calls each.
fn policy() -> ScalingPolicy {
    ScalingPolicy {
        max: 10,
        kind: Kind::Capacity,
        target: 10.0,
        proportion: 1.0,
        ..ScalingPolicy::default()
    }
}

fn observation(now: u64, wanted: u64, stable_load: f64, panic_load: f64) -> Observation {
    Observation {
        now: now * 1000,
        wanted,
        stable_load: Some(stable_load),
        panic_load: Some(panic_load),
        busy: true,
        idle_for: Some(Duration::ZERO),
        complete: true,
    }
}

#[track_caller]
fn check(policy: &ScalingPolicy, observation: Observation, expect: (u64, Reason)) {
    let (decision, _) = decide(RULES, policy, observation, DecisionState::default());
    assert_eq!((decision.desired, decision.reason), expect, "{observation:?}");
    assert_eq!(decision.send_request, decision.desired != observation.wanted);
}

/// Decides second by second; each decision becomes the next `wanted`.
fn run(policy: &ScalingPolicy, wanted: u64, loads: &[(u64, f64, f64)]) -> Vec<u64> {
    let (mut wanted, mut state) = (wanted, DecisionState::default());
    let mut all = Vec::new();
    for (now, stable_load, panic_load) in loads {
        let (decision, next) =
            decide(RULES, policy, observation(*now, wanted, *stable_load, *panic_load), state);
        (wanted, state) = (decision.desired, next);
        all.push(wanted);
    }
    all
}

#[test]
fn each_replica_gets_its_share_of_the_load() {
    let policy = policy();
    check(&policy, observation(0, 3, 30.0, 30.0), (3, Reason::Load));
    check(&policy, observation(0, 3, 30.1, 30.0), (4, Reason::Load));
    check(&policy, observation(0, 3, 20.0, 20.0), (2, Reason::Load));
    check(&policy, observation(0, 3, 0.0, 0.0), (1, Reason::Load));
    check(&policy, observation(0, 9, 1e300, 90.0), (10, Reason::Load));
    // 3 × 15 is more than 5 × 10 × 0.8.
    let partial = ScalingPolicy { proportion: 0.8, ..policy };
    check(&partial, observation(0, 3, 45.0, 45.0), (6, Reason::Load));
    check(&partial, observation(0, 3, 40.0, 40.0), (5, Reason::Load));
}

#[test]
fn rounding_adds_no_replica() {
    let policy = ScalingPolicy { target: 10.0, proportion: 0.9, ..policy() };
    for replicas in 1..=10_u32 {
        let load = 9.0 * f64::from(replicas);
        check(
            &policy,
            observation(0, replicas.into(), load, load),
            (replicas.into(), Reason::Load),
        );
    }
}

#[test]
fn doubled_load_scales_immediately() {
    check(&policy(), observation(0, 1, 5.0, 19.0), (2, Reason::Panic));
    check(&policy(), observation(0, 2, 20.0, 31.0), (4, Reason::Panic));
    check(&policy(), observation(0, 2, 20.0, 300.0), (10, Reason::Panic));
    // Not doubled: the stable window decides.
    check(&policy(), observation(0, 2, 20.0, 30.0), (2, Reason::Load));
    check(&policy(), observation(0, 4, 40.0, 70.0), (4, Reason::Load));
}

#[test]
fn no_replica_is_removed_after_the_load_has_doubled() {
    let loads = [
        (0, 10.0, 10.0),
        (2, 11.0, 45.0),
        (4, 12.0, 70.0),
        // The load was short.
        (10, 8.0, 0.0),
        (61, 5.0, 0.0),
        (62, 5.0, 0.0),
    ];
    assert_eq!(run(&policy(), 1, &loads), [1, 5, 7, 7, 7, 1]);
}

#[test]
fn replicas_are_kept_for_the_down_window() {
    let policy = ScalingPolicy { down_window: Duration::from_secs(30), ..policy() };
    let loads =
        [(0, 50.0, 50.0), (10, 40.0, 40.0), (20, 10.0, 10.0), (31, 10.0, 10.0), (41, 10.0, 10.0)];
    assert_eq!(run(&policy, 5, &loads), [5, 5, 5, 4, 1]);
}

#[test]
fn replicas_out_of_bounds_are_corrected() {
    let policy = ScalingPolicy { min: 2, max: 4, ..policy() };
    check(&policy, observation(0, 1, 0.0, 0.0), (2, Reason::Bounds));
    check(&policy, observation(0, 9, 35.0, 35.0), (4, Reason::Bounds));
    check(&policy, observation(0, 9, 25.0, 25.0), (3, Reason::Load));
    let unknown =
        Observation { stable_load: None, panic_load: None, ..observation(0, 9, 0.0, 0.0) };
    check(&policy, unknown, (4, Reason::Bounds));
}

#[test]
fn unknown_load_changes_nothing() {
    check(
        &policy(),
        Observation { stable_load: None, panic_load: None, ..observation(0, 3, 0.0, 0.0) },
        (3, Reason::Load),
    );
}

#[test]
fn an_incomplete_observation_removes_no_replica() {
    check(
        &policy(),
        Observation { complete: false, ..observation(0, 5, 10.0, 10.0) },
        (5, Reason::Stabilized),
    );
    check(
        &policy(),
        Observation { complete: false, ..observation(0, 5, 70.0, 70.0) },
        (7, Reason::Load),
    );
}

#[test]
fn an_idle_function_is_scaled_to_zero_if_allowed() {
    let zero = ScalingPolicy { zero_after: Some(Duration::from_secs(60)), ..policy() };
    let idle_for = |seconds| Some(Duration::from_secs(seconds));
    let idle = Observation { busy: false, idle_for: idle_for(60), ..observation(0, 3, 0.0, 0.0) };
    check(&zero, idle, (0, Reason::Idle));
    check(&zero, Observation { complete: false, ..idle }, (0, Reason::Idle));
    check(&zero, Observation { idle_for: idle_for(59), ..idle }, (1, Reason::Load));
    check(&zero, Observation { idle_for: None, ..idle }, (1, Reason::Load));
    check(&zero, Observation { busy: true, ..idle }, (1, Reason::Load));
    check(&policy(), idle, (1, Reason::Load));
    let rules = AutoscaleRules { zero_allowed: false, ..RULES };
    assert_eq!(decide(rules, &zero, idle, DecisionState::default()).0.desired, 1);
}

#[test]
fn a_function_at_zero_is_not_changed() {
    let policy = ScalingPolicy { min: 3, ..policy() };
    check(&policy, observation(0, 0, 500.0, 500.0), (0, Reason::ScaledToZero));
}

#[test]
fn a_request_is_repeated_only_after_a_failure_or_without_effect() {
    let policy = policy();
    let at = |now| observation(now, 1, 30.0, 30.0);
    let (first, state) = decide(RULES, &policy, at(0), DecisionState::default());
    let (second, mut state) = decide(RULES, &policy, at(2), state);
    assert!(first.send_request && !second.send_request);
    assert!(decide(RULES, &policy, at(10), state.clone()).0.send_request);
    // Another client has changed the replicas in the meantime.
    assert!(
        decide(RULES, &policy, Observation { wanted: 2, ..at(4) }, state.clone()).0.send_request
    );
    state.request_dropped();
    assert!(decide(RULES, &policy, at(2), state).0.send_request);
}

#[test]
fn after_a_failure_no_request_is_sent_until_the_next_round() {
    let policy = policy();
    let at = |now, load| Observation { now, ..observation(0, 1, load, load) };
    let (_, mut state) = decide(RULES, &policy, at(0, 30.0), DecisionState::default());
    state.request_failed(100);
    for (now, load, sends) in [(500, 30.0, false), (1000, 50.0, false), (2000, 30.0, true)] {
        let (decision, _) = decide(RULES, &policy, at(now, load), state.clone());
        assert_eq!(decision.send_request, sends, "{now}");
        assert!(decision.desired >= 3);
    }
}

prop_compose! {
    fn any_policy()(
        min in 0_u64..6,
        room in 0_u64..20,
        zero_after in proptest::option::of(0_u64..100),
        target in 0.1_f64..100.0,
        proportion in 0.01_f64..=1.0,
        down_window in 0_u64..100,
    ) -> ScalingPolicy {
        ScalingPolicy {
            min,
            max: min.max(1) + room,
            factor: 10,
            zero_after: zero_after.map(Duration::from_secs),
            kind: Kind::Rps,
            target,
            proportion,
            down_window: Duration::from_secs(down_window),
        }
    }
}

prop_compose! {
    fn any_seen()(
        pause in 0_u64..40_000,
        changed_to in proptest::option::weighted(0.2, 0_u64..40),
        stable_load in proptest::option::weighted(0.9, 0.0_f64..500.0),
        panic_load in proptest::option::weighted(0.9, 0.0_f64..500.0),
        busy in any::<bool>(),
        idle_for in proptest::option::weighted(0.9, 0_u64..200),
        complete in any::<bool>(),
    ) -> (u64, Option<u64>, Observation) {
        let idle_for = idle_for.map(Duration::from_secs);
        (pause, changed_to, Observation { now: 0, wanted: 0, stable_load, panic_load, busy, idle_for, complete })
    }
}

/// Runs through observations in which other clients sometimes change the replicas.
fn each(
    policy: &ScalingPolicy,
    all: &[(u64, Option<u64>, Observation)],
    mut check_each: impl FnMut(Observation, &DecisionState, Decision) -> Result<(), TestCaseError>,
) -> Result<(), TestCaseError> {
    let (mut now, mut wanted, mut state) = (0, 1, DecisionState::default());
    for (pause, changed_to, observation) in all {
        now += pause;
        let observation = Observation { now, wanted: changed_to.unwrap_or(wanted), ..*observation };
        let (decision, next) = decide(RULES, policy, observation, state.clone());
        check_each(observation, &state, decision)?;
        (wanted, state) = (decision.desired, next);
    }
    Ok(())
}

proptest! {
    #[test]
    fn never_outside_the_bounds(
        policy in any_policy(),
        all in proptest::collection::vec(any_seen(), 1..60),
    ) {
        each(&policy, &all, |observation, _, decision| {
            match decision.desired {
                0 => prop_assert!(observation.wanted == 0 || policy.zero_after.is_some()),
                replicas => {
                    prop_assert!(replicas >= policy.min && replicas <= policy.max, "{decision:?}");
                }
            }
            Ok(())
        })?;
    }

    #[test]
    fn never_zero_while_calls_are_running_or_queued(
        policy in any_policy(),
        all in proptest::collection::vec(any_seen(), 1..60),
    ) {
        each(&policy, &all, |observation, _, decision| {
            let scaled_to_zero = observation.wanted > 0 && decision.desired == 0;
            prop_assert!(!(scaled_to_zero && (observation.busy || observation.idle_for.is_none())), "{observation:?} {decision:?}");
            Ok(())
        })?;
    }

    #[test]
    fn more_load_never_means_fewer_replicas(
        policy in any_policy(),
        all in proptest::collection::vec(any_seen(), 1..40),
        more in 0.0_f64..300.0,
        more_recent in 0.0_f64..300.0,
    ) {
        each(&policy, &all, |observation, state, decision| {
            let heavier = Observation {
                stable_load: observation.stable_load.map(|load| load + more),
                panic_load: observation.panic_load.map(|load| load + more_recent),
                ..observation
            };
            let (heavy, _) = decide(RULES, &policy, heavier, state.clone());
            prop_assert!(heavy.desired >= decision.desired, "{observation:?} {decision:?} {heavy:?}");
            Ok(())
        })?;
    }

    #[test]
    fn incomplete_observations_never_remove_replicas(
        policy in any_policy(),
        all in proptest::collection::vec(any_seen(), 1..40),
    ) {
        each(&policy, &all, |observation, _, decision| {
            let least = observation.wanted.min(policy.max);
            let idle = decision.reason == Reason::Idle;
            prop_assert!(observation.complete || idle || decision.desired >= least, "{observation:?} {decision:?}");
            Ok(())
        })?;
    }
}
