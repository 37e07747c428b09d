//! How calls come from the server: one consumer for each function, asked only while somebody waits for a call.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use async_nats::jetstream::consumer::pull::Batch;
use async_nats::jetstream::consumer::{AckPolicy, PullConsumer, pull};
use async_nats::jetstream::stream::ConsumerErrorKind;
use async_nats::jetstream::{AckKind, Message as Delivered};
use bytes::Bytes;
use futures_util::StreamExt;

use crate::function::Function;
use crate::queue::call::Call;
use crate::queue::jetstream::Shared;
use crate::queue::jetstream::lease::Lease;
use crate::queue::jetstream::lines::Wanted;
use crate::queue::jetstream::message::Message;
use crate::queue::jetstream::server::{Fault, Server};
use crate::queue::jetstream::subject::{self, CALLS, Names};
use crate::queue::now;
use crate::queue::{Delivery, Error};

/// Nobody waits longer than this for the next call without looking again.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// How long the server may keep one who asks waiting, and how long a call waits here for one who takes it.
const WAIT: Duration = Duration::from_secs(5);
const HOLD: Duration = Duration::from_secs(1);
/// What the server sends at once it sends within this time.
const AT_ONCE: Duration = Duration::from_secs(1);
/// After a failure.
const PAUSE: Duration = Duration::from_millis(200);
/// When a call is looked at again that nobody here can read.
const UNREADABLE: Duration = Duration::from_secs(60);
/// No call is put off for longer at once.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// A call that has come.
pub(super) struct Arrived {
    pub(super) call: Call,
    pub(super) message: Message,
    pub(super) sequence: u64,
    /// It has come before, to somebody.
    pub(super) again: bool,
    /// Where to say what becomes of it.
    pub(super) reply: String,
    /// For so long it is ours without a word.
    pub(super) lease: Duration,
}

impl Arrived {
    /// Lets it be taken again, after `delay`.
    pub(super) async fn not_now(&self, server: &Server, delay: Option<Duration>) {
        tell(server, &self.reply, AckKind::Nak(delay)).await;
    }

    pub(super) async fn still_busy(&self, server: &Server) {
        tell(server, &self.reply, AckKind::Progress).await;
    }
}

/// Says what becomes of a delivery. If that is lost, the server finds out by the time it takes.
async fn tell(server: &Server, reply: &str, kind: AckKind) {
    let said = server.client.publish(reply.to_owned(), Bytes::from(kind));
    let _ = tokio::time::timeout(AT_ONCE, said).await;
}

/// The consumer of `function`, made if it is not there.
pub(super) async fn consumer(
    server: &Server,
    names: &Names,
    function: &Function,
    lease: Duration,
) -> Result<PullConsumer, Fault> {
    let name = subject::consumer(function);
    let config = pull::Config {
        durable_name: Some(name.clone()),
        filter_subject: names.of(CALLS, Some(function)),
        ack_policy: AckPolicy::Explicit,
        ack_wait: lease,
        max_deliver: -1,
        // Delayed calls count among these, and must not hold up the others.
        max_ack_pending: -1,
        ..pull::Config::default()
    };
    let stream = server.context.get_stream_no_info(&names.calls).await.map_err(|_| Fault::Away)?;
    stream.get_or_create_consumer(&name, config).await.map_err(|error| match error.kind() {
        ConsumerErrorKind::JetStream(error) if error.code() != 503 => {
            Fault::Refused(error.error_code().0, error.to_string())
        }
        _ => Fault::Away,
    })
}

/// The next call whose time has come.
pub(super) async fn take(shared: &Arc<Shared>, places: usize) -> Result<Delivery, Error> {
    loop {
        // Made before the look, so that nothing is missed between the two.
        let woken = shared.ready.notified();
        let picked = shared.lines().pick(places);
        if let Some((line, arrived)) = picked {
            // More may be there than one was told of.
            shared.ready.notify_one();
            let lease = Lease::new(shared, line, arrived);
            match lease.begin().await {
                Ok(Some(delivery)) => return Ok(delivery),
                Ok(None) => {}
                Err(error) => {
                    tracing::debug!(%error, "A call that came cannot be begun");
                    tokio::time::sleep(PAUSE).await;
                }
            }
            continue;
        }
        look_around(shared);
        let wanted = shared.lines().ask(places);
        for wanted in wanted {
            shared.tasks.spawn(ask(Arc::clone(shared), wanted));
        }
        // Running out is no reason to fail: it is the time to look again.
        let _ = tokio::time::timeout(LOOK_AGAIN, woken).await;
    }
}

/// Looks for functions whose calls others have published.
fn look_around(shared: &Arc<Shared>) {
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
    let consumers = server.consumers(&names.calls).await?;
    let mut found: Vec<_> = consumers.iter().filter_map(|name| subject::consumed(name)).collect();
    if connection != last {
        let calls = server.subjects(&names.calls, &names.of(CALLS, None)).await?;
        found.extend(calls.iter().filter_map(|call| Some(subject::named(call)?.function)));
    }
    Ok((found, connection))
}

/// Asks once for calls of a function, and holds what comes until it is handed out, or has waited too long for that.
async fn ask(shared: Arc<Shared>, wanted: Wanted) {
    let came = fetch(&shared, &wanted).await;
    if let Err(error) = &came {
        tracing::debug!(%error, function.name = %wanted.function, "No calls can be fetched");
        shared.consumers().known.remove(&wanted.function);
        tokio::time::sleep(PAUSE).await;
    }
    shared.lines().asked(wanted.line);
    shared.ready.notify_one();
    let hold = HOLD.min(shared.options.lease / 3);
    loop {
        tokio::time::sleep(hold / 2).await;
        let before = Instant::now().checked_sub(hold).unwrap_or_else(Instant::now);
        let (old, more) = shared.lines().withdraw(wanted.line, before);
        for arrived in old {
            arrived.not_now(&shared.server, None).await;
        }
        if !more {
            return;
        }
    }
}

/// What is there at once; if nothing is, the next call that comes.
async fn fetch(shared: &Arc<Shared>, wanted: &Wanted) -> Result<(), Fault> {
    let consumer = shared.ready().await?.consumer(&wanted.function).await?;
    let at_once = consumer.fetch().max_messages(wanted.most).messages();
    let at_once = asked(at_once).await?;
    if receive(shared, wanted, &consumer, at_once, AT_ONCE).await? == 0 {
        let wait = WAIT.min(shared.options.lease / 3);
        let later = asked(consumer.batch().max_messages(1).expires(wait).messages()).await?;
        receive(shared, wanted, &consumer, later, wait + AT_ONCE).await?;
    }
    Ok(())
}

/// What a request that is sent in time will bring.
async fn asked<E>(batch: impl Future<Output = Result<Batch, E>>) -> Result<Batch, Fault> {
    let sent = tokio::time::timeout(AT_ONCE, batch).await;
    sent.ok().and_then(Result::ok).ok_or(Fault::Away)
}

/// How many messages have come. The first of them may take `patience`.
async fn receive(
    shared: &Arc<Shared>,
    wanted: &Wanted,
    consumer: &PullConsumer,
    mut batch: Batch,
    patience: Duration,
) -> Result<usize, Fault> {
    let mut came = 0;
    loop {
        let next = tokio::time::timeout(patience, batch.next()).await.map_err(|_| Fault::Away)?;
        match next {
            None => return Ok(came),
            Some(Err(error)) => {
                tracing::debug!(%error, "The server ends a request for calls");
                return Err(Fault::Away);
            }
            Some(Ok(delivered)) => {
                came += 1;
                let lease = consumer.cached_info().config.ack_wait.min(shared.options.lease);
                arrive(shared, wanted, delivered, lease).await;
            }
        }
    }
}

/// Keeps a call that has come, unless its time has not.
async fn arrive(shared: &Arc<Shared>, wanted: &Wanted, delivered: Delivered, lease: Duration) {
    let Some(reply) = delivered.reply.as_ref().map(ToString::to_string) else { return };
    let Ok((sequence, times)) = delivered.info().map(|i| (i.stream_sequence, i.delivered)) else {
        return;
    };
    let delivered = delivered.message;
    let message = Message::stored(delivered.headers.unwrap_or_default(), delivered.payload);
    let call = match message.call() {
        Ok(call) => call,
        Err(error) => {
            // One of a version to come stays for those who know it.
            tracing::error!(sequence, %error, "A queued call cannot be read");
            tell(&shared.server, &reply, AckKind::Nak(Some(UNREADABLE))).await;
            return;
        }
    };
    let early = message.due(&call).saturating_sub(now());
    let arrived = Arrived { call, message, sequence, again: times > 1, reply, lease };
    if early > 0 {
        let delay = Duration::from_millis(early).min(LONGEST);
        arrived.not_now(&shared.server, Some(delay)).await;
        return;
    }
    shared.lines().arrived(wanted.line, arrived);
    shared.ready.notify_one();
}
