//! A change of the file. It happens as a whole or not at all.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use redb::{Key, ReadableTable, Table, TableDefinition, Value, WriteTransaction};

use crate::queue::call::UnixMillis;
use crate::queue::embedded::ids::Ids;
use crate::queue::embedded::rows::{Marks, Row, SHORT, SPAN, rows};
use crate::queue::embedded::schedule::Number;
use crate::queue::embedded::store::{Result, parse, row_with};
use crate::queue::embedded::tables::{
    BATCHES, CALLS, ENDED, EXPIRY, FINISHED, KEY, KEYS, NUMBERS, OVER, PROGRESS, ROW,
};
use crate::queue::embedded::{finished, sealed};
use crate::queue::status::CallRecord;

/// One change of the file.
pub(super) struct Change<'t> {
    ids: Arc<Ids>,
    calls: Lazy<'t, Number, &'static [u8]>,
    batches: Lazy<'t, Number, &'static [u8]>,
    over: Lazy<'t, Number, &'static [u8]>,
    numbers: Lazy<'t, &'static str, Number>,
    progress: Lazy<'t, Number, &'static [u8]>,
    finished: Lazy<'t, Number, &'static [u8]>,
    ended: Lazy<'t, Number, &'static [u8]>,
    keys: Lazy<'t, &'static str, &'static str>,
    expiry: Lazy<'t, (UnixMillis, &'static str), ()>,
    /// Calls that are about to be a row.
    fresh: BTreeMap<Number, Bytes>,
    /// What is kept of calls that have ended, about to be a row, and until when.
    endings: BTreeMap<Number, (UnixMillis, Bytes)>,
    /// Rows some of whose calls are over by now.
    touched: BTreeMap<Number, Touched>,
    /// Calls of which something is noted now.
    noted: BTreeSet<Number>,
    /// What is to be taken out of rows of those that ended, by row.
    dropped: BTreeMap<Number, BTreeSet<Number>>,
}

/// A table that is opened when it is needed: most changes need few, and each has its price.
struct Lazy<'t, K: Key + 'static, V: Value + 'static> {
    transaction: &'t WriteTransaction,
    definition: TableDefinition<'static, K, V>,
    table: Option<Table<'t, K, V>>,
}

impl<'t, K: Key + 'static, V: Value + 'static> Lazy<'t, K, V> {
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

/// A row some of whose calls are over by now.
struct Touched {
    numbers: Vec<Number>,
    marks: Marks,
}

impl<'t> Change<'t> {
    pub(super) fn new(transaction: &'t WriteTransaction, ids: Arc<Ids>) -> Self {
        Self {
            ids,
            calls: Lazy::new(transaction, CALLS),
            batches: Lazy::new(transaction, BATCHES),
            over: Lazy::new(transaction, OVER),
            numbers: Lazy::new(transaction, NUMBERS),
            progress: Lazy::new(transaction, PROGRESS),
            finished: Lazy::new(transaction, FINISHED),
            ended: Lazy::new(transaction, ENDED),
            keys: Lazy::new(transaction, KEYS),
            expiry: Lazy::new(transaction, EXPIRY),
            fresh: BTreeMap::new(),
            endings: BTreeMap::new(),
            touched: BTreeMap::new(),
            noted: BTreeSet::new(),
            dropped: BTreeMap::new(),
        }
    }

    /// Makes all tables.
    pub(super) fn make_tables(mut self) -> Result<()> {
        self.calls.get()?;
        self.batches.get()?;
        self.over.get()?;
        self.numbers.get()?;
        self.progress.get()?;
        self.finished.get()?;
        self.keys.get()?;
        self.expiry.get()?;
        // The last one: where it is, all are.
        self.ended.get().map(drop)
    }

    /// Writes what was gathered.
    pub(super) fn finish_up(mut self) -> Result<()> {
        for (key, gone) in std::mem::take(&mut self.dropped) {
            self.drop_ended(key, &gone)?;
        }
        let fresh = self.fresh.iter().map(|(number, stored)| (*number, &stored[..]));
        for (key, row) in rows(fresh) {
            self.batches.get()?.insert(key, &*row)?;
        }
        while let Some((_, (until, _))) = self.endings.first_key_value() {
            let until = *until;
            let together = self.endings.extract_if(.., |_, (it, _)| *it == until);
            let together: Vec<_> = together.map(|(number, (_, record))| (number, record)).collect();
            let together = together.iter().map(|(number, record)| (*number, &record[..]));
            for (key, row) in rows(together) {
                self.end_row(key, row, until)?;
            }
        }
        for (key, row) in &self.touched {
            if row.marks.count() == row.numbers.len() {
                self.batches.get()?.remove(key)?;
                self.over.get()?.remove(key)?;
            } else {
                self.over.get()?.insert(key, row.marks.bytes())?;
            }
        }
        Ok(())
    }

    /// Adds a row of calls that have ended, to the one under its key if there is one: what was under it first may have
    /// been taken out, and has ended again.
    fn end_row(&mut self, key: Number, row: Vec<u8>, until: UnixMillis) -> Result<()> {
        let mut left = vec![(key, row)];
        while let Some((key, mut row)) = left.pop() {
            let before = self.ended.get()?.get(key)?.map(|before| before.value().to_vec());
            if let Some(before) = before {
                let all = Row::new(&before).entries().chain(Row::new(&row).entries());
                let all: BTreeMap<_, _> = all.collect();
                let mut merged = rows(all);
                left.extend(merged.split_off(1));
                row = merged.remove(0).1;
            }
            self.ended.get()?.insert(key, &*row)?;
            self.expiry.get()?.insert((until, format!("{ROW}{key}").as_str()), ())?;
        }
        Ok(())
    }

    /// The id that `key` stands for.
    pub(super) fn keyed(&mut self, key: &str) -> Result<Option<String>> {
        let known = self.keys.get()?.get(key)?.map(|known| id_and_end(known.value()).0.to_owned());
        let Some(id) = known else { return Ok(None) };
        // One that was purged stands for nothing any more.
        Ok(self.find(&id)?.map(|_| id))
    }

    pub(super) fn add(
        &mut self,
        number: Number,
        id: &str,
        chosen: bool,
        stored: &Bytes,
    ) -> Result<()> {
        if stored.len() > SHORT {
            put_sealed(self.calls.get()?, number, stored)?;
        } else {
            self.fresh.insert(number, stored.clone());
        }
        if chosen {
            self.number(id, number)?;
        }
        Ok(())
    }

    /// Notes which call has an id that tells nothing of its number.
    pub(super) fn number(&mut self, id: &str, number: Number) -> Result<()> {
        self.numbers.get()?.insert(id, number)?;
        Ok(())
    }

    pub(super) fn remember_key(&mut self, key: &str, id: &str, until: UnixMillis) -> Result<()> {
        self.keys.get()?.insert(key, format!("{id}\n{until}").as_str())?;
        self.expiry.get()?.insert((until, format!("{KEY}{key}").as_str()), ())?;
        Ok(())
    }

    /// Notes where a call is that is not over, or that is dead: its status as JSON.
    pub(super) fn note(&mut self, number: Number, status: &[u8]) -> Result<()> {
        self.noted.insert(number);
        self.progress.get()?.insert(number, status)?;
        Ok(())
    }

    /// Forgets what was noted: the call starts anew.
    pub(super) fn forget_progress(&mut self, number: Number) -> Result<()> {
        self.progress.get()?.remove(number)?;
        Ok(())
    }

    /// Ends a call; its state and answer, encoded, are kept until `until`. `noted`: something was noted of it before.
    /// `false` if it had ended before.
    pub(super) fn finish(
        &mut self,
        number: Number,
        record: Bytes,
        chosen: bool,
        until: UnixMillis,
        noted: bool,
    ) -> Result<bool> {
        let was_there = self.call_is_over(number)?;
        if !was_there {
            // Its worker was cut off while that was on its way, or it was dead.
            self.remove_ended(number)?;
        }
        if self.noted.remove(&number) || noted {
            self.progress.get()?.remove(number)?;
            // The answer of a dead call is kept one by one.
            self.finished.get()?.remove(number)?;
        }
        if chosen || record.len() > SHORT {
            put_sealed(self.finished.get()?, number, &record)?;
            self.expiry.get()?.insert((until, number.to_string().as_str()), ())?;
        } else {
            self.endings.insert(number, (until, record));
        }
        Ok(was_there)
    }

    /// Keeps the answer of a call that is dead: its status as JSON, and both, encoded.
    pub(super) fn keep_answer(&mut self, number: Number, note: &[u8], record: &[u8]) -> Result<()> {
        self.note(number, note)?;
        put_sealed(self.finished.get()?, number, record)
    }

    pub(super) fn drop_answer(&mut self, number: Number) -> Result<()> {
        self.finished.get()?.remove(number)?;
        Ok(())
    }

    /// Removes all trace of a call.
    pub(super) fn remove(&mut self, number: Number, id: &str) -> Result<()> {
        self.call_is_over(number)?;
        self.progress.get()?.remove(number)?;
        self.endings.remove(&number);
        if self.finished.get()?.remove(number)?.is_none() {
            self.remove_ended(number)?;
        }
        self.numbers.get()?.remove(id)?;
        Ok(())
    }

    /// Takes what is kept of a call out of its row, once this change is whole.
    fn remove_ended(&mut self, number: Number) -> Result<()> {
        if let Some((key, _)) = row_with(self.ended.get()?, number)? {
            self.dropped.entry(key).or_default().insert(number);
        }
        Ok(())
    }

    /// Takes entries out of a row. What is left keeps its key, and goes when it was to.
    fn drop_ended(&mut self, key: Number, gone: &BTreeSet<Number>) -> Result<()> {
        let ended = self.ended.get()?;
        let left = ended.get(key)?.and_then(|row| {
            let left = Row::new(row.value()).entries().filter(|(it, _)| !gone.contains(it));
            rows(left).into_iter().next()
        });
        match left {
            Some((_, row)) => ended.insert(key, &*row)?,
            None => ended.remove(key)?,
        };
        Ok(())
    }

    /// Removes the call itself; `false` if it was not there any more.
    fn call_is_over(&mut self, number: Number) -> Result<bool> {
        if self.fresh.remove(&number).is_some() {
            return Ok(true);
        }
        if let Some(was_there) = self.mark_touched(number) {
            return Ok(was_there);
        }
        let found = row_with(self.batches.get()?, number)?;
        let found = found.map(|(key, row)| (key, Row::new(row.value()).numbers().collect()));
        let Some((key, numbers)) = found else {
            return Ok(self.calls.get()?.remove(number)?.is_some());
        };
        let marks = self.over.get()?.get(key)?.map(|marks| Marks::new(marks.value()));
        self.touched.insert(key, Touched { numbers, marks: marks.unwrap_or_default() });
        Ok(self.mark_touched(number).unwrap_or(false))
    }

    /// Marks the call in a row that was looked at before, if it is in one; whether it was not marked yet.
    fn mark_touched(&mut self, number: Number) -> Option<bool> {
        let keys = number.saturating_sub(SPAN - 1)..=number;
        self.touched.range_mut(keys).rev().find_map(|(_, row)| {
            let index = row.numbers.binary_search(&number).ok()?;
            let was_there = !row.marks.has(index);
            row.marks.set(index);
            Some(was_there)
        })
    }

    /// The call with `id`, and what the file says of it.
    pub(super) fn find(&mut self, id: &str) -> Result<Option<(Number, CallRecord)>> {
        if let Some(number) = self.ids.number_in(id)
            && let Some(status) = self.status(number)?
            && status.id == id
        {
            return Ok(Some((number, status)));
        }
        let Some(number) = self.numbers.get()?.get(id)?.map(|number| number.value()) else {
            return Ok(None);
        };
        Ok(self.status(number)?.map(|status| (number, status)))
    }

    fn status(&mut self, number: Number) -> Result<Option<CallRecord>> {
        if let Some(status) = self.progress.get()?.get(number)?.and_then(|json| parse(json.value()))
        {
            return Ok(Some(status));
        }
        if let Some(queued) = self.queued(number)? {
            return Ok(Some(queued));
        }
        let decode = |stored: &[u8]| finished::decode(&Bytes::copy_from_slice(stored));
        let finished = match self.endings.get(&number) {
            Some((_, record)) => finished::decode(record),
            None => match self.finished.get()?.get(number)? {
                Some(stored) => sealed::open(stored.value()).ok().and_then(decode),
                None => row_with(self.ended.get()?, number)?
                    .filter(|(key, _)| {
                        !self.dropped.get(key).is_some_and(|it| it.contains(&number))
                    })
                    .and_then(|(_, row)| decode(Row::new(row.value()).get(number)?)),
            },
        };
        Ok(finished.map(|(status, _)| status))
    }

    /// The status of a call that is not over, as if nothing had been noted of it.
    fn queued(&mut self, number: Number) -> Result<Option<CallRecord>> {
        if let Some(stored) = self.fresh.get(&number) {
            return Ok(CallRecord::from_stored(stored).ok());
        }
        if let Some(stored) = self.calls.get()?.get(number)? {
            return Ok(CallRecord::from_stored(sealed::peek(stored.value())).ok());
        }
        let Some((key, row)) = row_with(self.batches.get()?, number)? else { return Ok(None) };
        let row = Row::new(row.value());
        let Some(index) = row.find(number) else { return Ok(None) };
        let over = match self.touched.get(&key) {
            Some(touched) => touched.marks.has(index),
            None => self.over.get()?.get(key)?.is_some_and(|it| Marks::new(it.value()).has(index)),
        };
        // As with a call that is kept alone: one that is damaged can still be cancelled.
        let stored = row.unchecked(index).filter(|_| !over);
        Ok(stored.and_then(|stored| CallRecord::from_stored(stored).ok()))
    }

    /// Forgets the results, or rows of them, that would be forgotten next, at most `most`; how many.
    pub(super) fn forget_oldest(&mut self, most: usize) -> Result<u64> {
        let mut due = Vec::new();
        for entry in self.expiry.get()?.iter()? {
            let (entry, ()) = entry.map(|(key, _)| (key, ()))?;
            let (at, what) = entry.value();
            // A call that is submitted again under its key must not be executed again.
            if !what.starts_with(KEY) {
                due.push((at, what.to_owned()));
            }
            if due.len() == most {
                break;
            }
        }
        let forgotten = due.len() as u64;
        for (at, what) in due {
            self.expire_entry(at, &what)?;
        }
        Ok(forgotten)
    }

    /// Forgets what has been kept until `now`, at most `most` of it; whether there is more.
    pub(super) fn sweep_expired(&mut self, now: UnixMillis, most: usize) -> Result<bool> {
        let mut due = Vec::new();
        for entry in self.expiry.get()?.range(..(now, ""))?.take(most) {
            let (entry, ()) = entry.map(|(key, _)| (key, ()))?;
            let (at, what) = entry.value();
            due.push((at, what.to_owned()));
        }
        let more = due.len() == most;
        for (at, what) in due {
            self.expire_entry(at, &what)?;
        }
        Ok(more)
    }

    fn expire_entry(&mut self, at: UnixMillis, what: &str) -> Result<()> {
        self.expiry.get()?.remove((at, what))?;
        if let Some(key) = what.strip_prefix(KEY) {
            self.expire_key(key, at)?;
        } else if let Some(key) = what.strip_prefix(ROW).and_then(|key| key.parse().ok()) {
            let key: Number = key;
            self.ended.get()?.remove(key)?;
        } else if let Ok(number) = what.parse::<Number>() {
            let gone = self.finished.get()?.remove(number)?;
            let gone = gone
                .and_then(|it| finished::decode(&Bytes::copy_from_slice(sealed::peek(it.value()))));
            if let Some((status, _)) = gone {
                self.numbers.get()?.remove(status.id.as_str())?;
            }
        }
        Ok(())
    }

    fn expire_key(&mut self, key: &str, at: UnixMillis) -> Result<()> {
        // A key whose call was purged may stand for a later one meanwhile.
        let known = self.keys.get()?.get(key)?;
        let is_due = known.is_none_or(|it| id_and_end(it.value()).1.is_none_or(|end| end <= at));
        if is_due {
            self.keys.get()?.remove(key)?;
        }
        Ok(())
    }
}

/// Puts `stored` into `table` with its checksum.
fn put_sealed(
    table: &mut Table<'_, Number, &'static [u8]>,
    number: Number,
    stored: &[u8],
) -> Result<()> {
    let mut place = table.insert_reserve(number, sealed::length(stored))?;
    sealed::seal_into(stored, place.as_mut());
    Ok(())
}

/// The id that a key stands for, and until when, if that is known.
fn id_and_end(stored: &str) -> (&str, Option<UnixMillis>) {
    match stored.split_once('\n') {
        Some((id, end)) => (id, end.parse().ok()),
        None => (stored, None),
    }
}
