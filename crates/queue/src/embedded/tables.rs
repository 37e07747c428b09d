//! The tables of the file. Their stored names are part of the file format.

use redb::{AccessGuard, ReadableTable, TableDefinition};

use crate::call::UnixMillis;
use crate::embedded::packed::{MAX_KEY_SPAN, PackedBatch};
use crate::embedded::schedule::CallSeq;
use crate::status::CallRecord;

/// Result of an access to the file.
pub(super) type Result<T, E = redb::Error> = std::result::Result<T, E>;

/// Pending calls and dead letters, as [`QueuedCall::encode`](crate::call::QueuedCall::encode) writes them: those
/// that are too long for a batch, and those that an older gateway wrote.
pub(super) const CALLS: TableDefinition<'_, CallSeq, &[u8]> = TableDefinition::new("calls");
/// All other pending calls and dead letters, in batches of calls that were enqueued together.
pub(super) const PENDING_BATCHES: TableDefinition<'_, CallSeq, &[u8]> =
    TableDefinition::new("batches");
/// Bitmap of the finished calls of a batch. It is removed with the batch, when all its calls are finished.
pub(super) const DONE_BITMAPS: TableDefinition<'_, CallSeq, &[u8]> = TableDefinition::new("over");
/// Numbers of calls by id, for ids that the client chose. Generated ids contain the number: an index in the order of
/// random ids would cost half as much as all other work for a call.
pub(super) const ID_INDEX: TableDefinition<'_, &str, CallSeq> = TableDefinition::new("numbers");
/// `CallRecord` as JSON, of executed calls that are not finished, and of dead letters.
pub(super) const PROGRESS: TableDefinition<'_, CallSeq, &[u8]> = TableDefinition::new("progress");
/// Record and response of finished calls with a long response or a chosen id, and of dead letters.
pub(super) const FINISHED: TableDefinition<'_, CallSeq, &[u8]> = TableDefinition::new("finished");
/// Record and response of all other finished calls, in batches of calls that finished together.
pub(super) const FINISHED_BATCHES: TableDefinition<'_, CallSeq, &[u8]> =
    TableDefinition::new("ended");
/// By idempotency key: the id of its call and, on a second line, the time of expiry.
pub(super) const IDEMPOTENCY_KEYS: TableDefinition<'_, &str, &str> = TableDefinition::new("keys");
/// Times of expiry, each with the entry that expires.
pub(super) const EXPIRY: TableDefinition<'_, (UnixMillis, &str), ()> =
    TableDefinition::new("expiry");

/// Metadata of the file.
pub(super) const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("about");
/// In `META`: the secret of the id codec.
pub(super) const ID_SECRET: &str = "secret";
/// In `META`: the number of commits, and a number above that of each call.
pub(super) const WATERMARK: &str = "changes";
/// Prefixes of entries of `EXPIRY`: for an idempotency key, and for a batch of `FINISHED_BATCHES`. The entry of a
/// single finished call is its number.
pub(super) const KEY_EXPIRY_PREFIX: &str = "k:";
pub(super) const BATCH_EXPIRY_PREFIX: &str = "r:";

/// A value in a table.
type ValueGuard<'t> = AccessGuard<'t, &'static [u8]>;

/// The batch in `table` that contains `number`, with its key.
pub(super) fn find_batch<'t>(
    table: &'t impl ReadableTable<CallSeq, &'static [u8]>,
    number: CallSeq,
) -> Result<Option<(CallSeq, ValueGuard<'t>)>> {
    let keys = number.saturating_sub(MAX_KEY_SPAN - 1)..=number;
    for entry in table.range(keys)?.rev() {
        let (key, batch) = entry?;
        if PackedBatch::new(batch.value()).find(number).is_some() {
            return Ok(Some((key.value(), batch)));
        }
    }
    Ok(None)
}

/// Parses a record stored as JSON.
pub(super) fn parse_record(json: &[u8]) -> Option<CallRecord> {
    serde_json::from_slice(json).ok()
}
