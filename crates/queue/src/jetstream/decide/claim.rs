//! Decides whether a delivered call may be executed. No I/O.

use std::time::Instant;

use crate::jetstream::wire::claims::CANCEL_MARKER_TTL;

/// What a receiver does with a delivered call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::jetstream) enum Action {
    /// The call has a final state; its message was left behind.
    Finish,
    /// The call was cancelled, but the cancellation is incomplete.
    CompleteCancel,
    /// The call is claimed, and executed unless it is being cancelled.
    Claim,
}

/// Returns whether the call may be settled, although its message exists: the settling process or the server died.
pub(in crate::jetstream) fn may_be_settled(deliveries: u32, predates_restart: bool) -> bool {
    deliveries > 1 || predates_restart
}

/// Decides what to do with a delivered call.
pub(in crate::jetstream) fn action(finished: bool, tombstone: bool) -> Action {
    match (finished, tombstone) {
        (true, _) => Action::Finish,
        (false, true) => Action::CompleteCancel,
        (false, false) => Action::Claim,
    }
}

/// The cancel markers that a receiver has seen. They are read only after the list of the receiver was stored, and only
/// if another process has written to the stream since.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::jetstream) struct SeenMarkers {
    /// Sequence of the latest marker, and the time when this process first saw it.
    latest: Option<(u64, Instant)>,
    /// All markers up to this sequence were seen.
    seen_to: u64,
}

impl SeenMarkers {
    /// Returns whether the latest marker must be read after the list was stored at this sequence.
    pub(in crate::jetstream) fn must_read(&self, list_sequence: u64) -> bool {
        self.seen_to + 1 != list_sequence
    }

    /// Records the sequence of the latest marker.
    pub(in crate::jetstream) fn on_read(&mut self, latest: Option<u64>, now: Instant) {
        if self.latest.map(|(marker, _)| marker) != latest {
            self.latest = latest.map(|marker| (marker, now));
        }
    }

    /// Returns whether calls that were added to the list may have a marker. Each of them must then be looked up.
    pub(in crate::jetstream) fn may_be_cancelled(
        &mut self,
        list_sequence: u64,
        now: Instant,
    ) -> bool {
        self.seen_to = list_sequence;
        // Older markers were written before any call that this process holds was delivered.
        self.latest.is_some_and(|(_, at)| now.saturating_duration_since(at) <= CANCEL_MARKER_TTL)
    }
}
