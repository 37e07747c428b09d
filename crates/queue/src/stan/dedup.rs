//! Deduplication: a call is executed once, even if NATS Streaming has stored it several times. Workers write claims to
//! the execution log, a channel that all of them read, and the first claim of a step wins (see [`execution_log`]).
//!
//! No call can be lost: the server keeps its message until the call has finished. If a worker dies during an
//! execution, the call is executed again. If the server has no channel for the log, calls are executed without
//! deduplication.
//!
//! [`execution_log`]: crate::stan::execution_log

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures_util::StreamExt as _;
use prost::Message as _;
use tokio::sync::{Notify, oneshot};

use crate::call::{QueuedCall, UnixMillis};
use crate::now;
use crate::stan::Shared;
use crate::stan::client::Session;
use crate::stan::execution_log::{self, ClaimState, ExecutionLog, Owner, RETENTION, Record, Step};
use crate::stan::inflight::MessageKey;
use crate::stan::message::Progress;
use crate::stan::nats::NatsError;
use crate::stan::proto::{
    Ack, Delivered, START_AT_TIME_DELTA, Subscribe, Subscribed, UNKNOWN_CLIENT, Unsubscribe,
};
use gateway_base::sync::lock_unpoisoned;

/// Timeout for writing a claim and reading it back, after which the message is released. After a start the log of an
/// hour is read first.
const CLAIM_TIMEOUT: Duration = Duration::from_secs(60);
/// Time after which a claim that has not been read back is written again.
const CLAIM_RETRY_INTERVAL: Duration = Duration::from_secs(3);
/// Maximum number of records in one log message.
const MAX_RECORDS_PER_MESSAGE: usize = 1024;
/// Maximum number of step ends that wait to be written; the oldest are dropped first.
const MAX_PENDING_ENDS: usize = 16 * 1024;
/// Delay before a failed write is retried.
const WRITE_RETRY_INTERVAL: Duration = Duration::from_millis(200);
/// Delay before a rejected subscription is retried.
const SUBSCRIBE_RETRY_INTERVAL: Duration = Duration::from_secs(5);
/// Maximum number of unacknowledged log messages.
const MAX_UNACKED_MESSAGES: i32 = 1024;
const SUBSCRIBE_TIMEOUT: Duration = Duration::from_secs(5);
/// Time to write the last step ends when the queue stops.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);
const FLUSH_POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The claims of this process, and the log as far as it has been read.
#[derive(Default)]
pub(super) struct Deduplicator {
    /// A leaf.
    state: Mutex<State>,
    /// Notified when there are records to write.
    unwritten: Notify,
}

#[derive(Default)]
struct State {
    log: ExecutionLog,
    /// Tasks that wait until their claims have been read back.
    waiters: HashMap<Step, Vec<oneshot::Sender<()>>>,
    pending_claims: Vec<Record>,
    pending_ends: Vec<Record>,
    /// Number of records that are being written.
    records_in_flight: usize,
    /// The server has no channel for the log.
    disabled: bool,
}

impl State {
    /// Wakes the tasks that wait for `step`, which then check the log.
    fn wake(&mut self, step: Step) {
        for waiter in self.waiters.remove(&step).unwrap_or_default() {
            // The task may have been dropped.
            let _ = waiter.send(());
        }
    }

    fn disable(&mut self) {
        self.disabled = true;
        self.pending_claims.clear();
        self.pending_ends.clear();
        // Dropping the senders wakes the tasks, which check `disabled`.
        self.waiters.clear();
    }
}

impl Deduplicator {
    fn state(&self) -> MutexGuard<'_, State> {
        lock_unpoisoned(&self.state)
    }

    /// Records the end of a step. If the acknowledgement of its message is lost, the message is not executed again.
    pub(super) fn mark_finished(&self, step: Step) {
        let mut state = self.state();
        if !state.disabled {
            let (record, now) = (Record { step, owner: Owner::FINISHED }, now());
            state.log.apply(record, now, now);
            state.pending_ends.push(record);
            let surplus = state.pending_ends.len().saturating_sub(MAX_PENDING_ENDS);
            state.pending_ends.drain(..surplus);
            drop(state);
            self.unwritten.notify_one();
        }
    }

    /// Waits until all records are written, for at most a second.
    pub(super) async fn flush(&self) {
        let written = async {
            while {
                let state = self.state();
                !state.pending_ends.is_empty() || state.records_in_flight > 0
            } {
                tokio::time::sleep(FLUSH_POLL_INTERVAL).await;
            }
        };
        let _ = tokio::time::timeout(FLUSH_TIMEOUT, written).await;
    }
}

/// Returns the next step of `call`.
pub(super) fn next_step(shared: &Shared, call: &QueuedCall, progress: &Progress) -> Step {
    Step::new(call, progress.attempts, progress.moves, &shared.options.group)
}

/// Claims `step` for the message `key`. Returns whether it may execute the step; if not, it is a duplicate.
///
/// # Errors
/// When the claim could not be confirmed in time. The message is released and redelivered.
pub(super) async fn claim(shared: &Shared, key: MessageKey, step: Step) -> Result<bool, NatsError> {
    let (dedup, owner) = (&shared.dedup, Owner::from_key(key));
    let claimed = async {
        let mut written = false;
        loop {
            let read = {
                let mut state = dedup.state();
                if state.disabled {
                    return true;
                }
                state.log.expire(now());
                match state.log.claim_state(step, owner) {
                    ClaimState::ByThis => return true,
                    ClaimState::ByAnother => return false,
                    ClaimState::Unclaimed => {}
                }
                if !written {
                    state.pending_claims.push(Record { step, owner });
                }
                let (wake, read) = oneshot::channel();
                state.waiters.entry(step).or_default().push(wake);
                read
            };
            dedup.unwritten.notify_one();
            // A lost log message is noticed when the next one arrives.
            written = tokio::time::timeout(CLAIM_RETRY_INTERVAL, read).await.is_ok();
        }
    };
    let claimed = tokio::select! {
        // The log writer has stopped.
        () = shared.tasks.stopping.cancelled() => None,
        claimed = tokio::time::timeout(CLAIM_TIMEOUT, claimed) => claimed.ok(),
    };
    if claimed.is_none() {
        dedup.state().waiters.retain(|_, waiter| {
            waiter.retain(|waiter| !waiter.is_closed());
            !waiter.is_empty()
        });
    }
    claimed.ok_or(NatsError::Unreachable)
}

/// Writes claims and ends to the log until the queue stops. Records that arrive during a write go into the next
/// message together.
pub(super) async fn run_writer(shared: &Shared) {
    let (dedup, stopping) = (&shared.dedup, &shared.tasks.stopping);
    loop {
        tokio::select! {
            () = stopping.cancelled() => return,
            () = dedup.unwritten.notified() => {}
        }
        while let Some(records) = next_batch(dedup) {
            let message = execution_log::encode(&records).into();
            // Records that are dropped here are lost, since the worker is stopping.
            let stored = tokio::select! {
                () = stopping.cancelled() => return,
                stored = shared.worker.publish(&shared.log_channel, message) => stored,
            };
            match stored {
                Ok(()) => dedup.state().records_in_flight = 0,
                // A client that the server does not know any more registers again.
                Err(NatsError::Rejected(error)) if error != UNKNOWN_CLIENT => {
                    dedup.state().records_in_flight = 0;
                    disable_log(shared, &NatsError::Rejected(error));
                }
                Err(_) => {
                    requeue_records(dedup, records);
                    let _ = tokio::time::timeout(WRITE_RETRY_INTERVAL, stopping.cancelled()).await;
                }
            }
        }
    }
}

/// Puts back records whose write was not confirmed. If they were stored, repeating them has no effect.
fn requeue_records(dedup: &Deduplicator, records: Vec<Record>) {
    let (ends, claims) =
        records.into_iter().partition::<Vec<_>, _>(|record| record.owner == Owner::FINISHED);
    let mut state = dedup.state();
    state.records_in_flight = 0;
    state.pending_ends.splice(..0, ends);
    state.pending_claims.splice(..0, claims);
}

/// Returns the next records to write: claims first, because calls wait for them.
fn next_batch(dedup: &Deduplicator) -> Option<Vec<Record>> {
    let mut state = dedup.state();
    let claims = state.pending_claims.len().min(MAX_RECORDS_PER_MESSAGE);
    let mut records: Vec<Record> = state.pending_claims.drain(..claims).collect();
    let ends = state.pending_ends.len().min(MAX_RECORDS_PER_MESSAGE - claims);
    records.extend(state.pending_ends.drain(..ends));
    state.records_in_flight = records.len();
    Some(records).filter(|records| !records.is_empty())
}

/// Continues without the log.
fn disable_log(shared: &Shared, error: &NatsError) {
    let mut state = shared.dedup.state();
    if !state.disabled {
        let log = &shared.log_channel;
        tracing::warn!(
            channel = log, error = %error,
            "NATS Streaming rejects the channel {log}: a call that is stored twice is executed twice: {error}"
        );
    }
    state.disable();
}

/// Reads the log during `session`. Returns the error that ended it.
pub(super) async fn follow_log(shared: &Arc<Shared>, session: &Session) -> NatsError {
    loop {
        match subscribe(shared, session).await {
            Ok((deliveries, ack_subject)) => match read_log(shared, deliveries, &ack_subject).await
            {
                ReadEnd::Gap => unsubscribe(shared, session, ack_subject).await,
                ReadEnd::Failed(error) => return error,
            },
            Err(error @ NatsError::Rejected(_)) => {
                disable_log(shared, &error);
                tokio::time::sleep(SUBSCRIBE_RETRY_INTERVAL).await;
            }
            Err(error) => return error,
        }
    }
}

async fn subscribe(
    shared: &Shared,
    session: &Session,
) -> Result<(async_nats::Subscriber, String), NatsError> {
    let inbox = shared.nats.inbox();
    let deliveries = shared.nats.subscribe(inbox.clone()).await?;
    let request = Subscribe {
        client_id: shared.worker.id().to_owned(),
        channel: shared.log_channel.clone(),
        inbox,
        max_in_flight: MAX_UNACKED_MESSAGES,
        ack_wait: i32::try_from(shared.ack_wait().as_secs()).unwrap_or(i32::MAX),
        start_position: START_AT_TIME_DELTA,
        start_time_delta: i64::try_from(RETENTION * 1_000_000).unwrap_or(i64::MAX),
        ..Subscribe::default()
    };
    // The log is read from its start: if the server has lost it, its previous content must not reject calls.
    {
        let mut state = shared.dedup.state();
        state.log = ExecutionLog::default();
    }
    let subscribed: Subscribed =
        shared.nats.request(&session.server.subscribe, &request, SUBSCRIBE_TIMEOUT).await?;
    match subscribed.error.as_str() {
        "" => {
            shared.dedup.state().disabled = false;
            Ok((deliveries, subscribed.ack_inbox))
        }
        error => Err(NatsError::Rejected(error.to_owned())),
    }
}

/// Why reading the log has ended.
enum ReadEnd {
    /// A message was lost: the log is read again from its start.
    Gap,
    Failed(NatsError),
}

/// Closes a subscription that has lost a message.
async fn unsubscribe(shared: &Shared, session: &Session, ack_subject: String) {
    let request = Unsubscribe {
        client_id: shared.worker.id().to_owned(),
        channel: shared.log_channel.clone(),
        ack_inbox: ack_subject,
        durable_name: String::new(),
    };
    // If this request is lost, further deliveries are ignored.
    let subject = session.server.unsubscribe.clone();
    let _ = shared.nats.send(subject, request.encode_to_vec().into()).await;
    tokio::time::sleep(WRITE_RETRY_INTERVAL).await;
}

async fn read_log(
    shared: &Shared,
    mut deliveries: async_nats::Subscriber,
    ack_subject: &str,
) -> ReadEnd {
    let mut seen: Option<(u64, u64)> = None;
    while let Some(message) = deliveries.next().await {
        let Ok(delivered) = Delivered::decode(message.payload) else {
            return ReadEnd::Failed(NatsError::UnexpectedResponse);
        };
        let Delivered { sequence, timestamp, data, .. } = delivered;
        match seen {
            // Redelivered, because an acknowledgement was lost.
            Some((first, last)) if (first..=last).contains(&sequence) => {}
            // The order decides which claim wins, and the missing message may contain the first one.
            Some((_, last)) if sequence != last + 1 => return ReadEnd::Gap,
            _ => {
                seen = Some((seen.map_or(sequence, |(first, _)| first), sequence));
                let at = UnixMillis::try_from(timestamp / 1_000_000).unwrap_or_default();
                let (mut state, now) = (shared.dedup.state(), now());
                state.log.expire(now);
                for record in execution_log::decode(&data) {
                    state.log.apply(record, at, now);
                    state.wake(record.step);
                }
            }
        }
        let ack = Ack { channel: shared.log_channel.clone(), sequence };
        // If the acknowledgement is lost, the message is redelivered.
        let _ = shared.nats.send(ack_subject.to_owned(), ack.encode_to_vec().into()).await;
    }
    ReadEnd::Failed(NatsError::Unreachable)
}
