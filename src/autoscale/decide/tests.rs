use proptest::prelude::*;

use super::*;
use crate::autoscale::policy::Kind;

const RULES: Rules = Rules { window: 60_000, may_zero: true };

/// From 1 to 10 replicas of 10 calls each.
fn policy() -> Policy {
    Policy { max: 10, kind: Kind::Capacity, target: 10.0, proportion: 1.0, ..Policy::default() }
}

fn seen(now: u64, wanted: u64, stable: f64, sudden: f64) -> Seen {
    Seen {
        now: now * 1000,
        wanted,
        stable: Some(stable),
        sudden: Some(sudden),
        busy: true,
        quiet: Some(Duration::ZERO),
        whole: true,
    }
}

#[track_caller]
fn check(policy: &Policy, seen: Seen, expect: (u64, Reason)) {
    let (decision, _) = decide(RULES, policy, seen, Memory::default());
    assert_eq!((decision.desired, decision.reason), expect, "{seen:?}");
    assert_eq!(decision.ask, decision.desired != seen.wanted);
}

/// Decides second by second; what is desired is what is wanted the next time.
fn run(policy: &Policy, wanted: u64, loads: &[(u64, f64, f64)]) -> Vec<u64> {
    let (mut wanted, mut memory) = (wanted, Memory::default());
    let mut all = Vec::new();
    for (now, stable, sudden) in loads {
        let (decision, next) = decide(RULES, policy, seen(*now, wanted, *stable, *sudden), memory);
        (wanted, memory) = (decision.desired, next);
        all.push(wanted);
    }
    all
}

#[test]
fn each_replica_has_its_part_of_the_load() {
    let policy = policy();
    check(&policy, seen(0, 3, 30.0, 30.0), (3, Reason::Load));
    check(&policy, seen(0, 3, 30.1, 30.0), (4, Reason::Load));
    check(&policy, seen(0, 3, 20.0, 20.0), (2, Reason::Load));
    check(&policy, seen(0, 3, 0.0, 0.0), (1, Reason::Load));
    check(&policy, seen(0, 9, 1e300, 90.0), (10, Reason::Load));
    // 3 × 15 is more than 5 × 10 × 0.8.
    let part = Policy { proportion: 0.8, ..policy };
    check(&part, seen(0, 3, 45.0, 45.0), (6, Reason::Load));
    check(&part, seen(0, 3, 40.0, 40.0), (5, Reason::Load));
}

#[test]
fn rounding_adds_no_replica() {
    let policy = Policy { target: 10.0, proportion: 0.9, ..policy() };
    for replicas in 1..=10_u32 {
        let load = 9.0 * f64::from(replicas);
        check(&policy, seen(0, replicas.into(), load, load), (replicas.into(), Reason::Load));
    }
}

#[test]
fn doubled_load_scales_at_once() {
    check(&policy(), seen(0, 1, 5.0, 19.0), (2, Reason::Panic));
    check(&policy(), seen(0, 2, 20.0, 31.0), (4, Reason::Panic));
    check(&policy(), seen(0, 2, 20.0, 300.0), (10, Reason::Panic));
    // Not doubled: the stable window decides.
    check(&policy(), seen(0, 2, 20.0, 30.0), (2, Reason::Load));
    check(&policy(), seen(0, 4, 40.0, 70.0), (4, Reason::Load));
}

#[test]
fn no_replica_goes_while_load_has_just_doubled() {
    let loads = [
        (0, 10.0, 10.0),
        (2, 11.0, 45.0),
        (4, 12.0, 70.0),
        // It was but a moment.
        (10, 8.0, 0.0),
        (61, 5.0, 0.0),
        (62, 5.0, 0.0),
    ];
    assert_eq!(run(&policy(), 1, &loads), [1, 5, 7, 7, 7, 1]);
}

#[test]
fn replicas_stay_for_as_long_as_the_label_says() {
    let policy = Policy { down_window: Duration::from_secs(30), ..policy() };
    let loads =
        [(0, 50.0, 50.0), (10, 40.0, 40.0), (20, 10.0, 10.0), (31, 10.0, 10.0), (41, 10.0, 10.0)];
    assert_eq!(run(&policy, 5, &loads), [5, 5, 5, 4, 1]);
}

#[test]
fn what_is_out_of_bounds_goes_into_them() {
    let policy = Policy { min: 2, max: 4, ..policy() };
    check(&policy, seen(0, 1, 0.0, 0.0), (2, Reason::Bounds));
    check(&policy, seen(0, 9, 35.0, 35.0), (4, Reason::Bounds));
    check(&policy, seen(0, 9, 25.0, 25.0), (3, Reason::Load));
    let unknown = Seen { stable: None, sudden: None, ..seen(0, 9, 0.0, 0.0) };
    check(&policy, unknown, (4, Reason::Bounds));
}

#[test]
fn load_that_is_not_known_changes_nothing() {
    check(
        &policy(),
        Seen { stable: None, sudden: None, ..seen(0, 3, 0.0, 0.0) },
        (3, Reason::Load),
    );
}

#[test]
fn a_gateway_that_has_not_seen_all_takes_nothing_away() {
    check(&policy(), Seen { whole: false, ..seen(0, 5, 10.0, 10.0) }, (5, Reason::Held));
    check(&policy(), Seen { whole: false, ..seen(0, 5, 70.0, 70.0) }, (7, Reason::Load));
}

#[test]
fn an_idle_function_goes_to_zero_when_it_may() {
    let zero = Policy { zero_after: Some(Duration::from_secs(60)), ..policy() };
    let quiet = |seconds| Some(Duration::from_secs(seconds));
    let idle = Seen { busy: false, quiet: quiet(60), ..seen(0, 3, 0.0, 0.0) };
    check(&zero, idle, (0, Reason::Idle));
    check(&zero, Seen { whole: false, ..idle }, (0, Reason::Idle));
    check(&zero, Seen { quiet: quiet(59), ..idle }, (1, Reason::Load));
    check(&zero, Seen { quiet: None, ..idle }, (1, Reason::Load));
    check(&zero, Seen { busy: true, ..idle }, (1, Reason::Load));
    check(&policy(), idle, (1, Reason::Load));
    let rules = Rules { may_zero: false, ..RULES };
    assert_eq!(decide(rules, &zero, idle, Memory::default()).0.desired, 1);
}

#[test]
fn a_function_at_zero_is_left_alone() {
    let policy = Policy { min: 3, ..policy() };
    check(&policy, seen(0, 0, 500.0, 500.0), (0, Reason::Asleep));
}

#[test]
fn a_request_is_repeated_only_when_it_has_failed_or_was_not_heard() {
    let policy = policy();
    let at = |now| seen(now, 1, 30.0, 30.0);
    let (first, memory) = decide(RULES, &policy, at(0), Memory::default());
    let (second, mut memory) = decide(RULES, &policy, at(2), memory);
    assert!(first.ask && !second.ask);
    assert!(decide(RULES, &policy, at(10), memory.clone()).0.ask);
    // Somebody else has changed it meanwhile.
    assert!(decide(RULES, &policy, Seen { wanted: 2, ..at(4) }, memory.clone()).0.ask);
    memory.dropped();
    assert!(decide(RULES, &policy, at(2), memory).0.ask);
}

#[test]
fn after_a_failure_nothing_is_asked_for_until_the_next_round() {
    let policy = policy();
    let at = |now, load| Seen { now, ..seen(0, 1, load, load) };
    let (_, mut memory) = decide(RULES, &policy, at(0, 30.0), Memory::default());
    memory.failed(100);
    for (now, load, asks) in [(500, 30.0, false), (1000, 50.0, false), (2000, 30.0, true)] {
        let (decision, _) = decide(RULES, &policy, at(now, load), memory.clone());
        assert_eq!(decision.ask, asks, "{now}");
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
    ) -> Policy {
        Policy {
            min,
            max: min.max(1) + room,
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
        stable in proptest::option::weighted(0.9, 0.0_f64..500.0),
        sudden in proptest::option::weighted(0.9, 0.0_f64..500.0),
        busy in any::<bool>(),
        quiet in proptest::option::weighted(0.9, 0_u64..200),
        whole in any::<bool>(),
    ) -> (u64, Option<u64>, Seen) {
        let quiet = quiet.map(Duration::from_secs);
        (pause, changed_to, Seen { now: 0, wanted: 0, stable, sudden, busy, quiet, whole })
    }
}

/// Goes through what is seen, with somebody else changing the replicas now and then.
fn each(
    policy: &Policy,
    all: &[(u64, Option<u64>, Seen)],
    mut look: impl FnMut(Seen, &Memory, Decision) -> Result<(), TestCaseError>,
) -> Result<(), TestCaseError> {
    let (mut now, mut wanted, mut memory) = (0, 1, Memory::default());
    for (pause, changed_to, seen) in all {
        now += pause;
        let seen = Seen { now, wanted: changed_to.unwrap_or(wanted), ..*seen };
        let (decision, next) = decide(RULES, policy, seen, memory.clone());
        look(seen, &memory, decision)?;
        (wanted, memory) = (decision.desired, next);
    }
    Ok(())
}

proptest! {
    #[test]
    fn never_outside_the_bounds(
        policy in any_policy(),
        all in proptest::collection::vec(any_seen(), 1..60),
    ) {
        each(&policy, &all, |seen, _, decision| {
            match decision.desired {
                0 => prop_assert!(seen.wanted == 0 || policy.zero_after.is_some()),
                replicas => {
                    prop_assert!(replicas >= policy.min && replicas <= policy.max, "{decision:?}");
                }
            }
            Ok(())
        })?;
    }

    #[test]
    fn never_zero_while_calls_run_or_wait(
        policy in any_policy(),
        all in proptest::collection::vec(any_seen(), 1..60),
    ) {
        each(&policy, &all, |seen, _, decision| {
            let taken = seen.wanted > 0 && decision.desired == 0;
            prop_assert!(!(taken && (seen.busy || seen.quiet.is_none())), "{seen:?} {decision:?}");
            Ok(())
        })?;
    }

    #[test]
    fn more_load_never_means_fewer_replicas(
        policy in any_policy(),
        all in proptest::collection::vec(any_seen(), 1..40),
        more in 0.0_f64..300.0,
        more_of_late in 0.0_f64..300.0,
    ) {
        each(&policy, &all, |seen, memory, decision| {
            let heavier = Seen {
                stable: seen.stable.map(|load| load + more),
                sudden: seen.sudden.map(|load| load + more_of_late),
                ..seen
            };
            let (heavy, _) = decide(RULES, &policy, heavier, memory.clone());
            prop_assert!(heavy.desired >= decision.desired, "{seen:?} {decision:?} {heavy:?}");
            Ok(())
        })?;
    }

    #[test]
    fn nothing_is_taken_away_by_who_has_not_seen_all(
        policy in any_policy(),
        all in proptest::collection::vec(any_seen(), 1..40),
    ) {
        each(&policy, &all, |seen, _, decision| {
            let least = seen.wanted.min(policy.max);
            let idle = decision.reason == Reason::Idle;
            prop_assert!(seen.whole || idle || decision.desired >= least, "{seen:?} {decision:?}");
            Ok(())
        })?;
    }
}
