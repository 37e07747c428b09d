//! Reads and writes the file of the embedded queue. Only the writer thread writes.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use redb::{Database, ReadableDatabase, ReadableTable, RepairSession, TableDefinition, TableError};

use crate::Filter;
use crate::call::{QueuedCall, UnixMillis};
use crate::embedded::id_codec::CallIdCodec;
use crate::embedded::packed::{Bitmap, MAX_KEY_SPAN, PackedBatch};
use crate::embedded::panic_guard::catch_panic;
use crate::embedded::reserve::Reserve;
use crate::embedded::schedule::CallSeq;
use crate::embedded::tables::{
    CALLS, DONE_BITMAPS, FINISHED, FINISHED_BATCHES, ID_INDEX, ID_SECRET, META, PENDING_BATCHES,
    PROGRESS, Result, WATERMARK, find_batch, parse_record,
};
use crate::embedded::wal::WalBackend;
use crate::embedded::write_txn::WriteTxn;
use crate::embedded::{checksummed, result_codec};
use crate::status::{CallRecord, CallState, StoredResponse};

/// Page cache of redb.
const CACHE_BYTES: usize = 12 << 20;

/// The open file.
pub(super) struct Store {
    database: Database,
    ids: Arc<CallIdCodec>,
    has_wal: bool,
}

/// Returns whether redb is about to roll back the last commit, because it is incomplete or damaged.
pub(super) fn is_rollback(repair: &RepairSession) -> bool {
    // redb reports the step only as a progress value.
    (repair.progress() - 0.3).abs() < 0.01
}

/// A call found in the file when it was opened.
#[derive(Default)]
pub(super) struct RecoveredCall {
    pub(super) number: CallSeq,
    pub(super) label: String,
    pub(super) due: UnixMillis,
    pub(super) dead: bool,
    /// The call has a record in the file: it has been executed before.
    pub(super) has_record: bool,
    /// The call cannot be decoded. All other fields but the number are unset.
    pub(super) damaged: bool,
}

/// Position of the file: stored with each commit, so that a reopened file shows whether a failed commit is in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Watermark {
    /// Number of commits.
    pub(super) changes: u64,
    /// All calls have lower numbers.
    pub(super) next: CallSeq,
}

impl Store {
    /// Opens the file, or creates it.
    pub(super) fn open(path: &Path, reserve: &Arc<Reserve>) -> Result<Self> {
        catch_panic(|| Self::open_with(path, reserve, None))
    }

    /// As [`Self::open`]. A new file uses the id codec `ids`.
    pub(super) fn open_with(
        path: &Path,
        reserve: &Arc<Reserve>,
        ids: Option<CallIdCodec>,
    ) -> Result<Self> {
        let file = WalBackend::open(path, reserve)?;
        let (has_wal, is_complete) = (file.has_wal(), file.is_complete());
        let mut builder = Database::builder();
        // Without the check, redb trusts its file, and may panic long after opening it.
        builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
        builder.set_repair_callback(move |repair| {
            if is_complete && is_rollback(repair) {
                repair.abort();
            }
        });
        let database = builder.create_with_backend(file)?;
        let existing = existing_ids(&database)?;
        let is_complete = existing.is_some() && has_all_tables(&database)?;
        let ids = Arc::new(existing.or(ids).unwrap_or_else(CallIdCodec::random));
        // A complete file is not written when it is opened, so that it can be read on a full disk.
        if !is_complete {
            create_tables(&database, &ids)?;
        }
        Ok(Self { database, ids, has_wal })
    }

    /// Returns whether commits use the write-ahead log.
    pub(super) fn has_wal(&self) -> bool {
        self.has_wal
    }

    /// Compacts the file, and returns the free space to the disk.
    pub(super) fn compact(&mut self) -> Result<(), redb::CompactionError> {
        self.database.compact().map(drop)
    }

    /// Closes the file.
    ///
    /// # Errors
    ///
    /// When a part of the file may not be on the disk. The log has what is missing.
    pub(super) fn close(self) -> Result<()> {
        Ok(self.database.close()?)
    }

    pub(super) fn watermark(&self) -> Result<Watermark> {
        let about = self.database.begin_read()?.open_table(META)?;
        let stored = about.get(WATERMARK)?;
        Ok(stored.map_or(Watermark::default(), |stored| Watermark::read(stored.value())))
    }

    /// The codec for ids of calls in this file.
    pub(super) fn ids(&self) -> Arc<CallIdCodec> {
        Arc::clone(&self.ids)
    }

    /// Passes all calls that are not finished to `found`. Returns the next free number.
    pub(super) fn read_all(&self, mut found: impl FnMut(RecoveredCall)) -> Result<CallSeq> {
        let read = self.database.begin_read()?;
        let progress = read.open_table(PROGRESS)?;
        let last = read.open_table(FINISHED)?.last()?.map_or(0, |(number, _)| number.value());
        let mut next = self.watermark()?.next.max(last + 1);
        let mut visit = |number: CallSeq,
                         stored: Option<&[u8]>,
                         raw: Option<&[u8]>|
         -> Result<()> {
            next = next.max(number + 1);
            let Some(stored) = stored else {
                let id = raw.and_then(QueuedCall::extract_id);
                tracing::error!(call_id = id, number, "A queued call is damaged and set aside");
                found(RecoveredCall { number, damaged: true, ..RecoveredCall::default() });
                return Ok(());
            };
            let call = match CallRecord::from_stored(stored) {
                Ok(call) => call,
                Err(error) => {
                    // The call may be of a later version. It stays in the file.
                    let id = QueuedCall::extract_id(stored);
                    tracing::error!(call_id = id, number, %error, "A queued call cannot be read");
                    return Ok(());
                }
            };
            let status = progress.get(number)?.and_then(|json| parse_record(json.value()));
            let due = status.as_ref().and_then(|status| status.next_attempt_at);
            found(RecoveredCall {
                number,
                label: call.function,
                due: due.or(call.next_attempt_at).unwrap_or(0),
                has_record: status.is_some(),
                dead: status.is_some_and(|status| status.dead_letter),
                damaged: false,
            });
            Ok(())
        };
        for entry in read.open_table(CALLS)?.iter()? {
            let (number, stored) = entry?;
            let raw = stored.value();
            visit(number.value(), checksummed::open(raw).ok(), Some(checksummed::peek(raw)))?;
        }
        let over = read.open_table(DONE_BITMAPS)?;
        for entry in read.open_table(PENDING_BATCHES)?.iter()? {
            let (key, batch) = entry?;
            let bitmap = over.get(key.value())?.map(|bitmap| Bitmap::new(bitmap.value()));
            let bitmap = bitmap.unwrap_or_default();
            let batch = PackedBatch::new(batch.value());
            for (index, (number, stored)) in batch.all().enumerate() {
                if !bitmap.has(index) {
                    visit(number, stored, batch.unchecked(index))?;
                }
            }
        }
        Ok(next)
    }

    /// A snapshot of the file as it is now.
    pub(super) fn snapshot(&self) -> Result<Snapshot> {
        Ok(Snapshot { read: self.database.begin_read()?, ids: Arc::clone(&self.ids) })
    }

    /// Runs `txn` in a transaction that also stores `watermark`. Returns when the commit is on the disk.
    pub(super) fn write<T>(
        &self,
        watermark: Watermark,
        txn: impl FnOnce(&mut WriteTxn<'_>) -> Result<T>,
    ) -> Result<T> {
        let transaction = self.database.begin_write()?;
        let mut batch = WriteTxn::new(&transaction, Arc::clone(&self.ids));
        let changed = txn(&mut batch)?;
        batch.flush()?;
        transaction.open_table(META)?.insert(WATERMARK, &watermark.bytes()[..])?;
        transaction.commit()?;
        Ok(changed)
    }
}

impl Watermark {
    fn read(stored: &[u8]) -> Self {
        let (changes, next) = stored.split_at(stored.len().min(8));
        let number = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_be_bytes);
        Self { changes: number(changes), next: number(next) }
    }

    fn bytes(self) -> Vec<u8> {
        [self.changes.to_be_bytes(), self.next.to_be_bytes()].concat()
    }
}

/// The id codec of an existing file.
fn existing_ids(database: &Database) -> Result<Option<CallIdCodec>> {
    let read = database.begin_read()?;
    let about = match read.open_table(META) {
        Ok(about) => about,
        Err(TableError::TableDoesNotExist(_)) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let secret = about.get(ID_SECRET)?;
    Ok(secret.and_then(|secret| CallIdCodec::from_secret(secret.value())))
}

/// Returns whether all tables exist. Files of older gateways have no packed batches.
fn has_all_tables(database: &Database) -> Result<bool> {
    match database.begin_read()?.open_table(FINISHED_BATCHES) {
        Ok(_) => Ok(true),
        Err(TableError::TableDoesNotExist(_)) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn create_tables(database: &Database, ids: &Arc<CallIdCodec>) -> Result<()> {
    let txn = database.begin_write()?;
    txn.open_table(META)?.insert(ID_SECRET, &ids.secret()[..])?;
    WriteTxn::new(&txn, Arc::clone(ids)).create_tables()?;
    Ok(txn.commit()?)
}

/// A consistent view of the file.
pub(super) struct Snapshot {
    pub(super) read: redb::ReadTransaction,
    ids: Arc<CallIdCodec>,
}

impl Snapshot {
    pub(super) fn number_of(&self, id: &str) -> Result<Option<CallSeq>> {
        if let Some(number) = self.ids.decode(id)
            && self.id(number)?.as_deref() == Some(id)
        {
            return Ok(Some(number));
        }
        Ok(self.read.open_table(ID_INDEX)?.get(id)?.map(|number| number.value()))
    }

    /// The id of the call with this number.
    fn id(&self, number: CallSeq) -> Result<Option<String>> {
        if let Some(call) = self.pending_record(number)? {
            return Ok(Some(call.id));
        }
        Ok(self.finished(number)?.map(|(status, _)| status.id))
    }

    /// The id of a damaged call, if it can be read.
    pub(super) fn id_unchecked(&self, number: CallSeq) -> Result<Option<String>> {
        if let Some(stored) = self.read.open_table(CALLS)?.get(number)? {
            return Ok(QueuedCall::extract_id(checksummed::peek(stored.value())));
        }
        let batches = self.read.open_table(PENDING_BATCHES)?;
        let in_batch = find_batch(&batches, number)?.and_then(|(_, batch)| {
            let batch = PackedBatch::new(batch.value());
            QueuedCall::extract_id(batch.unchecked(batch.find(number)?)?)
        });
        let existing = || Ok(self.record(number)?.map(|status| status.id));
        in_batch.map_or_else(existing, |id| Ok(Some(id)))
    }

    /// The encoded call with this number, if it is stored unpacked.
    pub(super) fn stored_call(&self, number: CallSeq) -> Result<Option<Bytes>> {
        let stored = self.read.open_table(CALLS)?.get(number)?;
        let stored = stored.as_ref().and_then(|stored| checksummed::open(stored.value()).ok());
        Ok(stored.map(Bytes::copy_from_slice))
    }

    /// The batch that contains the call with this number.
    pub(super) fn pending_batch(&self, number: CallSeq) -> Result<Option<Bytes>> {
        let batches = self.read.open_table(PENDING_BATCHES)?;
        let batch = find_batch(&batches, number)?;
        Ok(batch.map(|(_, batch)| Bytes::copy_from_slice(batch.value())))
    }

    /// The record of a pending call as it was before its first attempt.
    pub(super) fn pending_record(&self, number: CallSeq) -> Result<Option<CallRecord>> {
        if let Some(stored) = self.read.open_table(CALLS)?.get(number)? {
            return Ok(CallRecord::from_stored(checksummed::peek(stored.value())).ok());
        }
        let batches = self.read.open_table(PENDING_BATCHES)?;
        let Some((key, batch)) = find_batch(&batches, number)? else { return Ok(None) };
        let batch = PackedBatch::new(batch.value());
        let Some(index) = batch.find(number) else { return Ok(None) };
        let bitmap = self.read.open_table(DONE_BITMAPS)?.get(key)?;
        if bitmap.is_some_and(|bitmap| Bitmap::new(bitmap.value()).has(index)) {
            return Ok(None);
        }
        // As for unpacked calls: a damaged call has a record and can be cancelled.
        Ok(batch.unchecked(index).and_then(|stored| CallRecord::from_stored(stored).ok()))
    }

    /// The stored record of a call that is not finished.
    pub(super) fn record(&self, number: CallSeq) -> Result<Option<CallRecord>> {
        let json = self.read.open_table(PROGRESS)?.get(number)?;
        Ok(json.and_then(|json| parse_record(json.value())))
    }

    pub(super) fn finished(
        &self,
        number: CallSeq,
    ) -> Result<Option<(CallRecord, Option<StoredResponse>)>> {
        if let Some(stored) = self.read.open_table(FINISHED)?.get(number)? {
            let stored = checksummed::open(stored.value()).ok();
            return Ok(
                stored.and_then(|stored| result_codec::decode(&Bytes::copy_from_slice(stored)))
            );
        }
        let ended = self.read.open_table(FINISHED_BATCHES)?;
        let Some((_, batch)) = find_batch(&ended, number)? else { return Ok(None) };
        let stored = PackedBatch::new(batch.value()).get(number);
        Ok(stored.and_then(|stored| result_codec::decode(&Bytes::copy_from_slice(stored))))
    }

    /// At most `limit` numbers of calls in `groups`, from `first` upwards, in ascending order.
    pub(super) fn numbers_from(
        &self,
        groups: &[TableGroup],
        first: CallSeq,
        limit: usize,
    ) -> Result<Vec<CallSeq>> {
        let mut numbers = Vec::new();
        for group in groups {
            for entry in self.read.open_table(group.unpacked_table())?.range(first..)?.take(limit) {
                numbers.push(entry?.0.value());
            }
            match group {
                TableGroup::Calls => {
                    self.packed_numbers_from(PENDING_BATCHES, true, first, limit, &mut numbers)?
                }
                TableGroup::Finished => {
                    self.packed_numbers_from(FINISHED_BATCHES, false, first, limit, &mut numbers)?
                }
                TableGroup::Progress => {}
            }
        }
        numbers.sort_unstable();
        // A dead letter is in two groups.
        numbers.dedup();
        numbers.truncate(limit);
        Ok(numbers)
    }

    /// Adds the numbers of calls in the batches of `table`. `marked`: some of the calls may be finished.
    fn packed_numbers_from(
        &self,
        table: CallTable,
        marked: bool,
        first: CallSeq,
        limit: usize,
        numbers: &mut Vec<CallSeq>,
    ) -> Result<()> {
        let (over, start) = (self.read.open_table(DONE_BITMAPS)?, numbers.len());
        for entry in self.read.open_table(table)?.range(first.saturating_sub(MAX_KEY_SPAN - 1)..)? {
            // Batches overlap: numbers less than `MAX_KEY_SPAN` above this key may also be in later batches, lower ones
            // cannot.
            if numbers.len() - start >= limit.saturating_add(MAX_KEY_SPAN as usize) {
                break;
            }
            let (key, batch) = entry?;
            let bitmap = if marked { over.get(key.value())? } else { None };
            let bitmap = bitmap.map(|bitmap| Bitmap::new(bitmap.value())).unwrap_or_default();
            let entries = PackedBatch::new(batch.value()).numbers().enumerate();
            let entries = entries.filter(|(index, number)| *number >= first && !bitmap.has(*index));
            numbers.extend(entries.map(|(_, number)| number));
        }
        Ok(())
    }
}

/// A group of tables, by the state of the calls in it.
#[derive(Clone, Copy, Debug)]
pub(super) enum TableGroup {
    /// Pending calls and dead letters.
    Calls,
    /// Executed calls that are not finished, and dead letters.
    Progress,
    /// Finished calls and dead letters.
    Finished,
}

pub(super) type CallTable = TableDefinition<'static, CallSeq, &'static [u8]>;

impl TableGroup {
    /// The groups that may contain matches of `filter`. A search for a few dead letters must not read a million other
    /// calls.
    pub(super) fn for_filter(filter: &Filter) -> &'static [Self] {
        match (filter.dead_letter, filter.state) {
            (Some(true), _) | (_, Some(CallState::Retrying)) => &[Self::Progress],
            (_, Some(CallState::Queued | CallState::Running)) => &[Self::Calls],
            (_, Some(CallState::Succeeded | CallState::Failed | CallState::Cancelled)) => {
                &[Self::Finished]
            }
            (_, None) => &[Self::Calls, Self::Finished],
        }
    }

    /// The table of the group's unpacked entries.
    pub(super) fn unpacked_table(self) -> CallTable {
        match self {
            Self::Calls => CALLS,
            Self::Progress => PROGRESS,
            Self::Finished => FINISHED,
        }
    }
}
