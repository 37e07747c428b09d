//! Has a call executed once, even if NATS Streaming has stored it several times: claims are written into the log of
//! executions, a channel that all workers follow, and the first claim of a step holds (see [`executed`]).
//!
//! A call is lost by none of this: its message stays with the server until the call is over. A worker that dies while it
//! executes a call has the call executed again. Where the server has no place for the log, calls are executed as they come.
//!
//! [`executed`]: crate::queue::stan::executed

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt as _;
use prost::Message as _;
use tokio::sync::{Notify, oneshot};

use crate::queue::call::{QueuedCall, UnixMillis};
use crate::queue::now;
use crate::queue::stan::Shared;
use crate::queue::stan::client::Session;
use crate::queue::stan::executed::{self, Claimed, Executed, Owner, REMEMBERED, Record, Step};
use crate::queue::stan::ledger::Key;
use crate::queue::stan::message::Progress;
use crate::queue::stan::nats::Fault;
use crate::queue::stan::proto::{Ack, Delivered, Subscribe, Subscribed, TIME_DELTA, Unsubscribe};

/// A claim is written and read within this time, or its message is given back to the server. After a start the log of an
/// hour is read first.
const CLAIMING: Duration = Duration::from_secs(60);
/// A claim that has not been read after this time is written again.
const WRITING: Duration = Duration::from_secs(3);
/// Records that are written in one message.
const TOGETHER: usize = 1024;
/// Ends of steps that wait to be written; the oldest are dropped first.
const MOST_ENDS: usize = 16 * 1024;
/// Before records that could not be written are written again.
const AGAIN: Duration = Duration::from_millis(200);
/// Before a log that the server refuses is asked for again.
const REFUSED: Duration = Duration::from_secs(5);
/// Messages of the log that are on their way to a worker.
const MOST_UNREAD: i32 = 1024;
const SUBSCRIBING: Duration = Duration::from_secs(5);
/// How long the last ends may take to be written when the queue stops.
const FLUSHING: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(20);

/// The claims of this process, and what it has read of the log.
#[derive(Default)]
pub(super) struct Once {
    state: Mutex<State>,
    /// There is something to write.
    unwritten: Notify,
}

#[derive(Default)]
struct State {
    executed: Executed,
    /// Those that wait until their claims have been read.
    waiting: HashMap<Step, Vec<oneshot::Sender<()>>>,
    claims: Vec<Record>,
    ends: Vec<Record>,
    /// Records that are being written.
    writing: usize,
    /// The server has no place for the log.
    refused: bool,
}

impl State {
    /// Wakes those that wait for `step`; they look for themselves.
    fn wake(&mut self, step: Step) {
        for waiting in self.waiting.remove(&step).unwrap_or_default() {
            // It may have stopped waiting.
            let _ = waiting.send(());
        }
    }

    fn refuse(&mut self) {
        self.refused = true;
        self.claims.clear();
        self.ends.clear();
        // Those that wait look for themselves.
        self.waiting.clear();
    }
}

impl Once {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a step is over. A message of it whose acknowledgement the server has lost is not executed again.
    pub(super) fn is_over(&self, step: Step) {
        let mut state = self.state();
        if !state.refused {
            let (record, now) = (Record { step, owner: Owner::NOBODY }, now());
            state.executed.apply(record, now, now);
            state.ends.push(record);
            let surplus = state.ends.len().saturating_sub(MOST_ENDS);
            state.ends.drain(..surplus);
            drop(state);
            self.unwritten.notify_one();
        }
    }

    /// Waits until all is written, but not for long.
    pub(super) async fn flush(&self) {
        let written = async {
            while {
                let state = self.state();
                !state.ends.is_empty() || state.writing > 0
            } {
                tokio::time::sleep(LOOK).await;
            }
        };
        let _ = tokio::time::timeout(FLUSHING, written).await;
    }
}

/// The step that comes next for `call`.
pub(super) fn step(shared: &Shared, call: &QueuedCall, progress: &Progress) -> Step {
    Step::of(call, progress.attempts, progress.moves, &shared.options.group)
}

/// Whether the message `key` is the one that is to do `step`. If another one is, this is a duplicate.
pub(super) async fn claim(shared: &Shared, key: Key, step: Step) -> Result<bool, Fault> {
    let (once, owner) = (&shared.once, Owner::of(key));
    let claimed = async {
        let mut written = false;
        loop {
            let read = {
                let mut state = once.state();
                if state.refused {
                    return true;
                }
                state.executed.expire(now());
                match state.executed.claimed(step, owner) {
                    Claimed::ByThis => return true,
                    Claimed::ByAnother => return false,
                    Claimed::NotYet => {}
                }
                if !written {
                    state.claims.push(Record { step, owner });
                }
                let (wake, read) = oneshot::channel();
                state.waiting.entry(step).or_default().push(wake);
                read
            };
            once.unwritten.notify_one();
            // A message of the log that was lost on its way here is noticed when the next one comes.
            written = tokio::time::timeout(WRITING, read).await.is_ok();
        }
    };
    let claimed = tokio::select! {
        // Nobody writes claims any more.
        () = shared.tasks.stopping.cancelled() => None,
        claimed = tokio::time::timeout(CLAIMING, claimed) => claimed.ok(),
    };
    if claimed.is_none() {
        once.state().waiting.retain(|_, waiting| {
            waiting.retain(|it| !it.is_closed());
            !waiting.is_empty()
        });
    }
    claimed.ok_or(Fault::Away)
}

/// Writes claims and ends into the log, until the queue stops. Those that come while a message is being stored go together
/// in the next one.
pub(super) async fn write_all(shared: &Shared) {
    let (once, stopping) = (&shared.once, &shared.tasks.stopping);
    loop {
        tokio::select! {
            () = stopping.cancelled() => return,
            () = once.unwritten.notified() => {}
        }
        while let Some(records) = next_records(once) {
            let message = executed::encode(&records).into();
            // What is cut here is written by nobody: the worker is stopping.
            let stored = tokio::select! {
                () = stopping.cancelled() => return,
                stored = shared.worker.publish(&shared.log, message) => stored,
            };
            match stored {
                Ok(()) => once.state().writing = 0,
                Err(Fault::Refused(error)) if !is_unregistered(&error) => {
                    once.state().writing = 0;
                    refuse(shared, &Fault::Refused(error));
                }
                Err(_) => {
                    write_again(once, records);
                    let _ = tokio::time::timeout(AGAIN, stopping.cancelled()).await;
                }
            }
        }
    }
}

/// Puts back what was not stored for all that is known. If it was, the same records again change nothing.
fn write_again(once: &Once, records: Vec<Record>) {
    let (ends, claims) = records.into_iter().partition::<Vec<_>, _>(|it| it.owner == Owner::NOBODY);
    let mut state = once.state();
    state.writing = 0;
    state.ends.splice(..0, ends);
    state.claims.splice(..0, claims);
}

/// Claims first: calls wait for them.
fn next_records(once: &Once) -> Option<Vec<Record>> {
    let mut state = once.state();
    let claims = state.claims.len().min(TOGETHER);
    let mut records: Vec<Record> = state.claims.drain(..claims).collect();
    let ends = state.ends.len().min(TOGETHER - claims);
    records.extend(state.ends.drain(..ends));
    state.writing = records.len();
    Some(records).filter(|records| !records.is_empty())
}

/// The server refuses what a client publishes that it does not know any more; the client registers again.
fn is_unregistered(error: &str) -> bool {
    error.contains("invalid publish request")
}

/// Goes on without the log.
fn refuse(shared: &Shared, fault: &Fault) {
    let mut state = shared.once.state();
    if !state.refused {
        let log = &shared.log;
        tracing::warn!(
            channel = log, error = %fault,
            "NATS Streaming has no place for the channel {log}: a call that it stores twice is executed twice: {fault}"
        );
    }
    state.refuse();
}

/// Reads the log as long as `session` lasts; returns what went wrong.
pub(super) async fn follow(shared: &Arc<Shared>, session: &Session) -> Fault {
    loop {
        match subscribe(shared, session).await {
            Ok((deliveries, acks)) => match read(shared, deliveries, &acks).await {
                End::Gap => unsubscribe(shared, session, acks).await,
                End::Over(fault) => return fault,
            },
            Err(fault @ Fault::Refused(_)) => {
                refuse(shared, &fault);
                tokio::time::sleep(REFUSED).await;
            }
            Err(fault) => return fault,
        }
    }
}

async fn subscribe(
    shared: &Shared,
    session: &Session,
) -> Result<(async_nats::Subscriber, String), Fault> {
    let inbox = shared.nats.inbox();
    let deliveries = shared.nats.subscribe(inbox.clone()).await?;
    let request = Subscribe {
        client_id: shared.worker.id().to_owned(),
        channel: shared.log.clone(),
        inbox,
        max_in_flight: MOST_UNREAD,
        ack_wait: i32::try_from(shared.lease().as_secs()).unwrap_or(i32::MAX),
        start_position: TIME_DELTA,
        start_time_delta: i64::try_from(REMEMBERED * 1_000_000).unwrap_or(i64::MAX),
        ..Subscribe::default()
    };
    // The log is read again from its start: a server that has lost it must not cause refusals by its former content.
    {
        let mut state = shared.once.state();
        state.executed = Executed::default();
    }
    let subscribed: Subscribed =
        shared.nats.request(&session.server.subscribe, &request, SUBSCRIBING).await?;
    match subscribed.error.as_str() {
        "" => {
            shared.once.state().refused = false;
            Ok((deliveries, subscribed.ack_inbox))
        }
        error => Err(Fault::Refused(error.to_owned())),
    }
}

/// Why the log is not read any further.
enum End {
    /// A message was lost on its way here: the log is read again from its start.
    Gap,
    Over(Fault),
}

/// Closes a subscription that has missed a message.
async fn unsubscribe(shared: &Shared, session: &Session, acks: String) {
    let request = Unsubscribe {
        client_id: shared.worker.id().to_owned(),
        channel: shared.log.clone(),
        ack_inbox: acks,
        durable_name: String::new(),
    };
    // If it is lost, what comes is read by nobody.
    let subject = session.server.unsubscribe.clone();
    let _ = shared.nats.send(subject, request.encode_to_vec().into()).await;
    tokio::time::sleep(AGAIN).await;
}

async fn read(shared: &Shared, mut deliveries: async_nats::Subscriber, acks: &str) -> End {
    let mut seen: Option<(u64, u64)> = None;
    while let Some(message) = deliveries.next().await {
        let Ok(delivered) = Delivered::decode(message.payload) else {
            return End::Over(Fault::Odd);
        };
        let Delivered { sequence, timestamp, data, .. } = delivered;
        match seen {
            // Sent again, since an acknowledgement was lost.
            Some((first, last)) if (first..=last).contains(&sequence) => {}
            // The order decides which claim holds: what is missing may be one that came first.
            Some((_, last)) if sequence != last + 1 => return End::Gap,
            _ => {
                seen = Some((seen.map_or(sequence, |(first, _)| first), sequence));
                let at = UnixMillis::try_from(timestamp / 1_000_000).unwrap_or_default();
                let (mut state, now) = (shared.once.state(), now());
                state.executed.expire(now);
                for record in executed::decode(&data) {
                    state.executed.apply(record, at, now);
                    state.wake(record.step);
                }
            }
        }
        let ack = Ack { channel: shared.log.clone(), sequence };
        // One that is lost has the message sent again.
        let _ = shared.nats.send(acks.to_owned(), ack.encode_to_vec().into()).await;
    }
    End::Over(Fault::Away)
}
