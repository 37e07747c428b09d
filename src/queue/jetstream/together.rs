//! What is known of calls that are in one message with others, and how they are changed from outside.
//!
//! The record of a message says which of its calls are over. It is there for as long as the message is, and is filed
//! beside the final states before the message goes, where it stays for as long as they do.

use std::time::{Duration, Instant};

use async_nats::jetstream::message::StreamMessage;

use crate::function::Function;
use crate::queue::call::QueuedCall;
use crate::queue::jetstream::Shared;
use crate::queue::jetstream::bundle::{self, Closed, Record, Slot};
use crate::queue::jetstream::ids::Key;
use crate::queue::jetstream::message::Message;
use crate::queue::jetstream::server::Fault;
use crate::queue::jetstream::state::{Ended, Found, Waiting};
use crate::queue::jetstream::subject::{self, CALLS, DEAD, ENDS, Named, OPEN, named};
use crate::queue::jetstream::unpack::{TRIES, Which};
use crate::queue::now;
use crate::queue::status::CallRecord;

/// Where a call is whose message has others.
pub(super) enum Among {
    Found(Found),
    /// It is in a message of its own, or is about to be: then it is still here.
    Moved(Option<Waiting>),
    /// All trace of it was removed.
    Gone,
    /// The message is not there, and nothing is known of it.
    Nowhere,
}

/// A message with several calls.
pub(super) struct Bundled {
    pub(super) which: Which,
    pub(super) calls: Vec<QueuedCall>,
}

impl Bundled {
    /// `None` if it is another message, or cannot be read.
    pub(super) fn new(found: StreamMessage) -> Option<Self> {
        let key = subject::key(&found.subject)?;
        let function = named(&found.subject)?.function;
        let calls = bundle::decode(found.payload, &function, key).ok()?;
        Some(Self { which: Which { function, key, sequence: found.sequence }, calls })
    }

    /// The calls of which `record` says nothing.
    pub(super) fn open(self, record: Option<&Record>) -> impl Iterator<Item = Waiting> {
        let Self { which, calls } = self;
        let record = record.filter(|record| record.sequence == which.sequence);
        let calls = (0..).zip(calls);
        let open = calls.filter(move |(slot, _)| record.is_none_or(|it| it.get(*slot).is_none()));
        open.map(move |(slot, call)| waiting(&which, slot, &call))
    }
}

fn waiting(which: &Which, slot: Slot, call: &QueuedCall) -> Waiting {
    let named = Named { function: call.function.clone(), id: call.id.clone() };
    Waiting {
        named,
        sequence: which.sequence,
        message: Message::new(call),
        since: None,
        among: Some((which.clone(), slot)),
    }
}

impl Shared {
    /// Whether a call whose message had others has one of its own, or had one.
    pub(super) async fn has_trace(&self, call: &QueuedCall) -> Result<bool, Fault> {
        let (server, names) = (&self.server, &self.names);
        let places = [(&names.calls, CALLS), (&names.dead, DEAD), (&names.notes, ENDS)];
        for (stream, root) in places {
            let subject = names.call(root, &call.function, &call.id);
            if server.last(stream, &subject).await?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Where the call with `id` is, one of those under `key`. The message is read first: if it is not there, the record
    /// is whole.
    pub(super) async fn find_among(
        &self,
        function: Option<&Function>,
        key: Key,
        id: &str,
    ) -> Result<Among, Fault> {
        let names = &self.names;
        let subject = |root| match function {
            Some(function) => names.together(root, function, key),
            None => names.by_key(root, key),
        };
        let message = self.server.last(&names.calls, &subject(CALLS)).await?;
        let message = message.and_then(Bundled::new);
        // In this order: it is filed before it goes from the first place. One of another message is none.
        let sequence = message.as_ref().map(|message| message.which.sequence);
        let is_its = |record: &Record| sequence.is_none_or(|sequence| record.sequence == sequence);
        let open = self.record_at(&subject(OPEN), false).await?;
        let mut record = open.map(|(record, _)| record).filter(is_its);
        if let Some((filed, _)) = self.record_at(&subject(ENDS), true).await?
            && is_its(&filed)
        {
            match &mut record {
                Some(record) => record.add(filed),
                None => record = Some(filed),
            }
        }
        let function = message.as_ref().map(|it| it.which.function.clone());
        let in_message = message.and_then(|Bundled { which, calls }| {
            let slot = calls.iter().position(|call| call.id == id)?;
            let slot = Slot::try_from(slot).ok()?;
            Some(waiting(&which, slot, &calls[usize::from(slot)]))
        });
        let slot = in_message.as_ref().and_then(Waiting::slot);
        let Some(record) = record else { return self.among(in_message).await };
        let ended = record.ends().find(|(_, end, _)| end.status.id == id);
        if let Some((slot, end, body)) = ended {
            let of_status = || Function::parse(&end.status.function, "");
            let Some(function) = function.or_else(of_status) else { return Ok(Among::Nowhere) };
            if !self.is_kept(&end.status) {
                return Ok(Among::Gone);
            }
            let which = Which { function, key, sequence: record.sequence };
            let among = Some((which, slot));
            return Ok(Among::Found(Found::Ended(Ended { end, body, among })));
        }
        match slot.and_then(|slot| record.get(slot)) {
            Some(Closed::Moved) => Ok(Among::Moved(in_message)),
            Some(Closed::Placed) => Ok(Among::Moved(None)),
            Some(_) => Ok(Among::Gone),
            None if slot.is_some() => self.among(in_message).await,
            None => Ok(Among::Moved(None)),
        }
    }

    async fn among(&self, waiting: Option<Waiting>) -> Result<Among, Fault> {
        let Some(mut waiting) = waiting else { return Ok(Among::Nowhere) };
        waiting.since = self.runs().await?.get(&waiting.place()).copied();
        Ok(Among::Found(Found::Waiting(waiting)))
    }

    /// Takes a call out that nobody makes nor begins until then, with its final state or without; `false` if it is over
    /// by now.
    pub(super) async fn close_among(
        &self,
        which: &Which,
        slot: Slot,
        status: Option<CallRecord>,
        until: Instant,
    ) -> Result<bool, Fault> {
        let closed = match status {
            Some(status) => Closed::ended(which.sequence, status, None),
            None => Closed::Gone,
        };
        self.say_taken(which.key).await?;
        let record = self.record(which, true).await?;
        let noted = self.note(which, record, &[(slot, closed)], Some(until)).await?;
        let ((record, _), ours) = noted;
        let ours = ours == [true];
        if ours && record.is_final(which.key) {
            // It was the last one. The record stays until somebody tidies up: whoever has the message may know nothing yet.
            self.file(which, &record).await?;
            self.server.delete(&self.names.calls, which.sequence).await?;
        }
        Ok(ours)
    }

    /// Forgets the final state of a call.
    pub(super) async fn purge_among(&self, which: &Which, slot: Slot) -> Result<(), Fault> {
        let names = &self.names;
        for (root, filed) in [(OPEN, false), (ENDS, true)] {
            let subject = names.together(root, &which.function, which.key);
            for tries in 1.. {
                let found = self.record_at(&subject, filed).await?;
                let found = found.filter(|(record, _)| record.sequence == which.sequence);
                let Some((mut record, number)) = found else { break };
                record.purge(slot);
                let headers = async_nats::HeaderMap::new();
                let put = self.server.put(subject.clone(), headers, record.encode(), Some(number));
                match put.await {
                    Ok(_) => break,
                    Err(fault) if fault.is_conflict() && tries < TRIES => {}
                    Err(fault) => return Err(fault),
                }
            }
        }
        Ok(())
    }

    /// Whether a message is there only because the server has forgotten that it was removed: each of its calls is over or
    /// has a message of its own. Its consumer may take it to be over, and then nobody is given it.
    pub(super) async fn is_left_over(&self, bundled: &Bundled) -> Result<bool, Fault> {
        let Bundled { which, calls } = bundled;
        let record = match self.record(which, true).await {
            Ok((record, _)) => record,
            // It is of a version to come.
            Err(Fault::Odd) => return Ok(false),
            Err(fault) => return Err(fault),
        };
        if !record.is_whole(which.key) {
            return Ok(false);
        }
        for (slot, call) in (0..).zip(calls) {
            if record.get(slot) == Some(&Closed::Moved) && !self.has_trace(call).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Removes records older than `age` whose messages are gone; how many there were.
    pub(super) async fn tidy_records(&self, age: Duration) -> Result<u64, Fault> {
        let (server, names) = (&self.server, &self.names);
        let mut removed = 0;
        for subject in server.subjects(&names.open, &names.of(OPEN, None), usize::MAX).await? {
            let Some(found) = server.last(&names.open, &subject).await? else { continue };
            let born = u128::try_from(found.time.unix_timestamp_nanos()).unwrap_or(0) / 1_000_000;
            let (key, named) = (subject::key(&subject), named(&subject));
            let (Some(key), Some(named)) = (key, named) else { continue };
            if u128::from(now()).saturating_sub(born) < age.as_millis() {
                continue;
            }
            let message = names.together(CALLS, &named.function, key);
            if server.last(&names.calls, &message).await?.is_none() {
                server.delete(&names.open, found.sequence).await?;
                removed += 1;
            }
        }
        Ok(removed)
    }
}
