//! Numbers of stored calls from the highest down, for lists that begin with the newest call.

use crate::queue::embedded::rows::{Marks, Row, SPAN};
use crate::queue::embedded::schedule::Number;
use crate::queue::embedded::store::{Result, Shelf, Stored, View};
use crate::queue::embedded::tables::{BATCHES, ENDED, OVER};

impl View {
    /// At most `limit` numbers of the calls that are on one of `shelves`, from `last` down, highest first.
    pub(super) fn numbers_down_from(
        &self,
        shelves: &[Shelf],
        last: Number,
        limit: usize,
    ) -> Result<Vec<Number>> {
        let mut numbers = Vec::new();
        for shelf in shelves {
            let single = self.read.open_table(shelf.single())?;
            for entry in single.range(..=last)?.rev().take(limit) {
                numbers.push(entry?.0.value());
            }
            match shelf {
                Shelf::Calls => self.rows_down_from(BATCHES, true, last, limit, &mut numbers)?,
                Shelf::Finished => self.rows_down_from(ENDED, false, last, limit, &mut numbers)?,
                Shelf::Progress => {}
            }
        }
        numbers.sort_unstable_by(|a, b| b.cmp(a));
        // A dead call is on two shelves.
        numbers.dedup();
        numbers.truncate(limit);
        Ok(numbers)
    }

    /// Adds the numbers of the calls in the rows of `table`. `marked`: some calls of a row may be over.
    fn rows_down_from(
        &self,
        table: Stored,
        marked: bool,
        last: Number,
        limit: usize,
        numbers: &mut Vec<Number>,
    ) -> Result<()> {
        let (over, start) = (self.read.open_table(OVER)?, numbers.len());
        for entry in self.read.open_table(table)?.range(..=last)?.rev() {
            // Rows overlap: one with a lower key can have numbers up to SPAN - 1 above its key. Of the numbers found
            // so far, all but SPAN are above anything that a row still to come can have.
            if numbers.len() - start >= limit.saturating_add(SPAN as usize) {
                break;
            }
            let (key, row) = entry?;
            let marks = if marked { over.get(key.value())? } else { None };
            let marks = marks.map(|marks| Marks::new(marks.value())).unwrap_or_default();
            let found = Row::new(row.value()).numbers().enumerate();
            let found = found.filter(|(index, number)| *number <= last && !marks.has(*index));
            numbers.extend(found.map(|(_, number)| number));
        }
        Ok(())
    }
}
