//! The tables of the file.

use redb::TableDefinition;

use crate::queue::call::UnixMillis;
use crate::queue::embedded::schedule::Number;

/// Calls that are not over, and those that failed for good: as `Call::encode` writes them. Long ones, and those of a file
/// that an older gateway wrote.
pub(super) const CALLS: TableDefinition<'_, Number, &[u8]> = TableDefinition::new("calls");
/// All others of these, in rows of those that were taken in together.
pub(super) const BATCHES: TableDefinition<'_, Number, &[u8]> = TableDefinition::new("batches");
/// Which calls of a row are over; it goes when all are.
pub(super) const OVER: TableDefinition<'_, Number, &[u8]> = TableDefinition::new("over");
/// By id, of calls whose caller chose it. All others have their number in their id: to keep these, too, a table in the
/// order of random ids would be half of what a call costs.
pub(super) const NUMBERS: TableDefinition<'_, &str, Number> = TableDefinition::new("numbers");
/// `Status` as JSON, of calls that have been made but are not over, and of dead ones.
pub(super) const PROGRESS: TableDefinition<'_, Number, &[u8]> = TableDefinition::new("progress");
/// `Status` and answer of calls that are over: those with a long answer or a chosen id, and dead ones.
pub(super) const FINISHED: TableDefinition<'_, Number, &[u8]> = TableDefinition::new("finished");
/// The same of all others, in rows of those that ended together.
pub(super) const ENDED: TableDefinition<'_, Number, &[u8]> = TableDefinition::new("ended");
/// By idempotency key: the id that it stands for, and until when, on a line of its own.
pub(super) const KEYS: TableDefinition<'_, &str, &str> = TableDefinition::new("keys");
/// When what is kept for a while goes, and what it is.
pub(super) const EXPIRY: TableDefinition<'_, (UnixMillis, &str), ()> =
    TableDefinition::new("expiry");

/// What the file needs to know of itself.
pub(super) const ABOUT: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("about");
/// In `ABOUT`: what hides the numbers in ids.
pub(super) const SECRET: &str = "secret";
/// In `ABOUT`: how often the file has been changed, and a number that no call has, nor any above it.
pub(super) const CHANGES: &str = "changes";
/// An entry of `EXPIRY` for an idempotency key starts so, one for a row of `ENDED` in the other way; one for a finished
/// call is its number.
pub(super) const KEY: &str = "k:";
pub(super) const ROW: &str = "r:";
