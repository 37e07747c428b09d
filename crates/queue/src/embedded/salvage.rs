//! Checks a queue's file, and copies everything that can be read of a damaged one.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use anyhow::{Context, bail};
use bytes::Bytes;
use redb::{ConcurrencyMode, Database, ReadOnlyDatabase, ReadableDatabase, ReadableTable};

use crate::call::UnixMillis;
use crate::embedded::id_codec::CallIdCodec;
use crate::embedded::overlay::{Overlay, ReadBudget};
use crate::embedded::packed::{Bitmap, PackedBatch};
use crate::embedded::panic_guard::catch_panic;
use crate::embedded::reserve::Reserve;
use crate::embedded::schedule::CallSeq;
use crate::embedded::store::{self, CallTable, Store, Watermark};
use crate::embedded::tables::{self, parse_record};
use crate::embedded::tables::{
    CALLS, DONE_BITMAPS, FINISHED, FINISHED_BATCHES, ID_SECRET, IDEMPOTENCY_KEYS, META,
    PENDING_BATCHES, PROGRESS,
};
use crate::embedded::write_txn::WriteTxn;
use crate::embedded::{checksummed, result_codec};
use crate::now;
use crate::status::CallRecord;

/// Time to live of copied results, since their time of expiry may be unreadable.
const RESULT_TTL_MILLIS: UnixMillis = 60 * 60 * 1000;
/// Maximum number of items, and of bytes, per commit to the copy.
const MAX_ITEMS_PER_COMMIT: usize = 512;
const MAX_COMMIT_BYTES: usize = 4 << 20;
/// Page cache for the file that is checked.
const CACHE_BYTES: usize = 4 << 20;

/// Result of a check or a copy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SalvageReport {
    /// Error of redb when opening the file.
    pub open_error: Option<String>,
    /// Number of pending calls and dead letters.
    pub calls: u64,
    pub damaged_calls: u64,
    pub results: u64,
    pub damaged_results: u64,
    /// Number of unreadable ranges of the file. Their entries are not counted.
    pub unreadable_ranges: u64,
    /// The last commit did not reach the disk, and is rolled back when the queue is opened.
    pub last_commit_rolled_back: bool,
    /// The table of finished calls is unreadable: some of `calls` may have been executed.
    pub completion_unknown: bool,
}

impl SalvageReport {
    pub fn is_intact(&self) -> bool {
        let Self { open_error, damaged_calls, damaged_results, unreadable_ranges, .. } = self;
        open_error.is_none() && damaged_calls + damaged_results + unreadable_ranges == 0
    }
}

/// An item to copy.
enum Item {
    Call { number: CallSeq, status: CallRecord, stored: Bytes },
    Result { number: CallSeq, status: CallRecord, record: Bytes },
    Progress { number: CallSeq, json: Vec<u8> },
    Key { key: String, id: String, until: UnixMillis },
}

/// Reads the whole file at `path` without changing it.
///
/// # Errors
///
/// When the file is in use, or nothing in it can be read.
pub fn check(path: &Path) -> anyhow::Result<SalvageReport> {
    let rolled_back = Arc::<AtomicBool>::default();
    let open_error = catch_panic(|| {
        let overlay = Overlay::open(path)?;
        let (is_complete, sets_rolled_back) = (overlay.is_complete(), Arc::clone(&rolled_back));
        let mut builder = Database::builder();
        builder.set_check_integrity_on_open(true).set_cache_size(CACHE_BYTES);
        // Like opening the queue: without a log, the last commit may be incomplete and is rolled back.
        builder.set_repair_callback(move |repair| match store::is_rollback(repair) {
            true if is_complete => repair.abort(),
            is_rollback => _ = sets_rolled_back.fetch_or(is_rollback, Relaxed),
        });
        builder.create_with_backend(overlay)?;
        Ok(())
    });
    let open_error = open_error.err().map(|error| error.to_string());
    let rolled_back = rolled_back.load(Relaxed) && open_error.is_none();
    let versions: &[FileVersion] = match rolled_back {
        true => &[FileVersion::Previous],
        false => &FileVersion::ALL,
    };
    let mut report = DamagedFile::open(path, versions)?.read(&mut |_| Ok(()))?;
    (report.open_error, report.last_commit_rolled_back) = (open_error, rolled_back);
    Ok(report)
}

/// Copies everything that can be read of the file at `path` to a new file at `out`.
///
/// # Errors
///
/// When `out` exists, nothing can be read, or the copy cannot be written. An incomplete copy must be removed.
pub fn salvage(path: &Path, out: &Path) -> anyhow::Result<SalvageReport> {
    if out.exists() {
        bail!("{} exists already", out.display());
    }
    let file = DamagedFile::open(path, &FileVersion::ALL)?;
    let side_files = ["journal", "reserve"].map(|name| out.with_extension(name));
    let report = file.copy(out, &side_files[1]).with_context(|| {
        let out = out.display();
        format!("the copy {out} is incomplete: remove it, its .journal and its .reserve")
    })?;
    // The copy was closed, and is complete without these files.
    for path in side_files {
        std::fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(report)
}

/// The two commits that a file contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FileVersion {
    Last,
    /// The commit before the last one.
    Previous,
}

impl FileVersion {
    /// The previous commit is better than nothing.
    const ALL: [Self; 2] = [Self::Last, Self::Previous];
}

/// A possibly damaged file, read without repair.
struct DamagedFile {
    database: ReadOnlyDatabase,
    read_budget: Arc<ReadBudget>,
}

impl DamagedFile {
    /// Opens the first of `versions` that can be opened.
    fn open(path: &Path, versions: &[FileVersion]) -> anyhow::Result<Self> {
        let mut last = None;
        for version in versions {
            let opened = catch_panic(|| {
                let previous = *version == FileVersion::Previous;
                let (overlay, read_budget) = Overlay::open_unchecked(path, previous)?;
                let mut builder = Database::builder();
                // In this mode redb only needs the trees. Without a cache, each of its reads is counted.
                builder.set_concurrency_mode(ConcurrencyMode::SingleWriter).set_cache_size(0);
                let database = builder.open_read_only_with_backend(overlay)?;
                let read = database.begin_read()?;
                read_budget.reset();
                read.open_table(META)?;
                drop(read);
                Ok(Self { database, read_budget })
            });
            match opened {
                Ok(file) => return Ok(file),
                Err(error) => last = last.or(Some(error)),
            }
        }
        let error = last.map_or_else(String::new, |error| error.to_string());
        bail!("nothing of {} can be read: {error}", path.display())
    }

    /// Copies everything that can be read to a new file at `out`, with a reserve at `reserve`.
    fn copy(&self, out: &Path, reserve: &Path) -> anyhow::Result<SalvageReport> {
        let reserve = Arc::new(Reserve::open(reserve)?);
        let mut copy = CopyWriter {
            store: Store::open_with(out, &reserve, self.ids())?,
            // Ids contain a call's number only if they were generated with the same secret.
            needs_id_index: self.ids().is_none(),
            watermark: Watermark::default(),
            items: Vec::new(),
            length: 0,
        };
        let report = self.read(&mut |item| copy.add(item))?;
        copy.flush()?;
        // Until it is closed, parts of it may be in its log only.
        catch_panic(|| copy.store.close())?;
        Ok(report)
    }

    /// The id codec of the file.
    fn ids(&self) -> Option<CallIdCodec> {
        let secret = catch_panic(|| {
            self.read_budget.reset();
            let about = self.database.begin_read()?.open_table(META)?;
            Ok(about.get(ID_SECRET)?.map(|secret| secret.value().to_vec()))
        });
        CallIdCodec::from_secret(&secret.ok()??)
    }

    /// Passes everything that can be read to `sink`, results first.
    fn read(
        &self,
        sink: &mut dyn FnMut(Item) -> tables::Result<()>,
    ) -> anyhow::Result<SalvageReport> {
        let mut report = SalvageReport::default();
        let mut over = HashMap::new();
        let missing = self.scan(DONE_BITMAPS, &mut |key, bitmap| {
            over.insert(key, Bitmap::new(bitmap));
            Ok(())
        })?;
        (report.completion_unknown, report.unreadable_ranges) = (missing > 0, missing);
        let mut finished = HashSet::new();
        for (table, packed) in [(FINISHED, false), (FINISHED_BATCHES, true)] {
            report.unreadable_ranges += self.scan(table, &mut |key, value| {
                for (number, stored) in entries(packed, key, value) {
                    let record = stored.map(Bytes::copy_from_slice);
                    let Some((record, (status, _))) = record
                        .and_then(|record| Some((record.clone(), result_codec::decode(&record)?)))
                    else {
                        report.damaged_results += 1;
                        continue;
                    };
                    report.results += 1;
                    if !status.dead_letter {
                        finished.insert(number);
                    }
                    sink(Item::Result { number, status, record })?;
                }
                Ok(())
            })?;
        }
        let mut waiting = HashSet::new();
        for (table, packed) in [(CALLS, false), (PENDING_BATCHES, true)] {
            report.unreadable_ranges += self.scan(table, &mut |key, value| {
                let bitmap = over.get(&key).filter(|_| packed);
                for (index, (number, stored)) in entries(packed, key, value).enumerate() {
                    if finished.contains(&number) || bitmap.is_some_and(|bitmap| bitmap.has(index))
                    {
                        continue;
                    }
                    let status = stored.and_then(|stored| CallRecord::from_stored(stored).ok());
                    let (Some(stored), Some(status)) = (stored, status) else {
                        report.damaged_calls += 1;
                        continue;
                    };
                    report.calls += 1;
                    waiting.insert(number);
                    sink(Item::Call { number, status, stored: Bytes::copy_from_slice(stored) })?;
                }
                Ok(())
            })?;
        }
        report.unreadable_ranges += self.scan(PROGRESS, &mut |number, json| {
            if waiting.contains(&number) && parse_record(json).is_some() {
                sink(Item::Progress { number, json: json.to_vec() })?;
            }
            Ok(())
        })?;
        report.unreadable_ranges += self.keys(sink)?;
        Ok(report)
    }

    /// Passes each readable entry of `table` to `visit`. Returns the number of unreadable ranges.
    fn scan(
        &self,
        table: CallTable,
        visit: &mut dyn FnMut(CallSeq, &[u8]) -> tables::Result<()>,
    ) -> anyhow::Result<u64> {
        let (mut start, mut gaps) = (0, 0);
        loop {
            let mut failed = None;
            let walked = catch_panic(|| {
                self.read_budget.reset();
                let read = self.database.begin_read()?.open_table(table)?;
                for entry in read.range(start..)? {
                    let (number, value) = entry?;
                    self.read_budget.reset();
                    if number.value() < start {
                        return Err(redb::Error::Corrupted("the tree is not sorted".into()));
                    }
                    start = number.value().saturating_add(1);
                    if let Err(error) = visit(number.value(), value.value()) {
                        failed = Some(error);
                        return Ok(());
                    }
                }
                Ok(())
            });
            if let Some(error) = failed {
                return Err(error.into());
            }
            match walked {
                // Files of older gateways have no packed batches.
                Ok(()) | Err(redb::Error::TableDoesNotExist(_)) => return Ok(gaps),
                Err(_) => gaps += 1,
            }
            match next_readable(start, |from| self.is_readable(table, from)) {
                Some(next) => start = next,
                None => return Ok(gaps),
            }
        }
    }

    /// Returns whether the first entry of `table` at or after `from` can be read, or there is none.
    fn is_readable(&self, table: CallTable, from: CallSeq) -> bool {
        let first_is_valid = catch_panic(|| {
            self.read_budget.reset();
            let read = self.database.begin_read()?.open_table(table)?;
            let first = read.range(from..)?.next().transpose()?;
            Ok(first.is_none_or(|(number, _)| number.value() >= from))
        });
        first_is_valid.unwrap_or(false)
    }

    /// Passes idempotency keys to `sink`, up to the first unreadable one.
    fn keys(&self, sink: &mut dyn FnMut(Item) -> tables::Result<()>) -> anyhow::Result<u64> {
        let mut failed = None;
        let walked = catch_panic(|| {
            self.read_budget.reset();
            for entry in self.database.begin_read()?.open_table(IDEMPOTENCY_KEYS)?.iter()? {
                let (key, stored) = entry?;
                self.read_budget.reset();
                let Some((id, until)) = stored.value().split_once('\n') else { continue };
                let (Ok(until), key) = (until.parse(), key.value().to_owned()) else { continue };
                if let Err(error) = sink(Item::Key { key, id: id.to_owned(), until }) {
                    failed = Some(error);
                    return Ok(());
                }
            }
            Ok(())
        });
        match failed {
            Some(error) => Err(error.into()),
            None => Ok(u64::from(walked.is_err())),
        }
    }
}

/// The entries under `key`: of a packed batch, or a single one. Damaged ones are `None`.
fn entries<'a>(
    packed: bool,
    key: CallSeq,
    value: &'a [u8],
) -> Box<dyn Iterator<Item = (CallSeq, Option<&'a [u8]>)> + 'a> {
    if packed {
        return Box::new(PackedBatch::new(value).all());
    }
    Box::new(std::iter::once((key, checksummed::open(value).ok())))
}

/// The first number above `bad` at which the table is readable again.
fn next_readable(bad: CallSeq, is_readable: impl Fn(CallSeq) -> bool) -> Option<CallSeq> {
    let (mut low, mut step) = (bad, 1_u64);
    let mut high = loop {
        let at = bad.checked_add(step)?;
        if is_readable(at) {
            break at;
        }
        low = at;
        step = step.checked_mul(2)?;
    };
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if is_readable(middle) {
            high = middle;
        } else {
            low = middle;
        }
    }
    Some(high)
}

/// Writes the copy.
struct CopyWriter {
    store: Store,
    needs_id_index: bool,
    watermark: Watermark,
    items: Vec<Item>,
    length: usize,
}

impl CopyWriter {
    fn add(&mut self, item: Item) -> tables::Result<()> {
        if let Item::Call { number, .. } | Item::Result { number, .. } = &item {
            self.watermark.next = self.watermark.next.max(number + 1);
        }
        self.length += match &item {
            Item::Call { stored, .. } => stored.len(),
            Item::Result { record, .. } => record.len(),
            Item::Progress { .. } | Item::Key { .. } => 0,
        };
        self.items.push(item);
        if self.items.len() < MAX_ITEMS_PER_COMMIT && self.length < MAX_COMMIT_BYTES {
            return Ok(());
        }
        self.flush()
    }

    fn flush(&mut self) -> tables::Result<()> {
        let (items, needs_id_index) = (std::mem::take(&mut self.items), self.needs_id_index);
        (self.length, self.watermark.changes) = (0, self.watermark.changes + 1);
        self.store.write(self.watermark, |txn| {
            items.iter().try_for_each(|item| put(txn, item, needs_id_index))
        })
    }
}

fn put(txn: &mut WriteTxn<'_>, item: &Item, needs_id_index: bool) -> tables::Result<()> {
    match item {
        Item::Call { number, status, stored } => {
            let needs_id_index =
                needs_id_index || status.chosen_id || !CallIdCodec::may_contain_number(&status.id);
            txn.add(*number, &status.id, needs_id_index, stored)
        }
        Item::Result { number, status, record } if status.dead_letter => {
            txn.store_dead_letter(*number, &serde_json::to_vec(status).unwrap_or_default(), record)
        }
        Item::Result { number, status, record } => {
            let needs_id_index =
                needs_id_index || status.chosen_id || !CallIdCodec::may_contain_number(&status.id);
            if needs_id_index {
                txn.index_id(&status.id, *number)?;
            }
            txn.finish(*number, record.clone(), needs_id_index, now() + RESULT_TTL_MILLIS, false)
                .map(drop)
        }
        Item::Progress { number, json } => txn.store_record(*number, json),
        Item::Key { key, id, until } => txn.store_key(key, id, *until),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_readable_number_is_found() {
        for (bad, good) in [(0, 1), (0, 1000), (5, 6), (100, 100_000)] {
            assert_eq!(next_readable(bad, |from| from >= good), Some(good.max(bad + 1)));
        }
        assert_eq!(next_readable(7, |_| false), None);
    }
}
