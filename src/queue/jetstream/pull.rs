//! How calls come from the server: one consumer for each function, asked only while somebody waits for a call.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_nats::jetstream::{AckKind, Message as Delivered};
use async_nats::{StatusCode, Subscriber};
use bytes::Bytes;
use futures_util::StreamExt;
use serde_json::json;
use tokio::sync::Mutex as AsyncMutex;

use crate::function::Function;
use crate::queue::call::{DecodeError, QueuedCall};
use crate::queue::jetstream::Shared;
use crate::queue::jetstream::bundle::{Place, Slot};
use crate::queue::jetstream::ids::Key;
use crate::queue::jetstream::lines::Wanted;
use crate::queue::jetstream::message::{self, Message};
use crate::queue::jetstream::roll::Roll;
use crate::queue::jetstream::server::{Fault, Server};
use crate::queue::jetstream::subject::{self, CALLS};
use crate::queue::jetstream::unpack::{Bundle, Come, Which};
use crate::queue::now;

/// Nobody waits longer than this for the next call without looking again.
pub(super) const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// What the server is told is sent within this time.
const AT_ONCE: Duration = Duration::from_secs(1);
/// So many calls at most are looked at for functions without a consumer.
pub(super) const FEW: u64 = 10_000;
/// After a failure.
pub(super) const PAUSE: Duration = Duration::from_millis(200);
/// When a call is looked at again that nobody here can read.
pub(super) const UNREADABLE: Duration = Duration::from_secs(60);
/// No call is put off for longer at once.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// A call that has come.
pub(super) struct Arrived {
    pub(super) call: QueuedCall,
    /// Its own message; where it has none, the one that it would have.
    pub(super) message: Message,
    pub(super) sequence: u64,
    /// How often its message has come, to whomever.
    pub(super) deliveries: u32,
    pub(super) origin: Origin,
    /// The name of the consumer that it came from.
    pub(super) consumer: Arc<str>,
    /// For so long it is ours without a word.
    pub(super) lease: Duration,
}

/// What a call has come in.
pub(super) enum Origin {
    /// A message of its own.
    Alone(Address),
    /// One with others.
    Among(Arc<Bundle>, Slot),
}

/// Where to say what becomes of a message: as of the last time it came.
pub(super) struct Address(Mutex<String>);

impl Address {
    pub(super) fn new(reply: String) -> Self {
        Self(Mutex::new(reply))
    }

    pub(super) fn reply(&self) -> String {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Arrived {
    /// It has come before, to somebody.
    pub(super) fn came_before(&self) -> bool {
        self.deliveries > 1
    }

    pub(super) fn place(&self) -> Place {
        match &self.origin {
            Origin::Alone(_) => Place::alone(self.sequence),
            Origin::Among(_, slot) => Place::among(self.sequence, *slot),
        }
    }

    /// It is over.
    pub(super) async fn over(&self, shared: &Shared) {
        match &self.origin {
            Origin::Alone(address) => tell(&shared.server, &address.reply(), AckKind::Ack).await,
            Origin::Among(bundle, _) => bundle.done(shared).await,
        }
    }

    /// Lets it be taken again, after `delay`.
    pub(super) async fn not_now(&self, shared: &Arc<Shared>, delay: Option<Duration>) {
        match &self.origin {
            Origin::Alone(address) => {
                tell(&shared.server, &address.reply(), AckKind::Nak(delay)).await;
            }
            Origin::Among(bundle, slot) => {
                // Nobody says meanwhile that its message is ours.
                tokio::time::sleep(delay.unwrap_or_default().min(self.lease / 3)).await;
                bundle.let_go(shared, &self.call, *slot).await;
            }
        }
    }

    pub(super) async fn still_busy(&self, shared: &Shared) {
        match &self.origin {
            Origin::Alone(address) => {
                tell(&shared.server, &address.reply(), AckKind::Progress).await;
            }
            Origin::Among(bundle, _) => bundle.still_busy(shared).await,
        }
    }

    /// It has come once more, with another place where to say what becomes of it.
    pub(super) fn came_again(&self, reply: String) {
        let address = match &self.origin {
            Origin::Alone(address) => address,
            Origin::Among(bundle, _) => &bundle.address,
        };
        *address.0.lock().unwrap_or_else(PoisonError::into_inner) = reply;
    }
}

/// Says what becomes of a delivery. If that is lost, the server finds out by the time it takes.
pub(super) async fn tell(server: &Server, reply: &str, kind: AckKind) {
    let said = server.client.publish(reply.to_owned(), Bytes::from(kind));
    let _ = tokio::time::timeout(AT_ONCE, said).await;
}

/// Looks for functions whose calls others have published.
pub(super) fn look_around(shared: &Arc<Shared>) {
    let mut looked = shared.looked.lock().unwrap_or_else(PoisonError::into_inner);
    let connection = match *looked {
        Some((at, _)) if at.elapsed() < LOOK_AGAIN => return,
        Some((_, connection)) => connection,
        None => 0,
    };
    *looked = Some((Instant::now(), connection));
    drop(looked);
    let all = Arc::clone(shared);
    shared.tasks.spawn(async move {
        // From the first look on others tell which functions are new: their calls wait for no second look. Without
        // the server there is nothing to hear, and the next look tries again.
        let _ = all.inbox.get_or_try_init(|| listen(&all)).await;
        let Ok((found, connection)) = functions(&all, connection).await else { return };
        *all.looked.lock().unwrap_or_else(PoisonError::into_inner) =
            Some((Instant::now(), connection));
        let new = found.iter().filter(|function| all.lines().add(function)).count();
        if new > 0 {
            all.ready.notify_one();
        }
    });
}

/// The functions with a consumer, and the connection they were found over. Where that is not `last`, those too that
/// have calls but no consumer, should it have been removed.
async fn functions(shared: &Shared, last: u64) -> Result<(Vec<Function>, u64), Fault> {
    let connection = shared.server.connection().await?;
    let Shared { server, names, .. } = shared.ready().await?;
    let (mut found, _) = shared.functions(Duration::ZERO).await?;
    let all = names.of(CALLS, None);
    if connection != last {
        // What was asked for over another connection does not come any more.
        shared.lines().forget_asks();
        if shared.inbox.initialized() {
            shared.read_taken(connection).await?;
        }
        if server.messages(&names.calls).await? <= FEW {
            let calls = server.subjects(&names.calls, &all, usize::MAX).await?;
            found.extend(calls.iter().filter_map(|call| Some(subject::named(call)?.function)));
        }
    }
    // Calls that nobody is given are the oldest in the end.
    let oldest = server.next(&names.calls, &all, 1).await?;
    found.extend(oldest.and_then(|call| Some(subject::named(&call.subject)?.function)));
    Ok((found, connection))
}

/// Asks for calls of a function.
pub(super) async fn ask(shared: Arc<Shared>, wanted: Wanted) {
    if let Err(error) = send(&shared, &wanted).await {
        tracing::debug!(%error, function = %wanted.function, "No calls can be asked for");
        fails(&shared, wanted.line, wanted.number, &wanted.function).await;
    }
}

async fn send(shared: &Arc<Shared>, wanted: &Wanted) -> Result<(), Fault> {
    let Shared { server, names, .. } = shared.ready().await?;
    shared.lease(&wanted.function).await?;
    shared.mend(&wanted.function).await?;
    let inbox = shared.inbox.get_or_try_init(|| listen(shared)).await?;
    let consumer = subject::consumer(&wanted.function);
    let ask = format!("$JS.API.CONSUMER.MSG.NEXT.{}.{consumer}", names.calls);
    let reply = format!("{inbox}.{}.{}", wanted.line, wanted.number);
    let what = json!({ "batch": wanted.most, "expires": wanted.wait().as_nanos() as u64 });
    let sent = server.client.publish_with_reply(ask, reply, what.to_string().into());
    let sent = tokio::time::timeout(AT_ONCE, sent).await;
    sent.ok().and_then(Result::ok).ok_or(Fault::Away)
}

/// An ask that has failed can be repeated in a moment, and first the consumer is looked for.
async fn fails(shared: &Shared, line: usize, number: u64, function: &Function) {
    shared.consumers().doubt(function);
    tokio::time::sleep(PAUSE).await;
    shared.lines().answered(line, number);
    shared.ready.notify_one();
}

/// Has all that was asked for come to one place; where that is.
async fn listen(shared: &Arc<Shared>) -> Result<String, Fault> {
    let inbox = shared.server.client.new_inbox();
    let subscribe = async |subject: String| {
        let made = tokio::time::timeout(AT_ONCE, shared.server.client.subscribe(subject)).await;
        made.ok().and_then(Result::ok).ok_or(Fault::Away)
    };
    let calls = subscribe(format!("{inbox}.>")).await?;
    let news = subscribe(shared.names.news()).await?;
    let taken = subscribe(shared.names.taken()).await?;
    let [calls, news, taken] = [calls, news, taken].map(AsyncMutex::new).map(Arc::new);
    let all = Arc::clone(shared);
    shared.tasks.supervise("taken", move || hear_taken(Arc::clone(&all), Arc::clone(&taken)));
    let all = Arc::clone(shared);
    shared.tasks.supervise("calls", move || hear_calls(Arc::clone(&all), Arc::clone(&calls)));
    let all = Arc::clone(shared);
    shared.tasks.supervise("news", move || hear_news(Arc::clone(&all), Arc::clone(&news)));
    Ok(inbox)
}

/// What comes, for one who hears it at a time.
type Heard = Arc<AsyncMutex<Subscriber>>;

async fn hear_calls(shared: Arc<Shared>, calls: Heard) {
    let mut calls = calls.lock().await;
    while let Some(message) = calls.next().await {
        match message.status {
            None => arrive(&shared, message).await,
            Some(StatusCode::IDLE_HEARTBEAT) => {}
            Some(status) => {
                let mut tokens = message.subject.rsplit('.');
                let number = tokens.next().and_then(|it| it.parse().ok());
                let line = tokens.next().and_then(|it| it.parse().ok());
                let (Some(number), Some(line)) = (number, line) else { continue };
                refused(&shared, line, number, status, message.description.as_deref());
            }
        }
    }
}

/// No more comes of an ask, mostly for its time is over.
fn refused(shared: &Arc<Shared>, line: usize, number: u64, status: StatusCode, why: Option<&str>) {
    if [StatusCode::TIMEOUT, StatusCode::NOT_FOUND].contains(&status) {
        shared.lines().answered(line, number);
        shared.ready.notify_one();
        return;
    }
    let Some(function) = shared.lines().function(line) else { return };
    tracing::debug!(%status, why, function = %function, "The server ends a request for calls");
    let all = Arc::clone(shared);
    shared.tasks.spawn(async move {
        // Without calls it may have been tidied away. Otherwise it is found when somebody looks around.
        if matches!(all.has_calls(&function).await, Ok(false)) {
            all.consumers().doubt(&function);
            return all.lines().retire(line);
        }
        fails(&all, line, number, &function).await;
    });
}

/// Others say which functions are new.
async fn hear_news(shared: Arc<Shared>, news: Heard) {
    let mut news = news.lock().await;
    while let Some(message) = news.next().await {
        let name = std::str::from_utf8(&message.payload).ok();
        let function = name.and_then(subject::consumed);
        if let Some(function) = function {
            shared.lines().made(&function);
            shared.ready.notify_one();
        }
    }
}

/// Others say which messages they take calls out of.
async fn hear_taken(shared: Arc<Shared>, taken: Heard) {
    let mut taken = taken.lock().await;
    while let Some(message) = taken.next().await {
        let key = std::str::from_utf8(&message.payload).ok().and_then(Key::of_token);
        key.into_iter().for_each(|key| shared.taken().hears(key));
    }
}

/// Keeps a call that has come, unless its time has not.
async fn arrive(shared: &Arc<Shared>, come: async_nats::Message) {
    let delivered = Delivered { message: come, context: shared.server.context.clone() };
    let Some(reply) = delivered.reply.as_ref().map(ToString::to_string) else { return };
    let Ok(info) = delivered.info() else { return };
    let sequence = info.stream_sequence;
    let deliveries = u32::try_from(info.delivered).unwrap_or(1);
    let consumer: Arc<str> = info.consumer.into();
    let Some(function) = subject::consumed(&consumer) else { return };
    let Some(line) = shared.lines().of(&function) else { return };
    let key = subject::key(&delivered.subject);
    shared.lines().came(line, subject::calls(&delivered.subject), Instant::now());
    // The server has not heard of us for too long. The call is ours all the same, and is not begun once more.
    if let Some(held) = shared.roll.held(sequence) {
        held.came_again(reply);
        held.still_busy(shared).await;
        return;
    }
    let lease = shared.consumers().lease(&function);
    let lease = lease.unwrap_or(shared.options.lease);
    let delivered = delivered.message;
    if let Some(key) = key {
        if let Err(error) = message::together_version(delivered.headers.as_ref()) {
            return unreadable(shared, sequence, &delivered.subject, &reply, &error).await;
        }
        let which = Which { function, key, sequence };
        let payload = delivered.payload;
        let come = Come { which, line, deliveries, consumer, lease, payload };
        let (all, tasks) = (Arc::clone(shared), Arc::clone(shared));
        tasks.tasks.spawn(async move { come.unpack(&all, Address::new(reply)).await });
        return;
    }
    let message = Message::stored(delivered.headers.unwrap_or_default(), delivered.payload);
    let call = match message.call() {
        Ok(call) => call,
        Err(error) => {
            return unreadable(shared, sequence, &delivered.subject, &reply, &error).await;
        }
    };
    let early = message.due(&call).saturating_sub(now());
    let origin = Origin::Alone(Address::new(reply));
    let arrived = Arrived { call, message, sequence, deliveries, origin, consumer, lease };
    if early > 0 {
        let delay = Duration::from_millis(early).min(LONGEST);
        arrived.not_now(shared, Some(delay)).await;
        shared.ready.notify_one();
        return;
    }
    shared.lines().arrived(line, arrived, Instant::now());
    shared.ready.notify_one();
    Roll::keep(shared);
}

/// One of a version to come stays for those who know it.
pub(super) async fn unreadable(
    shared: &Shared,
    sequence: u64,
    subject: &str,
    reply: &str,
    error: &DecodeError,
) {
    // One with several has none that is known.
    let alone = subject::key(subject).is_none();
    let call_id = subject::named(subject).filter(|_| alone).map(|named| named.id);
    tracing::error!(sequence, call_id, %error, "A queued call cannot be read");
    tell(&shared.server, reply, AckKind::Nak(Some(UNREADABLE))).await;
}
