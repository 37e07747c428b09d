//! What can be read of a queue's file that is damaged, counted or copied.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use anyhow::{Context, bail};
use bytes::Bytes;
use redb::{ConcurrencyMode, Database, ReadOnlyDatabase, ReadableDatabase, ReadableTable};

use crate::queue::call::UnixMillis;
use crate::queue::embedded::change::Change;
use crate::queue::embedded::guard::guarded;
use crate::queue::embedded::ids::Ids;
use crate::queue::embedded::overlay::{Overlay, Reads};
use crate::queue::embedded::reserve::Reserve;
use crate::queue::embedded::rows::{Marks, Row};
use crate::queue::embedded::schedule::Number;
use crate::queue::embedded::store::{self, Mark, Store, Stored, parse};
use crate::queue::embedded::tables::{
    ABOUT, BATCHES, CALLS, ENDED, FINISHED, KEYS, OVER, PROGRESS, SECRET,
};
use crate::queue::embedded::{finished, sealed};
use crate::queue::now;
use crate::queue::status::CallRecord;

/// How long a copied result is kept: when it was to go may not be readable.
const KEPT: UnixMillis = 60 * 60 * 1000;
/// So much is written to the copy at once.
const TOGETHER: usize = 512;
const LENGTH_TOGETHER: usize = 4 << 20;
/// Memory for pages of a file that is checked.
const CACHE: usize = 4 << 20;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SalvageReport {
    /// Why redb does not open the file.
    pub open_error: Option<String>,
    /// Calls that wait, or have failed for good.
    pub calls: u64,
    pub damaged_calls: u64,
    pub results: u64,
    pub damaged_results: u64,
    /// Pieces of the file that cannot be read; what was in them is not counted.
    pub unreadable_ranges: u64,
    /// The last change did not reach the disk, and is undone when the queue is opened.
    pub last_commit_rolled_back: bool,
    /// It could not be read which calls are over: some of `calls` may have been executed.
    pub completion_unknown: bool,
}

impl SalvageReport {
    pub fn is_intact(&self) -> bool {
        let Self { open_error, damaged_calls, damaged_results, unreadable_ranges, .. } = self;
        open_error.is_none() && damaged_calls + damaged_results + unreadable_ranges == 0
    }
}

/// Something that can be copied.
enum Item {
    Call { number: Number, status: CallRecord, stored: Bytes },
    Result { number: Number, status: CallRecord, record: Bytes },
    Progress { number: Number, json: Vec<u8> },
    Key { key: String, id: String, until: UnixMillis },
}

/// Looks at all that is in the file at `path`, which is not changed.
///
/// # Errors
/// When it is in use, or nothing of it can be read.
pub fn check(path: &Path) -> anyhow::Result<SalvageReport> {
    let undone = Arc::<AtomicBool>::default();
    let refused = guarded(|| {
        let overlay = Overlay::open(path)?;
        let (is_whole, undoes) = (overlay.is_whole(), Arc::clone(&undone));
        let mut builder = Database::builder();
        builder.set_check_integrity_on_open(true).set_cache_size(CACHE);
        // As when the queue is opened: without a journal, the last change may not have reached the disk.
        builder.set_repair_callback(move |repair| match store::rolls_back(repair) {
            true if is_whole => repair.abort(),
            rolls_back => _ = undoes.fetch_or(rolls_back, Relaxed),
        });
        builder.create_with_backend(overlay)?;
        Ok(())
    });
    let refused = refused.err().map(|error| error.to_string());
    let undone = undone.load(Relaxed) && refused.is_none();
    let states: &[State] = match undone {
        true => &[State::BeforeLast],
        false => &State::ALL,
    };
    let mut found = Remains::open(path, states)?.read(&mut |_| Ok(()))?;
    (found.open_error, found.last_commit_rolled_back) = (refused, undone);
    Ok(found)
}

/// Copies what can be read of the file at `path` to a new one at `out`.
///
/// # Errors
/// When nothing can be read, or the copy cannot be written.
pub fn salvage(path: &Path, out: &Path) -> anyhow::Result<SalvageReport> {
    if out.exists() {
        bail!("{} exists already", out.display());
    }
    let remains = Remains::open(path, &State::ALL)?;
    let beside = ["journal", "reserve"].map(|name| out.with_extension(name));
    let found = remains.copy(out, &beside[1]).with_context(|| {
        let out = out.display();
        format!("the copy {out} is incomplete: remove it, its .journal and its .reserve")
    })?;
    // The copy was closed, and is whole without them.
    for path in beside {
        std::fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(found)
}

/// Which of the two states that a file has is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Last,
    /// Without the last change.
    BeforeLast,
}

impl State {
    /// The state before the last change is better than nothing.
    const ALL: [Self; 2] = [Self::Last, Self::BeforeLast];
}

/// A file that is read as it is.
struct Remains {
    database: ReadOnlyDatabase,
    reads: Arc<Reads>,
}

impl Remains {
    /// Opens the first of `states` that can be opened.
    fn open(path: &Path, states: &[State]) -> anyhow::Result<Self> {
        let mut last = None;
        for state in states {
            let opened = guarded(|| {
                let before_last = *state == State::BeforeLast;
                let (overlay, reads) = Overlay::open_as_it_is(path, before_last)?;
                let mut builder = Database::builder();
                // In this mode redb needs the trees alone. Without a cache each of its reads is counted.
                builder.set_concurrency_mode(ConcurrencyMode::SingleWriter).set_cache_size(0);
                let database = builder.open_read_only_with_backend(overlay)?;
                let read = database.begin_read()?;
                reads.begin();
                read.open_table(ABOUT)?;
                drop(read);
                Ok(Self { database, reads })
            });
            match opened {
                Ok(remains) => return Ok(remains),
                Err(error) => last = last.or(Some(error)),
            }
        }
        let error = last.map_or_else(String::new, |error| error.to_string());
        bail!("nothing of {} can be read: {error}", path.display())
    }

    /// Copies all that can be read to a new file at `out`, with a reserve at `reserve`.
    fn copy(&self, out: &Path, reserve: &Path) -> anyhow::Result<SalvageReport> {
        let reserve = Arc::new(Reserve::open(reserve)?);
        let mut copy = Copy {
            store: Store::open_with(out, &reserve, self.ids())?,
            // Ids say which number a call has only if they were made with the same secret.
            chosen: self.ids().is_none(),
            mark: Mark::default(),
            together: Vec::new(),
            length: 0,
        };
        let found = self.read(&mut |item| copy.add(item))?;
        copy.flush()?;
        // Until it is closed, a part of it may be in its journal alone.
        guarded(|| copy.store.close())?;
        Ok(found)
    }

    /// The ids that the file gave its calls.
    fn ids(&self) -> Option<Ids> {
        let secret = guarded(|| {
            self.reads.begin();
            let about = self.database.begin_read()?.open_table(ABOUT)?;
            Ok(about.get(SECRET)?.map(|secret| secret.value().to_vec()))
        });
        Ids::from_secret(&secret.ok()??)
    }

    /// Gives all that can be read to `take`, results first.
    fn read(
        &self,
        take: &mut dyn FnMut(Item) -> store::Result<()>,
    ) -> anyhow::Result<SalvageReport> {
        let mut found = SalvageReport::default();
        let mut over = HashMap::new();
        let missing = self.walk(OVER, &mut |key, marks| {
            over.insert(key, Marks::new(marks));
            Ok(())
        })?;
        (found.completion_unknown, found.unreadable_ranges) = (missing > 0, missing);
        let mut finished = HashSet::new();
        for (table, in_rows) in [(FINISHED, false), (ENDED, true)] {
            found.unreadable_ranges += self.walk(table, &mut |key, value| {
                for (number, stored) in entries(in_rows, key, value) {
                    let record = stored.map(Bytes::copy_from_slice);
                    let Some((record, (status, _))) = record
                        .and_then(|record| Some((record.clone(), finished::decode(&record)?)))
                    else {
                        found.damaged_results += 1;
                        continue;
                    };
                    found.results += 1;
                    if !status.dead_letter {
                        finished.insert(number);
                    }
                    take(Item::Result { number, status, record })?;
                }
                Ok(())
            })?;
        }
        let mut waiting = HashSet::new();
        for (table, in_rows) in [(CALLS, false), (BATCHES, true)] {
            found.unreadable_ranges += self.walk(table, &mut |key, value| {
                let marks = over.get(&key).filter(|_| in_rows);
                for (index, (number, stored)) in entries(in_rows, key, value).enumerate() {
                    if finished.contains(&number) || marks.is_some_and(|it| it.has(index)) {
                        continue;
                    }
                    let status = stored.and_then(|stored| CallRecord::from_stored(stored).ok());
                    let (Some(stored), Some(status)) = (stored, status) else {
                        found.damaged_calls += 1;
                        continue;
                    };
                    found.calls += 1;
                    waiting.insert(number);
                    take(Item::Call { number, status, stored: Bytes::copy_from_slice(stored) })?;
                }
                Ok(())
            })?;
        }
        found.unreadable_ranges += self.walk(PROGRESS, &mut |number, json| {
            if waiting.contains(&number) && parse(json).is_some() {
                take(Item::Progress { number, json: json.to_vec() })?;
            }
            Ok(())
        })?;
        found.unreadable_ranges += self.keys(take)?;
        Ok(found)
    }

    /// Shows each entry of `table` that can be read to `see`; how many pieces of it cannot be read.
    fn walk(
        &self,
        table: Stored,
        see: &mut dyn FnMut(Number, &[u8]) -> store::Result<()>,
    ) -> anyhow::Result<u64> {
        let (mut start, mut gaps) = (0, 0);
        loop {
            let mut failed = None;
            let walked = guarded(|| {
                self.reads.begin();
                let read = self.database.begin_read()?.open_table(table)?;
                for entry in read.range(start..)? {
                    let (number, value) = entry?;
                    self.reads.begin();
                    if number.value() < start {
                        return Err(redb::Error::Corrupted("a tree that is not in order".into()));
                    }
                    start = number.value().saturating_add(1);
                    if let Err(error) = see(number.value(), value.value()) {
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
                // A file of an older gateway has no rows.
                Ok(()) | Err(redb::Error::TableDoesNotExist(_)) => return Ok(gaps),
                Err(_) => gaps += 1,
            }
            match next_readable(start, |from| self.is_readable(table, from)) {
                Some(next) => start = next,
                None => return Ok(gaps),
            }
        }
    }

    /// Whether the first entry of `table` from `from` on can be read, if there is one.
    fn is_readable(&self, table: Stored, from: Number) -> bool {
        let found = guarded(|| {
            self.reads.begin();
            let read = self.database.begin_read()?.open_table(table)?;
            let first = read.range(from..)?.next().transpose()?;
            Ok(first.is_none_or(|(number, _)| number.value() >= from))
        });
        found.unwrap_or(false)
    }

    /// Idempotency keys, up to the first that cannot be read.
    fn keys(&self, take: &mut dyn FnMut(Item) -> store::Result<()>) -> anyhow::Result<u64> {
        let mut failed = None;
        let walked = guarded(|| {
            self.reads.begin();
            for entry in self.database.begin_read()?.open_table(KEYS)?.iter()? {
                let (key, stored) = entry?;
                self.reads.begin();
                let Some((id, until)) = stored.value().split_once('\n') else { continue };
                let (Ok(until), key) = (until.parse(), key.value().to_owned()) else { continue };
                if let Err(error) = take(Item::Key { key, id: id.to_owned(), until }) {
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

/// What is under `key`: a row, or one entry; `None` for what is damaged.
fn entries<'a>(
    in_rows: bool,
    key: Number,
    value: &'a [u8],
) -> Box<dyn Iterator<Item = (Number, Option<&'a [u8]>)> + 'a> {
    if in_rows {
        return Box::new(Row::new(value).all());
    }
    Box::new(std::iter::once((key, sealed::open(value).ok())))
}

/// The first number above `bad` from which on something can be read again.
fn next_readable(bad: Number, is_readable: impl Fn(Number) -> bool) -> Option<Number> {
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

/// The copy that is being made.
struct Copy {
    store: Store,
    chosen: bool,
    mark: Mark,
    together: Vec<Item>,
    length: usize,
}

impl Copy {
    fn add(&mut self, item: Item) -> store::Result<()> {
        if let Item::Call { number, .. } | Item::Result { number, .. } = &item {
            self.mark.next = self.mark.next.max(number + 1);
        }
        self.length += match &item {
            Item::Call { stored, .. } => stored.len(),
            Item::Result { record, .. } => record.len(),
            Item::Progress { .. } | Item::Key { .. } => 0,
        };
        self.together.push(item);
        if self.together.len() < TOGETHER && self.length < LENGTH_TOGETHER {
            return Ok(());
        }
        self.flush()
    }

    fn flush(&mut self) -> store::Result<()> {
        let (items, chosen) = (std::mem::take(&mut self.together), self.chosen);
        (self.length, self.mark.changes) = (0, self.mark.changes + 1);
        self.store
            .change(self.mark, |change| items.iter().try_for_each(|item| put(change, item, chosen)))
    }
}

fn put(change: &mut Change<'_>, item: &Item, chosen: bool) -> store::Result<()> {
    match item {
        Item::Call { number, status, stored } => {
            let chosen = chosen || status.chosen_id || !Ids::looks_numbered(&status.id);
            change.add(*number, &status.id, chosen, stored)
        }
        Item::Result { number, status, record } if status.dead_letter => {
            change.keep_answer(*number, &serde_json::to_vec(status).unwrap_or_default(), record)
        }
        Item::Result { number, status, record } => {
            let chosen = chosen || status.chosen_id || !Ids::looks_numbered(&status.id);
            if chosen {
                change.number(&status.id, *number)?;
            }
            change.finish(*number, record.clone(), chosen, now() + KEPT, false).map(drop)
        }
        Item::Progress { number, json } => change.note(*number, json),
        Item::Key { key, id, until } => change.remember_key(key, id, *until),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_readable_again_is_found() {
        for (bad, good) in [(0, 1), (0, 1000), (5, 6), (100, 100_000)] {
            assert_eq!(next_readable(bad, |from| from >= good), Some(good.max(bad + 1)));
        }
        assert_eq!(next_readable(7, |_| false), None);
    }
}
