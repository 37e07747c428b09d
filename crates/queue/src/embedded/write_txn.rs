//! A write transaction. It is applied as a whole or not at all.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use redb::{Key, ReadableTable, Table, TableDefinition, Value, WriteTransaction};

use crate::call::UnixMillis;
use crate::embedded::id_codec::CallIdCodec;
use crate::embedded::packed::{Bitmap, MAX_KEY_SPAN, MAX_PACKED_ENTRY_BYTES, PackedBatch, pack};
use crate::embedded::schedule::CallSeq;
use crate::embedded::tables::{
    BATCH_EXPIRY_PREFIX, CALLS, DONE_BITMAPS, EXPIRY, FINISHED, FINISHED_BATCHES, ID_INDEX,
    IDEMPOTENCY_KEYS, KEY_EXPIRY_PREFIX, PENDING_BATCHES, PROGRESS,
};
use crate::embedded::tables::{Result, find_batch, parse_record};
use crate::embedded::{checksummed, result_codec};
use crate::status::CallRecord;

/// One write transaction. Packed batches are collected and written by [`Self::flush`].
pub(super) struct WriteTxn<'t> {
    ids: Arc<CallIdCodec>,
    calls: LazyTable<'t, CallSeq, &'static [u8]>,
    pending_batches: LazyTable<'t, CallSeq, &'static [u8]>,
    done_bitmaps: LazyTable<'t, CallSeq, &'static [u8]>,
    id_index: LazyTable<'t, &'static str, CallSeq>,
    progress: LazyTable<'t, CallSeq, &'static [u8]>,
    finished: LazyTable<'t, CallSeq, &'static [u8]>,
    finished_batches: LazyTable<'t, CallSeq, &'static [u8]>,
    keys: LazyTable<'t, &'static str, &'static str>,
    expiry: LazyTable<'t, (UnixMillis, &'static str), ()>,
    /// New calls, written as a batch.
    new_calls: BTreeMap<CallSeq, Bytes>,
    /// Results of finished calls, with their times of expiry, written as batches.
    finished_batch: BTreeMap<CallSeq, (UnixMillis, Bytes)>,
    /// Batches of pending calls with newly finished calls.
    dirty: BTreeMap<CallSeq, DirtyBatch>,
    /// Calls whose record is stored by this transaction.
    recorded: BTreeSet<CallSeq>,
    /// Results to remove from batches of finished calls, by the key of the batch.
    removed_results: BTreeMap<CallSeq, BTreeSet<CallSeq>>,
}

/// A table that is opened on first use. Most transactions need few tables, and opening one is not free.
struct LazyTable<'t, K: Key + 'static, V: Value + 'static> {
    transaction: &'t WriteTransaction,
    definition: TableDefinition<'static, K, V>,
    table: Option<Table<'t, K, V>>,
}

impl<'t, K: Key + 'static, V: Value + 'static> LazyTable<'t, K, V> {
    fn new(transaction: &'t WriteTransaction, definition: TableDefinition<'static, K, V>) -> Self {
        Self { transaction, definition, table: None }
    }

    fn get(&mut self) -> Result<&mut Table<'t, K, V>> {
        match &mut self.table {
            Some(table) => Ok(table),
            table => Ok(table.insert(self.transaction.open_table(self.definition)?)),
        }
    }
}

/// A batch with newly finished calls.
struct DirtyBatch {
    numbers: Vec<CallSeq>,
    done: Bitmap,
}

impl<'t> WriteTxn<'t> {
    pub(super) fn new(transaction: &'t WriteTransaction, ids: Arc<CallIdCodec>) -> Self {
        Self {
            ids,
            calls: LazyTable::new(transaction, CALLS),
            pending_batches: LazyTable::new(transaction, PENDING_BATCHES),
            done_bitmaps: LazyTable::new(transaction, DONE_BITMAPS),
            id_index: LazyTable::new(transaction, ID_INDEX),
            progress: LazyTable::new(transaction, PROGRESS),
            finished: LazyTable::new(transaction, FINISHED),
            finished_batches: LazyTable::new(transaction, FINISHED_BATCHES),
            keys: LazyTable::new(transaction, IDEMPOTENCY_KEYS),
            expiry: LazyTable::new(transaction, EXPIRY),
            new_calls: BTreeMap::new(),
            finished_batch: BTreeMap::new(),
            dirty: BTreeMap::new(),
            recorded: BTreeSet::new(),
            removed_results: BTreeMap::new(),
        }
    }

    /// Creates all tables.
    pub(super) fn create_tables(mut self) -> Result<()> {
        self.calls.get()?;
        self.pending_batches.get()?;
        self.done_bitmaps.get()?;
        self.id_index.get()?;
        self.progress.get()?;
        self.finished.get()?;
        self.keys.get()?;
        self.expiry.get()?;
        // Created last: if it exists, all tables do.
        self.finished_batches.get().map(drop)
    }

    /// Writes the collected batches.
    pub(super) fn flush(mut self) -> Result<()> {
        for (key, removed) in std::mem::take(&mut self.removed_results) {
            self.rewrite_finished_batch(key, &removed)?;
        }
        let new_calls = self.new_calls.iter().map(|(number, stored)| (*number, &stored[..]));
        for (key, batch) in pack(new_calls) {
            self.pending_batches.get()?.insert(key, &*batch)?;
        }
        while let Some((_, (until, _))) = self.finished_batch.first_key_value() {
            let until = *until;
            let same_expiry = self.finished_batch.extract_if(.., |_, (expiry, _)| *expiry == until);
            let same_expiry: Vec<_> =
                same_expiry.map(|(number, (_, record))| (number, record)).collect();
            let same_expiry = same_expiry.iter().map(|(number, record)| (*number, &record[..]));
            for (key, batch) in pack(same_expiry) {
                self.insert_finished_batch(key, batch, until)?;
            }
        }
        for (key, batch) in &self.dirty {
            if batch.done.count() == batch.numbers.len() {
                self.pending_batches.get()?.remove(key)?;
                self.done_bitmaps.get()?.remove(key)?;
            } else {
                self.done_bitmaps.get()?.insert(key, batch.done.bytes())?;
            }
        }
        Ok(())
    }

    /// Inserts a batch of finished calls, merged with the one under the same key if there is one: its first call may
    /// have been removed and have finished again.
    fn insert_finished_batch(
        &mut self,
        key: CallSeq,
        batch: Vec<u8>,
        until: UnixMillis,
    ) -> Result<()> {
        let mut left = vec![(key, batch)];
        while let Some((key, mut batch)) = left.pop() {
            let before =
                self.finished_batches.get()?.get(key)?.map(|before| before.value().to_vec());
            if let Some(before) = before {
                let all =
                    PackedBatch::new(&before).entries().chain(PackedBatch::new(&batch).entries());
                let all: BTreeMap<_, _> = all.collect();
                let mut merged = pack(all);
                left.extend(merged.split_off(1));
                batch = merged.remove(0).1;
            }
            self.finished_batches.get()?.insert(key, &*batch)?;
            self.expiry
                .get()?
                .insert((until, format!("{BATCH_EXPIRY_PREFIX}{key}").as_str()), ())?;
        }
        Ok(())
    }

    /// The id of the call with the idempotency key `key`.
    pub(super) fn id_for_key(&mut self, key: &str) -> Result<Option<String>> {
        let entry =
            self.keys.get()?.get(key)?.map(|entry| parse_key_entry(entry.value()).0.to_owned());
        let Some(id) = entry else { return Ok(None) };
        // The key of a deleted call is free.
        Ok(self.find(&id)?.map(|_| id))
    }

    pub(super) fn add(
        &mut self,
        number: CallSeq,
        id: &str,
        needs_id_index: bool,
        stored: &Bytes,
    ) -> Result<()> {
        if stored.len() > MAX_PACKED_ENTRY_BYTES {
            insert_checksummed(self.calls.get()?, number, stored)?;
        } else {
            self.new_calls.insert(number, stored.clone());
        }
        if needs_id_index {
            self.index_id(id, number)?;
        }
        Ok(())
    }

    /// Adds an id that does not contain the call's number to the index.
    pub(super) fn index_id(&mut self, id: &str, number: CallSeq) -> Result<()> {
        self.id_index.get()?.insert(id, number)?;
        Ok(())
    }

    pub(super) fn store_key(&mut self, key: &str, id: &str, until: UnixMillis) -> Result<()> {
        self.keys.get()?.insert(key, format!("{id}\n{until}").as_str())?;
        self.expiry.get()?.insert((until, format!("{KEY_EXPIRY_PREFIX}{key}").as_str()), ())?;
        Ok(())
    }

    /// Stores the record, as JSON, of a call that is not finished or that is a dead letter.
    pub(super) fn store_record(&mut self, number: CallSeq, status: &[u8]) -> Result<()> {
        self.recorded.insert(number);
        self.progress.get()?.insert(number, status)?;
        Ok(())
    }

    /// Removes the record of a call, which starts from the beginning.
    pub(super) fn remove_record(&mut self, number: CallSeq) -> Result<()> {
        self.progress.get()?.remove(number)?;
        Ok(())
    }

    /// Finishes a call. `record`, its encoded record and response, is kept until `until`. `has_record`: the call has a
    /// stored record. Returns `false` if it had already finished.
    pub(super) fn finish(
        &mut self,
        number: CallSeq,
        record: Bytes,
        needs_id_index: bool,
        until: UnixMillis,
        has_record: bool,
    ) -> Result<bool> {
        let was_pending = self.remove_pending(number)?;
        if !was_pending {
            // Its worker was interrupted while the result was on its way, or the call was a dead letter.
            self.remove_from_finished_batch(number)?;
        }
        if self.recorded.remove(&number) || has_record {
            self.progress.get()?.remove(number)?;
            // Responses of dead letters are stored unpacked.
            self.finished.get()?.remove(number)?;
        }
        if needs_id_index || record.len() > MAX_PACKED_ENTRY_BYTES {
            insert_checksummed(self.finished.get()?, number, &record)?;
            self.expiry.get()?.insert((until, number.to_string().as_str()), ())?;
        } else {
            self.finished_batch.insert(number, (until, record));
        }
        Ok(was_pending)
    }

    /// Stores a dead letter: its record as JSON, and its encoded record and response.
    pub(super) fn store_dead_letter(
        &mut self,
        number: CallSeq,
        record_json: &[u8],
        record: &[u8],
    ) -> Result<()> {
        self.store_record(number, record_json)?;
        insert_checksummed(self.finished.get()?, number, record)
    }

    pub(super) fn remove_result(&mut self, number: CallSeq) -> Result<()> {
        self.finished.get()?.remove(number)?;
        Ok(())
    }

    /// Deletes a call and its result.
    pub(super) fn remove(&mut self, number: CallSeq, id: &str) -> Result<()> {
        self.remove_pending(number)?;
        self.progress.get()?.remove(number)?;
        self.finished_batch.remove(&number);
        if self.finished.get()?.remove(number)?.is_none() {
            self.remove_from_finished_batch(number)?;
        }
        self.id_index.get()?.remove(id)?;
        Ok(())
    }

    /// Removes a result from its batch when this transaction is flushed.
    fn remove_from_finished_batch(&mut self, number: CallSeq) -> Result<()> {
        if let Some((key, _)) = find_batch(self.finished_batches.get()?, number)? {
            self.removed_results.entry(key).or_default().insert(number);
        }
        Ok(())
    }

    /// Removes entries from a batch. The others keep their key and time of expiry.
    fn rewrite_finished_batch(&mut self, key: CallSeq, removed: &BTreeSet<CallSeq>) -> Result<()> {
        let batches = self.finished_batches.get()?;
        let left = batches.get(key)?.and_then(|batch| {
            let left = PackedBatch::new(batch.value())
                .entries()
                .filter(|(number, _)| !removed.contains(number));
            pack(left).into_iter().next()
        });
        match left {
            Some((_, batch)) => batches.insert(key, &*batch)?,
            None => batches.remove(key)?,
        };
        Ok(())
    }

    /// Removes a pending call. Returns `false` if it was not pending any more.
    fn remove_pending(&mut self, number: CallSeq) -> Result<bool> {
        if self.new_calls.remove(&number).is_some() {
            return Ok(true);
        }
        if let Some(was_pending) = self.mark_done(number) {
            return Ok(was_pending);
        }
        let found = find_batch(self.pending_batches.get()?, number)?;
        let found =
            found.map(|(key, batch)| (key, PackedBatch::new(batch.value()).numbers().collect()));
        let Some((key, numbers)) = found else {
            return Ok(self.calls.get()?.remove(number)?.is_some());
        };
        let done = self.done_bitmaps.get()?.get(key)?.map(|done| Bitmap::new(done.value()));
        self.dirty.insert(key, DirtyBatch { numbers, done: done.unwrap_or_default() });
        Ok(self.mark_done(number).unwrap_or(false))
    }

    /// Marks a call as finished if its batch is already loaded. Returns whether it was unmarked before.
    fn mark_done(&mut self, number: CallSeq) -> Option<bool> {
        let keys = number.saturating_sub(MAX_KEY_SPAN - 1)..=number;
        self.dirty.range_mut(keys).rev().find_map(|(_, batch)| {
            let index = batch.numbers.binary_search(&number).ok()?;
            let was_pending = !batch.done.has(index);
            batch.done.set(index);
            Some(was_pending)
        })
    }

    /// Finds a call by id, with its record.
    pub(super) fn find(&mut self, id: &str) -> Result<Option<(CallSeq, CallRecord)>> {
        if let Some(number) = self.ids.decode(id)
            && let Some(status) = self.record(number)?
            && status.id == id
        {
            return Ok(Some((number, status)));
        }
        let Some(number) = self.id_index.get()?.get(id)?.map(|number| number.value()) else {
            return Ok(None);
        };
        Ok(self.record(number)?.map(|status| (number, status)))
    }

    fn record(&mut self, number: CallSeq) -> Result<Option<CallRecord>> {
        if let Some(status) =
            self.progress.get()?.get(number)?.and_then(|json| parse_record(json.value()))
        {
            return Ok(Some(status));
        }
        if let Some(queued) = self.pending_record(number)? {
            return Ok(Some(queued));
        }
        let decode = |stored: &[u8]| result_codec::decode(&Bytes::copy_from_slice(stored));
        let finished = match self.finished_batch.get(&number) {
            Some((_, record)) => result_codec::decode(record),
            None => match self.finished.get()?.get(number)? {
                Some(stored) => checksummed::open(stored.value()).ok().and_then(decode),
                None => find_batch(self.finished_batches.get()?, number)?
                    .filter(|(key, _)| {
                        !self
                            .removed_results
                            .get(key)
                            .is_some_and(|removed| removed.contains(&number))
                    })
                    .and_then(|(_, batch)| decode(PackedBatch::new(batch.value()).get(number)?)),
            },
        };
        Ok(finished.map(|(status, _)| status))
    }

    /// The record of a pending call as it was before its first attempt.
    fn pending_record(&mut self, number: CallSeq) -> Result<Option<CallRecord>> {
        if let Some(stored) = self.new_calls.get(&number) {
            return Ok(CallRecord::from_stored(stored).ok());
        }
        if let Some(stored) = self.calls.get()?.get(number)? {
            return Ok(CallRecord::from_stored(checksummed::peek(stored.value())).ok());
        }
        let Some((key, batch)) = find_batch(self.pending_batches.get()?, number)? else {
            return Ok(None);
        };
        let batch = PackedBatch::new(batch.value());
        let Some(index) = batch.find(number) else { return Ok(None) };
        let over = match self.dirty.get(&key) {
            Some(touched) => touched.done.has(index),
            None => self
                .done_bitmaps
                .get()?
                .get(key)?
                .is_some_and(|bitmap| Bitmap::new(bitmap.value()).has(index)),
        };
        // As for unpacked calls: a damaged call can still be cancelled.
        let stored = batch.unchecked(index).filter(|_| !over);
        Ok(stored.and_then(|stored| CallRecord::from_stored(stored).ok()))
    }

    /// Deletes at most `limit` results or batches of results, those that expire next. Returns their number.
    pub(super) fn evict_oldest_results(&mut self, limit: usize) -> Result<u64> {
        let mut due = Vec::new();
        for entry in self.expiry.get()?.iter()? {
            let (entry, ()) = entry.map(|(key, _)| (key, ()))?;
            let (at, what) = entry.value();
            // Idempotency keys are kept: a call submitted again under its key must not be executed again.
            if !what.starts_with(KEY_EXPIRY_PREFIX) {
                due.push((at, what.to_owned()));
            }
            if due.len() == limit {
                break;
            }
        }
        let forgotten = due.len() as u64;
        for (at, what) in due {
            self.expire_entry(at, &what)?;
        }
        Ok(forgotten)
    }

    /// Removes at most `limit` entries that expired before `now`. Returns whether there are more.
    pub(super) fn sweep_expired(&mut self, now: UnixMillis, limit: usize) -> Result<bool> {
        let mut due = Vec::new();
        for entry in self.expiry.get()?.range(..(now, ""))?.take(limit) {
            let (entry, ()) = entry.map(|(key, _)| (key, ()))?;
            let (at, what) = entry.value();
            due.push((at, what.to_owned()));
        }
        let more = due.len() == limit;
        for (at, what) in due {
            self.expire_entry(at, &what)?;
        }
        Ok(more)
    }

    fn expire_entry(&mut self, at: UnixMillis, what: &str) -> Result<()> {
        self.expiry.get()?.remove((at, what))?;
        if let Some(key) = what.strip_prefix(KEY_EXPIRY_PREFIX) {
            self.expire_key(key, at)?;
        } else if let Some(key) =
            what.strip_prefix(BATCH_EXPIRY_PREFIX).and_then(|key| key.parse().ok())
        {
            let key: CallSeq = key;
            self.finished_batches.get()?.remove(key)?;
        } else if let Ok(number) = what.parse::<CallSeq>() {
            let removed = self.finished.get()?.remove(number)?;
            let removed = removed.and_then(|stored| {
                result_codec::decode(&Bytes::copy_from_slice(checksummed::peek(stored.value())))
            });
            if let Some((status, _)) = removed {
                self.id_index.get()?.remove(status.id.as_str())?;
            }
        }
        Ok(())
    }

    fn expire_key(&mut self, key: &str, at: UnixMillis) -> Result<()> {
        // The key of a deleted call may belong to a later call by now.
        let entry = self.keys.get()?.get(key)?;
        let is_due =
            entry.is_none_or(|entry| parse_key_entry(entry.value()).1.is_none_or(|end| end <= at));
        if is_due {
            self.keys.get()?.remove(key)?;
        }
        Ok(())
    }
}

/// Inserts `stored` with its checksum.
fn insert_checksummed(
    table: &mut Table<'_, CallSeq, &'static [u8]>,
    number: CallSeq,
    stored: &[u8],
) -> Result<()> {
    let mut place = table.insert_reserve(number, checksummed::length(stored))?;
    checksummed::seal_into(stored, place.as_mut());
    Ok(())
}

/// Splits an idempotency entry into the call's id and the time of expiry, if known.
fn parse_key_entry(stored: &str) -> (&str, Option<UnixMillis>) {
    match stored.split_once('\n') {
        Some((id, end)) => (id, end.parse().ok()),
        None => (stored, None),
    }
}
