//! The file of the embedded queue: what is in it, and how it is read. One thread alone writes.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use redb::{
    AccessGuard, Database, ReadableDatabase, ReadableTable, RepairSession, TableDefinition,
    TableError,
};

use crate::queue::Filter;
use crate::queue::call::{QueuedCall, UnixMillis};
use crate::queue::embedded::change::Change;
use crate::queue::embedded::guard::guarded;
use crate::queue::embedded::ids::Ids;
use crate::queue::embedded::journal::Journaled;
use crate::queue::embedded::reserve::Reserve;
use crate::queue::embedded::rows::{Marks, Row, SPAN};
use crate::queue::embedded::schedule::Number;
use crate::queue::embedded::tables::{
    ABOUT, BATCHES, CALLS, CHANGES, ENDED, FINISHED, NUMBERS, OVER, PROGRESS, SECRET,
};
use crate::queue::embedded::{finished, sealed};
use crate::queue::status::{CallRecord, CallState, StoredResponse};

/// Memory for pages of the file.
const CACHE: usize = 12 << 20;

pub(super) type Result<T, E = redb::Error> = std::result::Result<T, E>;

/// The open file.
pub(super) struct Store {
    database: Database,
    ids: Arc<Ids>,
    has_journal: bool,
}

/// Whether redb is about to undo the last commit, since something of it is missing or damaged.
pub(super) fn rolls_back(repair: &RepairSession) -> bool {
    // It tells its steps by how far it has come.
    (repair.progress() - 0.3).abs() < 0.01
}

/// A call that is in the file when it is opened.
#[derive(Default)]
pub(super) struct Found {
    pub(super) number: Number,
    pub(super) label: String,
    pub(super) due: UnixMillis,
    pub(super) dead: bool,
    /// Something is noted of it: it has been made before.
    pub(super) noted: bool,
    /// It cannot be read; nothing else is known of it.
    pub(super) damaged: bool,
}

/// How far the file has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Mark {
    /// How often it has been changed.
    pub(super) changes: u64,
    /// No call has this number, nor any above it.
    pub(super) next: Number,
}

impl Store {
    /// Opens the file, or makes it.
    pub(super) fn open(path: &Path, reserve: &Arc<Reserve>) -> Result<Self> {
        guarded(|| Self::open_with(path, reserve, None))
    }

    /// The same; `ids` are those that a new file gives its calls.
    pub(super) fn open_with(path: &Path, reserve: &Arc<Reserve>, ids: Option<Ids>) -> Result<Self> {
        let file = Journaled::open(path, reserve)?;
        let (has_journal, is_whole) = (file.has_journal(), file.is_whole());
        let mut builder = Database::builder();
        // Without the check, redb trusts what it reads, and may panic long after.
        builder.set_cache_size(CACHE).set_check_integrity_on_open(true);
        builder.set_repair_callback(move |repair| {
            if is_whole && rolls_back(repair) {
                repair.abort();
            }
        });
        let database = builder.create_with_backend(file)?;
        let known = known_ids(&database)?;
        let is_whole = known.is_some() && has_rows(&database)?;
        let ids = Arc::new(known.or(ids).unwrap_or_else(Ids::fresh));
        // A file that is whole is not written: on a disk that is full, what is there can be read all the same.
        if !is_whole {
            make_tables(&database, &ids)?;
        }
        Ok(Self { database, ids, has_journal })
    }

    /// Whether commits go through a journal.
    pub(super) fn has_journal(&self) -> bool {
        self.has_journal
    }

    /// Moves what is in the file together, and gives the rest of its space back to the disk.
    pub(super) fn compact(&mut self) -> Result<(), redb::CompactionError> {
        self.database.compact().map(drop)
    }

    /// Closes the file; an error says that a part of it may not be on the disk.
    pub(super) fn close(self) -> Result<()> {
        Ok(self.database.close()?)
    }

    /// How far the file has come.
    pub(super) fn mark(&self) -> Result<Mark> {
        let about = self.database.begin_read()?.open_table(ABOUT)?;
        let stored = about.get(CHANGES)?;
        Ok(stored.map_or(Mark::default(), |stored| Mark::read(stored.value())))
    }

    /// The ids that this file gives its calls.
    pub(super) fn ids(&self) -> Arc<Ids> {
        Arc::clone(&self.ids)
    }

    /// All calls that are not over, and the next number.
    pub(super) fn read_all(&self, mut found: impl FnMut(Found)) -> Result<Number> {
        let read = self.database.begin_read()?;
        let progress = read.open_table(PROGRESS)?;
        let last = read.open_table(FINISHED)?.last()?.map_or(0, |(number, _)| number.value());
        let mut next = self.mark()?.next.max(last + 1);
        let mut see = |number: Number, stored: Option<&[u8]>, raw: Option<&[u8]>| -> Result<()> {
            next = next.max(number + 1);
            let Some(stored) = stored else {
                let id = raw.and_then(QueuedCall::extract_id);
                tracing::error!(call_id = id, number, "A queued call is damaged and set aside");
                found(Found { number, damaged: true, ..Found::default() });
                return Ok(());
            };
            let call = match CallRecord::from_stored(stored) {
                Ok(call) => call,
                Err(error) => {
                    // One of a version to come stays where it is.
                    let id = QueuedCall::extract_id(stored);
                    tracing::error!(call_id = id, number, %error, "A queued call cannot be read");
                    return Ok(());
                }
            };
            let status = progress.get(number)?.and_then(|json| parse(json.value()));
            let due = status.as_ref().and_then(|status| status.next_attempt_at);
            found(Found {
                number,
                label: call.function,
                due: due.or(call.next_attempt_at).unwrap_or(0),
                noted: status.is_some(),
                dead: status.is_some_and(|status| status.dead_letter),
                damaged: false,
            });
            Ok(())
        };
        for entry in read.open_table(CALLS)?.iter()? {
            let (number, stored) = entry?;
            let raw = stored.value();
            see(number.value(), sealed::open(raw).ok(), Some(sealed::peek(raw)))?;
        }
        let over = read.open_table(OVER)?;
        for entry in read.open_table(BATCHES)?.iter()? {
            let (key, row) = entry?;
            let marks = over.get(key.value())?.map(|marks| Marks::new(marks.value()));
            let marks = marks.unwrap_or_default();
            let row = Row::new(row.value());
            for (index, (number, stored)) in row.all().enumerate() {
                if !marks.has(index) {
                    see(number, stored, row.unchecked(index))?;
                }
            }
        }
        Ok(next)
    }

    /// A view of the file as it is now.
    pub(super) fn view(&self) -> Result<View> {
        Ok(View { read: self.database.begin_read()?, ids: Arc::clone(&self.ids) })
    }

    /// Carries out `change`, after which the file has come to `mark`, and returns when it is on the disk.
    pub(super) fn change<T>(
        &self,
        mark: Mark,
        change: impl FnOnce(&mut Change<'_>) -> Result<T>,
    ) -> Result<T> {
        let transaction = self.database.begin_write()?;
        let mut batch = Change::new(&transaction, Arc::clone(&self.ids));
        let changed = change(&mut batch)?;
        batch.finish_up()?;
        transaction.open_table(ABOUT)?.insert(CHANGES, &mark.bytes()[..])?;
        transaction.commit()?;
        Ok(changed)
    }
}

impl Mark {
    fn read(stored: &[u8]) -> Self {
        let (changes, next) = stored.split_at(stored.len().min(8));
        let number = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_be_bytes);
        Self { changes: number(changes), next: number(next) }
    }

    fn bytes(self) -> Vec<u8> {
        [self.changes.to_be_bytes(), self.next.to_be_bytes()].concat()
    }
}

/// The ids of a file that has given some.
fn known_ids(database: &Database) -> Result<Option<Ids>> {
    let read = database.begin_read()?;
    let about = match read.open_table(ABOUT) {
        Ok(about) => about,
        Err(TableError::TableDoesNotExist(_)) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let secret = about.get(SECRET)?;
    Ok(secret.and_then(|secret| Ids::from_secret(secret.value())))
}

/// Whether all tables are there: a file that an older gateway made has no rows.
fn has_rows(database: &Database) -> Result<bool> {
    match database.begin_read()?.open_table(ENDED) {
        Ok(_) => Ok(true),
        Err(TableError::TableDoesNotExist(_)) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn make_tables(database: &Database, ids: &Arc<Ids>) -> Result<()> {
    let change = database.begin_write()?;
    change.open_table(ABOUT)?.insert(SECRET, &ids.secret()[..])?;
    Change::new(&change, Arc::clone(ids)).make_tables()?;
    Ok(change.commit()?)
}

/// What a table holds.
type Value<'t> = AccessGuard<'t, &'static [u8]>;

/// The row in `table` that has `number`, with its key.
pub(super) fn row_with<'t>(
    table: &'t impl ReadableTable<Number, &'static [u8]>,
    number: Number,
) -> Result<Option<(Number, Value<'t>)>> {
    let keys = number.saturating_sub(SPAN - 1)..=number;
    for entry in table.range(keys)?.rev() {
        let (key, row) = entry?;
        if Row::new(row.value()).find(number).is_some() {
            return Ok(Some((key.value(), row)));
        }
    }
    Ok(None)
}

/// What is in the file at one moment.
pub(super) struct View {
    pub(super) read: redb::ReadTransaction,
    ids: Arc<Ids>,
}

impl View {
    pub(super) fn number(&self, id: &str) -> Result<Option<Number>> {
        if let Some(number) = self.ids.number_in(id)
            && self.id(number)?.as_deref() == Some(id)
        {
            return Ok(Some(number));
        }
        Ok(self.read.open_table(NUMBERS)?.get(id)?.map(|number| number.value()))
    }

    /// The id of the call with this number.
    fn id(&self, number: Number) -> Result<Option<String>> {
        if let Some(call) = self.queued(number)? {
            return Ok(Some(call.id));
        }
        Ok(self.finished(number)?.map(|(status, _)| status.id))
    }

    /// The id of a call that is damaged, as far as it can be read.
    pub(super) fn id_as_it_is(&self, number: Number) -> Result<Option<String>> {
        if let Some(stored) = self.read.open_table(CALLS)?.get(number)? {
            return Ok(QueuedCall::extract_id(sealed::peek(stored.value())));
        }
        let batches = self.read.open_table(BATCHES)?;
        let in_row = row_with(&batches, number)?.and_then(|(_, row)| {
            let row = Row::new(row.value());
            QueuedCall::extract_id(row.unchecked(row.find(number)?)?)
        });
        let known = || Ok(self.progress(number)?.map(|status| status.id));
        in_row.map_or_else(known, |id| Ok(Some(id)))
    }

    /// What is stored of the call with this number alone.
    pub(super) fn call(&self, number: Number) -> Result<Option<Bytes>> {
        let stored = self.read.open_table(CALLS)?.get(number)?;
        let stored = stored.as_ref().and_then(|stored| sealed::open(stored.value()).ok());
        Ok(stored.map(Bytes::copy_from_slice))
    }

    /// The row that has the call with this number.
    pub(super) fn row(&self, number: Number) -> Result<Option<Bytes>> {
        let batches = self.read.open_table(BATCHES)?;
        let row = row_with(&batches, number)?;
        Ok(row.map(|(_, row)| Bytes::copy_from_slice(row.value())))
    }

    /// The status of a call as if nothing had been noted of it.
    pub(super) fn queued(&self, number: Number) -> Result<Option<CallRecord>> {
        if let Some(stored) = self.read.open_table(CALLS)?.get(number)? {
            return Ok(CallRecord::from_stored(sealed::peek(stored.value())).ok());
        }
        let batches = self.read.open_table(BATCHES)?;
        let Some((key, row)) = row_with(&batches, number)? else { return Ok(None) };
        let row = Row::new(row.value());
        let Some(index) = row.find(number) else { return Ok(None) };
        let marks = self.read.open_table(OVER)?.get(key)?;
        if marks.is_some_and(|marks| Marks::new(marks.value()).has(index)) {
            return Ok(None);
        }
        // As with a call that is kept alone: one that is damaged has a status, and can be cancelled.
        Ok(row.unchecked(index).and_then(|stored| CallRecord::from_stored(stored).ok()))
    }

    /// What has been noted of a call that is not over.
    pub(super) fn progress(&self, number: Number) -> Result<Option<CallRecord>> {
        let json = self.read.open_table(PROGRESS)?.get(number)?;
        Ok(json.and_then(|json| parse(json.value())))
    }

    pub(super) fn finished(
        &self,
        number: Number,
    ) -> Result<Option<(CallRecord, Option<StoredResponse>)>> {
        if let Some(stored) = self.read.open_table(FINISHED)?.get(number)? {
            let stored = sealed::open(stored.value()).ok();
            return Ok(stored.and_then(|it| finished::decode(&Bytes::copy_from_slice(it))));
        }
        let ended = self.read.open_table(ENDED)?;
        let Some((_, row)) = row_with(&ended, number)? else { return Ok(None) };
        let stored = Row::new(row.value()).get(number);
        Ok(stored.and_then(|stored| finished::decode(&Bytes::copy_from_slice(stored))))
    }

    /// At most `most` numbers of the calls that are on one of `shelves`, from `first` on, in order.
    pub(super) fn numbers_from(
        &self,
        shelves: &[Shelf],
        first: Number,
        most: usize,
    ) -> Result<Vec<Number>> {
        let mut numbers = Vec::new();
        for shelf in shelves {
            for entry in self.read.open_table(shelf.single())?.range(first..)?.take(most) {
                numbers.push(entry?.0.value());
            }
            match shelf {
                Shelf::Calls => self.numbers_in(BATCHES, true, first, most, &mut numbers)?,
                Shelf::Finished => self.numbers_in(ENDED, false, first, most, &mut numbers)?,
                Shelf::Progress => {}
            }
        }
        numbers.sort_unstable();
        // A dead call is in both.
        numbers.dedup();
        numbers.truncate(most);
        Ok(numbers)
    }

    /// The same of the calls in the rows of `table`; `marked`: some of them may be over.
    fn numbers_in(
        &self,
        table: Stored,
        marked: bool,
        first: Number,
        most: usize,
        numbers: &mut Vec<Number>,
    ) -> Result<()> {
        let (over, start) = (self.read.open_table(OVER)?, numbers.len());
        for entry in self.read.open_table(table)?.range(first.saturating_sub(SPAN - 1)..)? {
            // What is less than `SPAN` behind this row's first can be in a row to come, what is before it cannot.
            if numbers.len() - start >= most.saturating_add(SPAN as usize) {
                break;
            }
            let (key, row) = entry?;
            let marks = if marked { over.get(key.value())? } else { None };
            let marks = marks.map(|marks| Marks::new(marks.value())).unwrap_or_default();
            let found = Row::new(row.value()).numbers().enumerate();
            let found = found.filter(|(index, number)| *number >= first && !marks.has(*index));
            numbers.extend(found.map(|(_, number)| number));
        }
        Ok(())
    }
}

/// Where in the file a call is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Shelf {
    /// Not over, or dead.
    Calls,
    /// Has been made, and is not over or is dead.
    Progress,
    /// Over, or dead.
    Finished,
}

pub(super) type Stored = TableDefinition<'static, Number, &'static [u8]>;

impl Shelf {
    /// The shelves with all that `filter` can mean. To look for a handful of dead calls must not read a million others.
    pub(super) fn with(filter: &Filter) -> &'static [Self] {
        match (filter.dead_letter, filter.state) {
            (Some(true), _) | (_, Some(CallState::Retrying)) => &[Self::Progress],
            (_, Some(CallState::Queued | CallState::Running)) => &[Self::Calls],
            (_, Some(CallState::Succeeded | CallState::Failed | CallState::Cancelled)) => {
                &[Self::Finished]
            }
            (_, None) => &[Self::Calls, Self::Finished],
        }
    }

    /// The table of those that are kept one by one.
    pub(super) fn single(self) -> Stored {
        match self {
            Self::Calls => CALLS,
            Self::Progress => PROGRESS,
            Self::Finished => FINISHED,
        }
    }
}

pub(super) fn parse(json: &[u8]) -> Option<CallRecord> {
    serde_json::from_slice(json).ok()
}
