//! Which replica gets a call. No I/O.

/// What to do with a call.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pick {
    /// All replicas that are ready have as many calls as they may.
    Busy,
    NoneReady,
    Replica(usize),
}

/// The replica with the fewest calls in flight. `loads` has each replica's, `None` for one that is not ready; `limit`
/// is how many each may have, 0 for any number.
pub(super) fn pick(loads: impl IntoIterator<Item = Option<u64>>, limit: u64) -> Pick {
    let ready = loads.into_iter().enumerate().filter_map(|(at, load)| Some((load?, at)));
    match ready.min() {
        None => Pick::NoneReady,
        Some((load, _)) if limit != 0 && load >= limit => Pick::Busy,
        Some((_, at)) => Pick::Replica(at),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(loads: &[Option<u64>], limit: u64, expect: Pick) {
        assert_eq!(pick(loads.iter().copied(), limit), expect, "{loads:?}, {limit}");
    }

    #[test]
    fn the_least_loaded_replica_that_is_ready_is_picked() {
        check(&[], 0, Pick::NoneReady);
        check(&[None, None], 5, Pick::NoneReady);
        check(&[Some(0), Some(0)], 0, Pick::Replica(0));
        check(&[None, Some(9), Some(3), Some(4)], 0, Pick::Replica(2));
        check(&[Some(2), None, Some(1)], 2, Pick::Replica(2));
        check(&[Some(2), None, Some(2)], 2, Pick::Busy);
    }
}
