//! Next step of an activation. No I/O.

use gateway_provider::types::FunctionSummary;

/// Replica counts of a function, as the provider reports them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplicaCounts {
    pub desired: u64,
    /// Replicas that are ready.
    pub available: u64,
    /// `com.openfaas.scale.min`
    pub min: u64,
}

/// Next step of an activation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Call,
    Scale(u64),
    Wait,
}

impl ReplicaCounts {
    /// Returns the counts in `status` of a function with the minimum `min`.
    pub fn new(status: &FunctionSummary, min: u64) -> Self {
        Self { desired: status.replicas, available: status.available_replicas, min }
    }
}

/// Returns the next step for these replica counts. `scaled`: a scale request was sent recently, and the counts may not
/// show it yet.
pub fn next_step(replicas: ReplicaCounts, scaled: bool) -> Step {
    match replicas {
        ReplicaCounts { available: 1.., .. } => Step::Call,
        ReplicaCounts { desired: 0, min, .. } if !scaled => Step::Scale(min.max(1)),
        ReplicaCounts { .. } => Step::Wait,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check((desired, available, min): (u64, u64, u64), scaled: bool, expect: Step) {
        assert_eq!(next_step(ReplicaCounts { desired, available, min }, scaled), expect);
    }

    #[test]
    fn a_function_with_a_replica_is_called() {
        check((1, 1, 1), false, Step::Call);
        check((5, 1, 3), false, Step::Call);
        check((1, 1, 1), true, Step::Call);
        // The last replica is about to stop, but still accepts requests.
        check((0, 1, 1), false, Step::Call);
    }

    #[test]
    fn a_function_at_zero_is_scaled_to_its_minimum_and_to_one_at_least() {
        check((0, 0, 1), false, Step::Scale(1));
        check((0, 0, 0), false, Step::Scale(1));
        check((0, 0, 3), false, Step::Scale(3));
    }

    #[test]
    fn a_starting_function_is_waited_for() {
        check((1, 0, 1), false, Step::Wait);
        check((3, 0, 5), false, Step::Wait);
    }

    #[test]
    fn the_same_replicas_are_not_requested_twice() {
        check((0, 0, 1), true, Step::Wait);
        check((1, 0, 1), true, Step::Wait);
    }
}
