//! Selects one of the replicas of an upstream for a request. No I/O.

/// Result of the selection.
#[derive(Debug, PartialEq, Eq)]
pub enum Selection {
    /// All ready replicas are at their limit.
    Busy,
    NoneReady,
    Replica(usize),
}

/// Selects the replica with the fewest requests in flight. `loads` has the requests in flight of each replica, `None` if it
/// is not ready. `limit` is the maximum for each replica; 0 means unlimited.
pub fn least_loaded(loads: impl IntoIterator<Item = Option<u64>>, limit: u64) -> Selection {
    let ready = loads.into_iter().enumerate().filter_map(|(index, load)| Some((load?, index)));
    match ready.min() {
        None => Selection::NoneReady,
        Some((load, _)) if limit != 0 && load >= limit => Selection::Busy,
        Some((_, index)) => Selection::Replica(index),
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
    fn the_least_loaded_ready_replica_is_selected() {
        check(&[], 0, Selection::NoneReady);
        check(&[None, None], 5, Selection::NoneReady);
        check(&[Some(0), Some(0)], 0, Selection::Replica(0));
        check(&[None, Some(9), Some(3), Some(4)], 0, Selection::Replica(2));
        check(&[Some(2), None, Some(1)], 2, Selection::Replica(2));
        check(&[Some(2), None, Some(2)], 2, Selection::Busy);
    }
}
