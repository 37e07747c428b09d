//! Fair sharing of execution slots between functions. No I/O.

/// Returns whether one more call of a function may start. `running` is the number of its running calls, `all` that of
/// all functions, `concurrency` the number of slots.
///
/// A function may use three quarters of the slots that the others leave free, and always one. However many of its calls
/// hang, some slots stay free for other functions, if there is more than one slot.
pub fn may_start(running: usize, all: usize, concurrency: usize) -> bool {
    let free = concurrency.saturating_sub(all);
    running == 0 || running + 4 <= free * 3
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Number of calls that a function can run while `others` calls of other functions run.
    fn max_running(concurrency: usize, others: usize) -> usize {
        (0..).take_while(|running| may_start(*running, others + running, concurrency)).count()
    }

    #[test]
    fn a_single_function_leaves_slots_free() {
        let rows =
            [(1, 1), (2, 1), (3, 2), (4, 3), (5, 3), (6, 4), (7, 5), (8, 6), (10, 7), (40, 30)];
        for (concurrency, expected) in rows {
            assert_eq!(max_running(concurrency, 0), expected, "of {concurrency}");
        }
    }

    #[test]
    fn slots_of_other_functions_reduce_the_share() {
        for (concurrency, others, expected) in
            [(8, 4, 3), (8, 6, 1), (8, 7, 1), (4, 3, 1), (8, 8, 1)]
        {
            assert_eq!(
                max_running(concurrency, others),
                expected,
                "of {concurrency} beside {others}"
            );
        }
    }
}
