//! Descending scan of call numbers, for lists that begin with the newest call.

use crate::embedded::packed::{Bitmap, MAX_KEY_SPAN, PackedBatch};
use crate::embedded::schedule::CallSeq;
use crate::embedded::store::{CallTable, Snapshot, TableGroup};
use crate::embedded::tables::Result;
use crate::embedded::tables::{DONE_BITMAPS, FINISHED_BATCHES, PENDING_BATCHES};

impl Snapshot {
    /// At most `limit` numbers of calls in `groups`, from `last` downwards, in descending order.
    pub(super) fn numbers_down_from(
        &self,
        groups: &[TableGroup],
        last: CallSeq,
        limit: usize,
    ) -> Result<Vec<CallSeq>> {
        let mut numbers = Vec::new();
        for group in groups {
            let single = self.read.open_table(group.unpacked_table())?;
            for entry in single.range(..=last)?.rev().take(limit) {
                numbers.push(entry?.0.value());
            }
            match group {
                TableGroup::Calls => {
                    self.packed_numbers_down_from(PENDING_BATCHES, true, last, limit, &mut numbers)?
                }
                TableGroup::Finished => self.packed_numbers_down_from(
                    FINISHED_BATCHES,
                    false,
                    last,
                    limit,
                    &mut numbers,
                )?,
                TableGroup::Progress => {}
            }
        }
        numbers.sort_unstable_by(|a, b| b.cmp(a));
        // A dead letter is in two groups.
        numbers.dedup();
        numbers.truncate(limit);
        Ok(numbers)
    }

    /// Adds the numbers of calls in the batches of `table`. `marked`: some of the calls may be finished.
    fn packed_numbers_down_from(
        &self,
        table: CallTable,
        marked: bool,
        last: CallSeq,
        limit: usize,
        numbers: &mut Vec<CallSeq>,
    ) -> Result<()> {
        let (over, start) = (self.read.open_table(DONE_BITMAPS)?, numbers.len());
        for entry in self.read.open_table(table)?.range(..=last)?.rev() {
            // Batches overlap: one with a lower key can have numbers up to `MAX_KEY_SPAN - 1` above its key. All but
            // `MAX_KEY_SPAN` of the numbers found so far are above any number in the remaining batches.
            if numbers.len() - start >= limit.saturating_add(MAX_KEY_SPAN as usize) {
                break;
            }
            let (key, batch) = entry?;
            let bitmap = if marked { over.get(key.value())? } else { None };
            let bitmap = bitmap.map(|bitmap| Bitmap::new(bitmap.value())).unwrap_or_default();
            let entries = PackedBatch::new(batch.value()).numbers().enumerate();
            let entries = entries.filter(|(index, number)| *number <= last && !bitmap.has(*index));
            numbers.extend(entries.map(|(_, number)| number));
        }
        Ok(())
    }
}
