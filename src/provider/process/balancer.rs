//! Which replica gets a call. No I/O.

/// What to do with a call.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Selection {
    /// All replicas that are ready have as many calls as they may.
    Busy,
    NoneReady,
    Replica(usize),
}

/// The replica with the fewest calls in flight. `loads` has each replica's, `None` for one that is not ready; `limit`
/// is how many each may have, 0 for any number.
pub(super) fn least_loaded(loads: impl IntoIterator<Item = Option<u64>>, limit: u64) -> Selection {
    let ready = loads.into_iter().enumerate().filter_map(|(at, load)| Some((load?, at)));
    match ready.min() {
        None => Selection::NoneReady,
        Some((load, _)) if limit != 0 && load >= limit => Selection::Busy,
        Some((_, at)) => Selection::Replica(at),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(loads: &[Option<u64>], limit: u64, expect: Selection) {
        assert_eq!(least_loaded(loads.iter().copied(), limit), expect, "{loads:?}, {limit}");
    }

    #[test]
    fn the_least_loaded_replica_that_is_ready_is_picked() {
        check(&[], 0, Selection::NoneReady);
        check(&[None, None], 5, Selection::NoneReady);
        check(&[Some(0), Some(0)], 0, Selection::Replica(0));
        check(&[None, Some(9), Some(3), Some(4)], 0, Selection::Replica(2));
        check(&[Some(2), None, Some(1)], 2, Selection::Replica(2));
        check(&[Some(2), None, Some(2)], 2, Selection::Busy);
    }
}
