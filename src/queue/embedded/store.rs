//! The file of the embedded queue: what is in it, and how it changes. One thread alone writes.

use std::path::Path;
use std::sync::Arc;

use bytes::{BufMut, Bytes};
use redb::{Database, ReadableDatabase, ReadableTable, Table, TableDefinition, WriteTransaction};
use serde::{Deserialize, Serialize};

use crate::queue::Filter;
use crate::queue::call::{Call, Millis};
use crate::queue::embedded::ids::Ids;
use crate::queue::embedded::schedule::Number;
use crate::queue::status::{Answer, State, Status};

/// Calls that are not over, and those that failed for good: as [`Call::encode`] writes them.
const CALLS: TableDefinition<'_, Number, &[u8]> = TableDefinition::new("calls");
/// By id, of calls whose caller chose it. All others have their number in their id: to keep these, too, a table in the
/// order of random ids would be half of what a call costs.
const NUMBERS: TableDefinition<'_, &str, Number> = TableDefinition::new("numbers");
/// [`Status`] as JSON, of calls that have been made but are not over, and of dead ones.
const PROGRESS: TableDefinition<'_, Number, &[u8]> = TableDefinition::new("progress");
/// [`Status`] and answer of calls that are over.
const FINISHED: TableDefinition<'_, Number, &[u8]> = TableDefinition::new("finished");
/// By idempotency key: the id that it stands for, and until when, on a line of its own.
const KEYS: TableDefinition<'_, &str, &str> = TableDefinition::new("keys");
/// When what is kept for a while goes, and what it is.
const EXPIRY: TableDefinition<'_, (Millis, &str), ()> = TableDefinition::new("expiry");

/// What the file needs to know of itself.
const ABOUT: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("about");
/// In `ABOUT`: what hides the numbers in ids.
const SECRET: &str = "secret";
/// In `ABOUT`: how often the file has been changed.
const CHANGES: &str = "changes";

/// Memory for pages of the file.
const CACHE: usize = 24 << 20;
/// An entry of `EXPIRY` for an idempotency key starts so, one for a finished call is its number.
const KEY: &str = "k:";

pub(super) type Result<T, E = redb::Error> = std::result::Result<T, E>;

/// The open file.
pub(super) struct Store {
    database: Database,
    ids: Arc<Ids>,
}

/// A call that is in the file when it is opened.
pub(super) struct Found {
    pub(super) number: Number,
    pub(super) label: String,
    pub(super) due: Millis,
    pub(super) dead: bool,
}

impl Store {
    /// Opens the file, or makes it.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let mut builder = Database::builder();
        builder.set_cache_size(CACHE);
        let database = builder.create(path)?;
        let ids = match known_ids(&database)? {
            // Nothing is written: on a disk that is full, what is there can be read all the same.
            Some(ids) => ids,
            None => make_tables(&database)?,
        };
        Ok(Self { database, ids })
    }

    /// How often the file has been changed.
    pub(super) fn changes(&self) -> Result<u64> {
        let about = self.database.begin_read()?.open_table(ABOUT)?;
        let changes = about.get(CHANGES)?;
        Ok(changes.and_then(|bytes| bytes.value().try_into().ok()).map_or(0, u64::from_be_bytes))
    }

    /// The ids that this file gives its calls.
    pub(super) fn ids(&self) -> Arc<Ids> {
        Arc::clone(&self.ids)
    }

    /// All calls that are not over, and the next number.
    pub(super) fn read_all(&self, mut found: impl FnMut(Found)) -> Result<Number> {
        let read = self.database.begin_read()?;
        let (calls, progress) = (read.open_table(CALLS)?, read.open_table(PROGRESS)?);
        let mut next =
            read.open_table(FINISHED)?.last()?.map_or(1, |(number, _)| number.value() + 1);
        for entry in calls.iter()? {
            let (number, bytes) = entry?;
            let number = number.value();
            next = next.max(number + 1);
            let call = match Status::of_stored(bytes.value()) {
                Ok(call) => call,
                Err(error) => {
                    // One of a version to come stays where it is.
                    tracing::error!(number, %error, "A queued call cannot be read");
                    continue;
                }
            };
            let status = progress.get(number)?.and_then(|json| parse(json.value()));
            let due = status.as_ref().and_then(|status| status.next_attempt_at);
            found(Found {
                number,
                label: call.function,
                due: due.or(call.next_attempt_at).unwrap_or(0),
                dead: status.is_some_and(|status| status.dead),
            });
        }
        Ok(next)
    }

    /// A view of the file as it is now.
    pub(super) fn view(&self) -> Result<View> {
        Ok(View { read: self.database.begin_read()?, ids: Arc::clone(&self.ids) })
    }

    /// Carries out `change`, which is the one with the number `count`, and returns when it is on the disk.
    pub(super) fn change<T>(
        &self,
        count: u64,
        change: impl FnOnce(&mut Change<'_>) -> Result<T>,
    ) -> Result<T> {
        let transaction = self.database.begin_write()?;
        let changed = change(&mut Change::new(&transaction, Arc::clone(&self.ids))?)?;
        transaction.open_table(ABOUT)?.insert(CHANGES, &count.to_be_bytes()[..])?;
        transaction.commit()?;
        Ok(changed)
    }
}

/// The ids of a file that has all its tables.
fn known_ids(database: &Database) -> Result<Option<Arc<Ids>>> {
    let read = database.begin_read()?;
    let about = match read.open_table(ABOUT) {
        Ok(about) => about,
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let secret = about.get(SECRET)?;
    Ok(secret.and_then(|secret| Ids::from_secret(secret.value())).map(Arc::new))
}

fn make_tables(database: &Database) -> Result<Arc<Ids>> {
    let (change, ids) = (database.begin_write()?, Arc::new(Ids::fresh()));
    change.open_table(ABOUT)?.insert(SECRET, &ids.secret()[..])?;
    drop(Change::new(&change, Arc::clone(&ids))?);
    change.commit()?;
    Ok(ids)
}

/// What is in the file at one moment.
pub(super) struct View {
    read: redb::ReadTransaction,
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

    pub(super) fn call(&self, number: Number) -> Result<Option<Call>> {
        let bytes = self.read.open_table(CALLS)?.get(number)?;
        Ok(bytes.and_then(|bytes| Call::decode(&Bytes::copy_from_slice(bytes.value())).ok()))
    }

    /// The status of a call as if nothing had been noted of it.
    pub(super) fn queued(&self, number: Number) -> Result<Option<Status>> {
        let bytes = self.read.open_table(CALLS)?.get(number)?;
        Ok(bytes.and_then(|bytes| Status::of_stored(bytes.value()).ok()))
    }

    /// What has been noted of a call that is not over.
    pub(super) fn progress(&self, number: Number) -> Result<Option<Status>> {
        let json = self.read.open_table(PROGRESS)?.get(number)?;
        Ok(json.and_then(|json| parse(json.value())))
    }

    pub(super) fn finished(&self, number: Number) -> Result<Option<(Status, Option<Answer>)>> {
        let bytes = self.read.open_table(FINISHED)?.get(number)?;
        Ok(bytes.and_then(|bytes| decode_finished(&Bytes::copy_from_slice(bytes.value()))))
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
            for entry in self.read.open_table(shelf.table())?.range(first..)?.take(most) {
                numbers.push(entry?.0.value());
            }
        }
        numbers.sort_unstable();
        // A dead call is in both.
        numbers.dedup();
        numbers.truncate(most);
        Ok(numbers)
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

impl Shelf {
    /// The shelves with all that `filter` can mean. To look for a handful of dead calls must not read a million others.
    pub(super) fn with(filter: &Filter) -> &'static [Self] {
        match (filter.dead, filter.state) {
            (Some(true), _) | (_, Some(State::Retrying)) => &[Self::Progress],
            (_, Some(State::Queued | State::Running)) => &[Self::Calls],
            (_, Some(State::Succeeded | State::Failed | State::Cancelled)) => &[Self::Finished],
            (_, None) => &[Self::Calls, Self::Finished],
        }
    }

    fn table(self) -> TableDefinition<'static, Number, &'static [u8]> {
        match self {
            Self::Calls => CALLS,
            Self::Progress => PROGRESS,
            Self::Finished => FINISHED,
        }
    }
}

/// One change of the file. It happens as a whole or not at all.
pub(super) struct Change<'t> {
    ids: Arc<Ids>,
    calls: Table<'t, Number, &'static [u8]>,
    numbers: Table<'t, &'static str, Number>,
    progress: Table<'t, Number, &'static [u8]>,
    finished: Table<'t, Number, &'static [u8]>,
    keys: Table<'t, &'static str, &'static str>,
    expiry: Table<'t, (Millis, &'static str), ()>,
}

impl<'t> Change<'t> {
    fn new(transaction: &'t WriteTransaction, ids: Arc<Ids>) -> Result<Self> {
        Ok(Self {
            ids,
            calls: transaction.open_table(CALLS)?,
            numbers: transaction.open_table(NUMBERS)?,
            progress: transaction.open_table(PROGRESS)?,
            finished: transaction.open_table(FINISHED)?,
            keys: transaction.open_table(KEYS)?,
            expiry: transaction.open_table(EXPIRY)?,
        })
    }

    /// The id that `key` stands for.
    pub(super) fn keyed(&self, key: &str) -> Result<Option<String>> {
        let Some(known) = self.keys.get(key)? else { return Ok(None) };
        // One that was purged stands for nothing any more.
        let (id, _) = id_and_end(known.value());
        Ok(self.find(id)?.map(|_| id.to_owned()))
    }

    pub(super) fn add(
        &mut self,
        number: Number,
        id: &str,
        chosen: bool,
        encoded: &[u8],
    ) -> Result<()> {
        self.calls.insert(number, encoded)?;
        if chosen {
            self.numbers.insert(id, number)?;
        }
        Ok(())
    }

    pub(super) fn remember_key(&mut self, key: &str, id: &str, until: Millis) -> Result<()> {
        self.keys.insert(key, format!("{id}\n{until}").as_str())?;
        self.expiry.insert((until, format!("{KEY}{key}").as_str()), ())?;
        Ok(())
    }

    /// Notes where a call is that is not over, or that is dead.
    pub(super) fn note(&mut self, number: Number, status: &Status) -> Result<()> {
        self.progress.insert(number, &*json(status))?;
        Ok(())
    }

    /// Forgets what was noted: the call starts anew.
    pub(super) fn forget_progress(&mut self, number: Number) -> Result<()> {
        self.progress.remove(number)?;
        Ok(())
    }

    /// Ends a call; its state and answer are kept until `until`.
    pub(super) fn finish(
        &mut self,
        number: Number,
        status: &Status,
        answer: Option<&Answer>,
        until: Millis,
    ) -> Result<()> {
        self.calls.remove(number)?;
        self.progress.remove(number)?;
        self.finished.insert(number, &*encode_finished(status, answer))?;
        self.expiry.insert((until, number.to_string().as_str()), ())?;
        Ok(())
    }

    /// Keeps the answer of a call that is dead.
    pub(super) fn keep_answer(
        &mut self,
        number: Number,
        status: &Status,
        answer: Option<&Answer>,
    ) -> Result<()> {
        self.note(number, status)?;
        self.finished.insert(number, &*encode_finished(status, answer))?;
        Ok(())
    }

    pub(super) fn drop_answer(&mut self, number: Number) -> Result<()> {
        self.finished.remove(number)?;
        Ok(())
    }

    /// Removes all trace of a call.
    pub(super) fn remove(&mut self, number: Number, id: &str) -> Result<()> {
        self.calls.remove(number)?;
        self.progress.remove(number)?;
        self.finished.remove(number)?;
        self.numbers.remove(id)?;
        Ok(())
    }

    /// The call with `id`, and what the file says of it.
    pub(super) fn find(&self, id: &str) -> Result<Option<(Number, Status)>> {
        if let Some(number) = self.ids.number_in(id)
            && let Some(status) = self.status(number)?
            && status.id == id
        {
            return Ok(Some((number, status)));
        }
        let Some(number) = self.numbers.get(id)?.map(|number| number.value()) else {
            return Ok(None);
        };
        Ok(self.status(number)?.map(|status| (number, status)))
    }

    fn status(&self, number: Number) -> Result<Option<Status>> {
        if let Some(status) = self.progress.get(number)?.and_then(|json| parse(json.value())) {
            return Ok(Some(status));
        }
        if let Some(bytes) = self.calls.get(number)? {
            return Ok(Status::of_stored(bytes.value()).ok());
        }
        let finished = self.finished.get(number)?;
        let finished =
            finished.and_then(|bytes| decode_finished(&Bytes::copy_from_slice(bytes.value())));
        Ok(finished.map(|(status, _)| status))
    }

    /// Forgets what has been kept until `now`, at most `most` of it; whether there is more.
    pub(super) fn expire(&mut self, now: Millis, most: usize) -> Result<bool> {
        let mut due = Vec::new();
        for entry in self.expiry.range(..(now, ""))?.take(most) {
            let (entry, ()) = entry.map(|(key, _)| (key, ()))?;
            let (at, what) = entry.value();
            due.push((at, what.to_owned()));
        }
        for (at, what) in &due {
            self.expiry.remove((*at, what.as_str()))?;
            if let Some(key) = what.strip_prefix(KEY) {
                // A key whose call was purged may stand for a later one meanwhile.
                let known = self.keys.get(key)?;
                let is_due =
                    known.is_none_or(|it| id_and_end(it.value()).1.is_none_or(|end| end <= *at));
                if is_due {
                    self.keys.remove(key)?;
                }
                continue;
            }
            let Ok(number) = what.parse::<Number>() else { continue };
            let gone = self
                .finished
                .remove(number)?
                .and_then(|bytes| decode_finished(&Bytes::copy_from_slice(bytes.value())));
            if let Some((status, _)) = gone {
                self.numbers.remove(status.id.as_str())?;
            }
        }
        Ok(due.len() == most)
    }
}

/// The id that a key stands for, and until when, if that is known.
fn id_and_end(stored: &str) -> (&str, Option<Millis>) {
    match stored.split_once('\n') {
        Some((id, end)) => (id, end.parse().ok()),
        None => (stored, None),
    }
}

/// The head of a stored answer.
#[derive(Serialize, Deserialize)]
struct AnswerHead {
    status: u16,
    headers: Vec<(String, String)>,
    #[serde(default)]
    truncated: bool,
}

/// What is stored of a call that is over, but for its answer's body.
#[derive(Serialize, Deserialize)]
struct FinishedHead {
    status: Status,
    #[serde(default)]
    answer: Option<AnswerHead>,
}

/// The length of the JSON, the JSON, the body.
fn encode_finished(status: &Status, answer: Option<&Answer>) -> Vec<u8> {
    let head = FinishedHead {
        status: status.clone(),
        answer: answer.map(|answer| AnswerHead {
            status: answer.status,
            headers: answer.headers.clone(),
            truncated: answer.truncated,
        }),
    };
    let head = serde_json::to_vec(&head).unwrap_or_default();
    let body = answer.map_or(&[][..], |answer| &answer.body);
    let mut bytes = Vec::with_capacity(4 + head.len() + body.len());
    bytes.put_u32(u32::try_from(head.len()).unwrap_or(u32::MAX));
    bytes.put_slice(&head);
    bytes.put_slice(body);
    bytes
}

fn decode_finished(bytes: &Bytes) -> Option<(Status, Option<Answer>)> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let length = u32::from_be_bytes(*length) as usize;
    let head: FinishedHead = serde_json::from_slice(rest.get(..length)?).ok()?;
    let body = bytes.slice(4 + length..);
    let answer = head.answer.map(|answer| Answer {
        status: answer.status,
        headers: answer.headers,
        body,
        truncated: answer.truncated,
    });
    Some((head.status, answer))
}

fn json(status: &Status) -> Vec<u8> {
    serde_json::to_vec(status).unwrap_or_default()
}

fn parse(json: &[u8]) -> Option<Status> {
    serde_json::from_slice(json).ok()
}
