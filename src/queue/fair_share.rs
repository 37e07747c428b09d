//! How many places one function may have while others may want some. No I/O.

/// Whether one more call of a function may be made, of which `running` are made already, where `all` of all functions
/// are made in `places`.
///
/// A function may have three quarters of the places that the others leave free, and always one: however many of its
/// calls hang, some places stay free for the others, if there is more than one.
pub(crate) fn may_start(running: usize, all: usize, places: usize) -> bool {
    let free = places.saturating_sub(all);
    running == 0 || running + 4 <= free * 3
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many a function takes that is alone, but for `others` calls.
    fn takes(places: usize, others: usize) -> usize {
        (0..).take_while(|running| may_start(*running, others + running, places)).count()
    }

    #[test]
    fn of_all_places_but_a_lone_one_some_stay_free() {
        let rows =
            [(1, 1), (2, 1), (3, 2), (4, 3), (5, 3), (6, 4), (7, 5), (8, 6), (10, 7), (40, 30)];
        for (places, taken) in rows {
            assert_eq!(takes(places, 0), taken, "of {places}");
        }
    }

    #[test]
    fn what_others_have_is_not_there_to_be_shared() {
        for (places, others, taken) in [(8, 4, 3), (8, 6, 1), (8, 7, 1), (4, 3, 1), (8, 8, 1)] {
            assert_eq!(takes(places, others), taken, "of {places} beside {others}");
        }
    }
}
