//! A message with several calls that has come: each of them is made by itself, and what becomes of them is noted
//! together. The message goes when all of them are over or have one of their own.

use std::sync::atomic::{AtomicUsize, Ordering::AcqRel, Ordering::Acquire};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_nats::HeaderMap;
use async_nats::jetstream::AckKind;
use bytes::Bytes;
use tokio::sync::oneshot;

use crate::function::Function;
use crate::queue::call::QueuedCall;
use crate::queue::jetstream::Shared;
use crate::queue::jetstream::bundle::{self, Closed, Record, Slot};
use crate::queue::jetstream::ids::Key;
use crate::queue::jetstream::message::Message;
use crate::queue::jetstream::pull::{
    Address, Arrived, Origin, PAUSE, UNREADABLE, tell, unreadable,
};
use crate::queue::jetstream::roll::Roll;
use crate::queue::jetstream::server::Fault;
use crate::queue::jetstream::subject::{CALLS, ENDS, OPEN};

/// So often one tries to change a record beside others who do.
pub(super) const TRIES: usize = 32;
/// For so long at most the end of a call waits for the end of others, to be noted with it.
const ENDING: Duration = Duration::from_millis(2);
/// So often one tries to give a call back.
const ATTEMPTS: usize = 5;
/// That we have it is not said more often.
const OFTEN: Duration = Duration::from_millis(100);

/// A record as it is on the server, and the number of its message there; 0 for none.
pub(super) type Numbered = (Record, u64);

/// Which message it is.
#[derive(Clone, Debug)]
pub(super) struct Which {
    pub(super) function: Function,
    pub(super) key: Key,
    pub(super) sequence: u64,
}

/// A message with several calls that we have.
pub(super) struct Bundle {
    pub(super) which: Which,
    pub(super) address: Address,
    /// When it came, and for how long it is ours without a word.
    came: Instant,
    lease: Duration,
    /// So many of its calls we are not done with.
    open: AtomicUsize,
    inner: Mutex<Inner>,
}

struct Inner {
    record: Numbered,
    /// It is where final states are kept.
    filed: bool,
    waiting: Vec<News>,
    /// Somebody notes it.
    writing: bool,
    /// Somebody will do so in a moment.
    timed: bool,
    told: Instant,
}

/// What is to be noted of a call, and who waits for that.
struct News {
    slot: Slot,
    closed: Closed,
    done: oneshot::Sender<Result<bool, Fault>>,
}

impl Bundle {
    fn new(
        which: Which,
        address: Address,
        lease: Duration,
        record: Numbered,
        open: usize,
    ) -> Arc<Self> {
        let inner = Inner {
            record,
            filed: false,
            waiting: Vec::new(),
            writing: false,
            timed: false,
            told: Instant::now(),
        };
        let open = AtomicUsize::new(open);
        let (came, inner) = (Instant::now(), Mutex::new(inner));
        Arc::new(Self { which, address, came, lease, open, inner })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what has become of a call; `false` if somebody else has noted something else. A note has a price of its own:
    /// unless one is wanted `at_once`, it waits for other calls of the message to end.
    pub(super) async fn close(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        slot: Slot,
        closed: Closed,
        at_once: bool,
    ) -> Result<bool, Fault> {
        let (done, noted) = oneshot::channel();
        {
            let mut inner = self.inner();
            inner.waiting.push(News { slot, closed, done });
            self.write_in_time(&mut inner, shared, at_once);
        }
        noted.await.unwrap_or(Err(Fault::Away))
    }

    /// Has what there is noted, at once if it is all there can be for now.
    fn write_in_time(self: &Arc<Self>, inner: &mut Inner, shared: &Arc<Shared>, at_once: bool) {
        if self.open.load(Acquire) == 0 {
            // All is filed, or about to be: nobody waits for more.
            inner.waiting.clear();
            return;
        }
        let all = inner.waiting.len() + inner.record.0.closed() >= self.which.key.count()
            || shared.lines().waits_for(inner.waiting.len());
        if inner.writing || (inner.timed && !all && !at_once) {
            return;
        }
        let (shared, this) = (Arc::clone(shared), Arc::clone(self));
        let tasks = Arc::clone(&shared);
        if all || at_once {
            inner.writing = true;
            tasks.tasks.spawn_to_completion(async move { this.write(&shared).await });
        } else {
            inner.timed = true;
            tasks.tasks.spawn_to_completion(async move {
                tokio::time::sleep(ENDING).await;
                let mut inner = this.inner();
                inner.timed = false;
                if !inner.waiting.is_empty() {
                    this.write_in_time(&mut inner, &shared, true);
                }
            });
        }
    }

    /// Notes what there is.
    async fn write(self: &Arc<Self>, shared: &Arc<Shared>) {
        let (waiting, (record, number)) = {
            let mut inner = self.inner();
            (std::mem::take(&mut inner.waiting), inner.record.clone())
        };
        let (closed, answers): (Vec<_>, Vec<_>) =
            waiting.into_iter().map(|News { slot, closed, done }| ((slot, closed), done)).unzip();
        let noted = self.note(shared, record, number, &closed).await;
        let ours = {
            let mut inner = self.inner();
            inner.writing = false;
            let ours = noted.map(|(record, ours, filed)| {
                (inner.record, inner.filed) = (record, filed);
                ours
            });
            if !inner.waiting.is_empty() {
                self.write_in_time(&mut inner, shared, false);
            }
            ours
        };
        for (number, done) in answers.into_iter().enumerate() {
            // Whoever has left does not want to know.
            let _ = done.send(ours.as_ref().map(|ours| ours[number]).map_err(Clone::clone));
        }
    }

    /// The same. When nothing is left to be noted later, it is filed at once; whether it was.
    async fn note(
        &self,
        shared: &Shared,
        record: Record,
        number: u64,
        closed: &[(Slot, Closed)],
    ) -> Result<(Numbered, Vec<bool>, bool), Fault> {
        let mut next = record.clone();
        let ours: Vec<bool> =
            closed.iter().map(|(slot, closed)| next.close(*slot, closed.clone())).collect();
        if next.is_final(self.which.key) && !ours.contains(&false) {
            shared.file(&self.which, &next).await?;
            return Ok(((next, number), ours, true));
        }
        let mut known = (record, number);
        if number == 0 {
            // Somebody may be given the message as if he were the first.
            shared.say_taken(self.which.key).await?;
            // And somebody may have come to the end of it, if nothing was heard of us for too long.
            if self.came.elapsed() > self.lease / 2 {
                known = shared.record(&self.which, true).await?;
            }
        }
        let (record, ours) = shared.note(&self.which, known, closed, None).await?;
        Ok((record, ours, false))
    }

    /// Gives a call a message of its own, so that anybody can take it. If that fails, the server gives all that is left
    /// of this message to somebody when it has not heard of it for long enough.
    pub(super) async fn let_go(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        call: &QueuedCall,
        slot: Slot,
    ) {
        let headers = Message::new(call).fresh();
        for pause in [PAUSE; ATTEMPTS] {
            match self.move_out(shared, call, slot, headers.clone()).await {
                Ok(()) => return self.done(shared).await,
                Err(error) => {
                    tracing::debug!(%error, call_id = call.id, "A call cannot be given back by itself");
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }

    /// Has a call have a message of its own with those headers, unless it is over by now.
    pub(super) async fn move_out(
        self: &Arc<Self>,
        shared: &Arc<Shared>,
        call: &QueuedCall,
        slot: Slot,
        headers: HeaderMap,
    ) -> Result<(), Fault> {
        // Whoever is given this message later sees that the other may be missing.
        if self.close(shared, slot, Closed::Moved, true).await? {
            shared.place(call, headers).await?;
            self.placed(shared, slot);
        }
        Ok(())
    }

    /// A call has got the message of its own. It is enough if that is noted with what is noted next.
    pub(super) fn placed(self: &Arc<Self>, shared: &Arc<Shared>, slot: Slot) {
        let (done, _) = oneshot::channel();
        let mut inner = self.inner();
        inner.waiting.push(News { slot, closed: Closed::Placed, done });
        self.write_in_time(&mut inner, shared, false);
    }

    /// We are done with one of the calls.
    pub(super) async fn done(&self, shared: &Shared) {
        if self.open.fetch_sub(1, AcqRel) == 1 {
            self.over(shared).await;
        }
    }

    /// Has the message removed. Whoever is given it again, should this be lost, sees that it is over.
    pub(super) async fn over(&self, shared: &Shared) {
        let ((mut record, number), filed) = {
            let inner = self.inner();
            (inner.record.clone(), inner.filed)
        };
        record.all_placed();
        if !filed && let Err(error) = shared.file(&self.which, &record).await {
            tracing::debug!(%error, "What became of calls cannot be filed");
            return;
        }
        tell(&shared.server, &self.address.reply(), AckKind::Ack).await;
        shared.taken().forget(self.which.key);
        if number > 0
            && let Err(error) = shared.server.delete(&shared.names.open, number).await
        {
            // It is removed when somebody tidies up.
            tracing::debug!(%error, "A record of calls that are over cannot be removed");
        }
    }

    /// Says that we have it, unless that was said a moment ago.
    pub(super) async fn still_busy(&self, shared: &Shared) {
        {
            let mut inner = self.inner();
            if inner.told.elapsed() < OFTEN {
                return;
            }
            inner.told = Instant::now();
        }
        tell(&shared.server, &self.address.reply(), AckKind::Progress).await;
    }
}

/// A message with several calls that comes.
pub(super) struct Come {
    pub(super) which: Which,
    pub(super) line: usize,
    /// How often it has come, to whomever.
    pub(super) deliveries: u32,
    pub(super) consumer: Arc<str>,
    pub(super) lease: Duration,
    pub(super) payload: Bytes,
}

impl Come {
    /// Keeps those of the calls that are not over.
    pub(super) async fn unpack(self, shared: &Arc<Shared>, address: Address) {
        let Self { which, line, deliveries, consumer, lease, payload } = self;
        let calls = match bundle::decode(payload, &which.function, which.key) {
            Ok(calls) => calls,
            Err(error) => {
                let subject = shared.names.together(CALLS, &which.function, which.key);
                let reply = address.reply();
                return unreadable(shared, which.sequence, &subject, &reply, &error).await;
            }
        };
        // Of a message that nobody was given before, only those know something who took a call out.
        let suspect = deliveries > 1 || shared.server.was_found(which.sequence);
        let touched = suspect || shared.taken().may_have(which.key, shared.server.connected());
        let record = match touched {
            true => shared.record(&which, suspect).await,
            false => Ok((Record::of(which.sequence), 0)),
        };
        let record = match record {
            Ok(record) => record,
            Err(error) => {
                tracing::debug!(%error, "Calls that came cannot be begun");
                // A record that is not understood is of a version to come.
                let again = if matches!(error, Fault::Odd) { UNREADABLE } else { PAUSE };
                return tell(&shared.server, &address.reply(), AckKind::Nak(Some(again))).await;
            }
        };
        let sequence = which.sequence;
        let left = (0..)
            .zip(calls)
            .filter(|(slot, _)| matches!(record.0.get(*slot), None | Some(Closed::Moved)));
        let (moved, left): (Vec<_>, Vec<_>) =
            left.partition(|(slot, _)| record.0.get(*slot).is_some());
        let bundle = Bundle::new(which, address, lease, record, moved.len() + left.len());
        if moved.is_empty() && left.is_empty() {
            return bundle.over(shared).await;
        }
        {
            let (mut lines, now) = (shared.lines(), Instant::now());
            for (slot, call) in left {
                // Nothing is known of it but what it is.
                let message = Message::stored(HeaderMap::new(), call.body.clone());
                let origin = Origin::Among(bundle.clone(), slot);
                let consumer = Arc::clone(&consumer);
                let arrived =
                    Arrived { call, message, sequence, deliveries, origin, consumer, lease };
                lines.arrived(line, arrived, now);
            }
        }
        shared.ready.notify_one();
        Roll::keep(shared);
        for (slot, call) in moved {
            // Whoever was about to give it a message of its own may have died over that.
            let placed = async {
                if shared.has_trace(&call).await? {
                    return Ok(());
                }
                shared.place(&call, Message::new(&call).fresh()).await
            };
            match placed.await {
                Ok(()) => {
                    bundle.placed(shared, slot);
                    bundle.done(shared).await;
                }
                Err(error) => tracing::debug!(%error, call_id = call.id, "A call cannot be moved"),
            }
        }
    }
}

impl Shared {
    /// What is known of the calls in a message; `filed`: it may be gone, or may have been about to go.
    pub(super) async fn record(&self, which: &Which, filed: bool) -> Result<Numbered, Fault> {
        let Which { function, key, sequence } = which;
        let open = self.record_at(&self.names.together(OPEN, function, *key), false).await?;
        let (mut record, number) = open.unwrap_or_else(|| (Record::of(*sequence), 0));
        if record.sequence != *sequence {
            // One that was left by a message of before.
            record = Record::of(*sequence);
        }
        if filed {
            let subject = self.names.together(ENDS, function, *key);
            if let Some((filed, _)) = self.record_at(&subject, true).await? {
                record.add(filed);
            }
        }
        Ok((record, number))
    }

    /// The record under `subject`, or under the last that it means.
    pub(super) async fn record_at(
        &self,
        subject: &str,
        filed: bool,
    ) -> Result<Option<Numbered>, Fault> {
        let stream = if filed { &self.names.notes } else { &self.names.open };
        let Some(found) = self.server.last(stream, subject).await? else { return Ok(None) };
        let record = Record::decode(found.payload).ok_or(Fault::Odd)?;
        Ok(Some((record, found.sequence)))
    }

    /// Notes what has become of calls, beside others who may do so; of which of them nobody has noted something else. It
    /// is not begun after `until`.
    pub(super) async fn note(
        &self,
        which: &Which,
        known: Numbered,
        closed: &[(Slot, Closed)],
        until: Option<Instant>,
    ) -> Result<(Numbered, Vec<bool>), Fault> {
        let (mut record, mut number) = known;
        for _ in 0..TRIES {
            if until.is_some_and(|until| Instant::now() > until) {
                return Err(Fault::Away);
            }
            let mut next = record.clone();
            let mut ours = Vec::with_capacity(closed.len());
            for (slot, closed) in closed {
                // It may be there, and only the word of that was lost.
                ours.push(next.close(*slot, closed.clone()) || next.get(*slot) == Some(closed));
            }
            if next == record {
                return Ok(((record, number), ours));
            }
            match self.put_record(which, &next, number).await {
                Ok(number) => return Ok(((next, number), ours)),
                Err(fault) if fault.is_conflict() => {
                    (record, number) = self.record(which, true).await?;
                }
                Err(fault) => return Err(fault),
            }
        }
        Err(Fault::Away)
    }

    /// Stores a record over the one with that number.
    async fn put_record(&self, which: &Which, record: &Record, over: u64) -> Result<u64, Fault> {
        let subject = self.names.together(OPEN, &which.function, which.key);
        let stored =
            self.server.put(subject, HeaderMap::new(), record.encode(), Some(over)).await?;
        Ok(stored.sequence)
    }

    /// Keeps what became of the calls of a message that goes, for as long as results are kept.
    pub(super) async fn file(&self, which: &Which, record: &Record) -> Result<(), Fault> {
        let subject = self.names.together(ENDS, &which.function, which.key);
        self.server.put(subject, HeaderMap::new(), record.encode(), None).await.map(drop)
    }

    /// Gives a call a message of its own, unless it has one.
    pub(super) async fn place(&self, call: &QueuedCall, headers: HeaderMap) -> Result<(), Fault> {
        let subject = self.names.call(CALLS, &call.function, &call.id);
        match self.server.put(subject, headers, call.body.clone(), Some(0)).await {
            Err(fault) if !fault.is_conflict() => Err(fault),
            _ => Ok(()),
        }
    }
}
