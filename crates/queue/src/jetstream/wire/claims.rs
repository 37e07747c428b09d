//! Format of the lists of running calls, and the lifetime of cancel markers. No I/O.
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::call::UnixMillis;
use crate::jetstream::wire::call_ref::CallRef;

/// Lifetime of a cancel marker. A cancellation ends within half of it, and no call stays unclaimed for longer.
pub(in crate::jetstream) const CANCEL_MARKER_TTL: Duration = Duration::from_secs(10);

/// The calls that one receiver has claimed.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(in crate::jetstream) struct RunningList {
    /// By consumer name: sequence of each call's message, and time of the claim.
    pub(in crate::jetstream) calls: BTreeMap<String, Vec<(u64, UnixMillis)>>,
    /// The same for calls in batches, with a bit set of their indexes.
    #[serde(default, rename = "together", skip_serializing_if = "BTreeMap::is_empty")]
    pub(in crate::jetstream) batched: BTreeMap<String, Vec<(u64, UnixMillis, u64)>>,
}

impl RunningList {
    /// Adds a call that was claimed at `since`.
    pub(in crate::jetstream) fn add(
        &mut self,
        consumer: &str,
        call_ref: CallRef,
        since: UnixMillis,
    ) {
        match call_ref.index {
            None => {
                let calls = self.calls.entry(consumer.to_owned()).or_default();
                calls.push((call_ref.sequence, since));
            }
            Some(index) => {
                let groups = self.batched.entry(consumer.to_owned()).or_default();
                let bit = 1_u64.checked_shl(index.into()).unwrap_or_default();
                let group = groups
                    .iter_mut()
                    .find(|group| (group.0, group.1) == (call_ref.sequence, since));
                match group {
                    Some((.., bits)) => *bits |= bit,
                    None => groups.push((call_ref.sequence, since, bit)),
                }
            }
        }
    }

    pub(in crate::jetstream) fn is_empty(&self) -> bool {
        self.calls.is_empty() && self.batched.is_empty()
    }

    /// Returns all calls and the times of their claims.
    pub(in crate::jetstream) fn call_refs(&self) -> impl Iterator<Item = (CallRef, UnixMillis)> {
        let single = self.calls.values().flatten();
        let single = single.map(|(sequence, since)| (CallRef::single(*sequence), *since));
        let in_batch = self.batched.values().flatten().flat_map(|(sequence, since, bits)| {
            let indexes = (0..64).filter(move |index| bits >> index & 1 == 1);
            indexes.map(|index| (CallRef::in_batch(*sequence, index), *since))
        });
        single.chain(in_batch)
    }

    /// Returns the number of calls of a consumer, and the number of their messages.
    pub(in crate::jetstream) fn count(&self, consumer: &str) -> (usize, usize) {
        let single = self.calls.get(consumer).map_or(0, Vec::len);
        let groups = self.batched.get(consumer).map_or(&[][..], Vec::as_slice);
        let in_batch: u32 = groups.iter().map(|(.., bits)| bits.count_ones()).sum();
        let messages: BTreeSet<u64> = groups.iter().map(|(sequence, ..)| *sequence).collect();
        (single + in_batch as usize, single + messages.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jetstream::wire::json;

    #[test]
    fn a_running_list_contains_calls_and_times_of_their_claims() {
        let mut list = RunningList::default();
        let call_refs = [
            (CallRef::single(7), 1),
            (CallRef::in_batch(8, 0), 1),
            (CallRef::in_batch(8, 63), 1),
            (CallRef::in_batch(8, 5), 2),
        ];
        for (call_ref, since) in call_refs {
            list.add("fn,echo", call_ref, since);
        }
        let read: RunningList = serde_json::from_str(&json(&list)).unwrap();
        assert_eq!(read.call_refs().collect::<BTreeSet<_>>(), BTreeSet::from(call_refs));
        assert_eq!((read.count("fn,echo"), read.count("other")), ((4, 2), (0, 0)));
        let before: RunningList = serde_json::from_str(r#"{"calls":{"fn,echo":[[7,1]]}}"#).unwrap();
        assert_eq!(before.call_refs().collect::<Vec<_>>(), [(CallRef::single(7), 1)]);
    }
}
