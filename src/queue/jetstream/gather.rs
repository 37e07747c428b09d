//! How calls that come at the same time go to the server: while some of a function are on their way, those that come
//! wait for each other, and go together next. A call that comes alone goes alone, and at once.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::{FutureExt as _, join_all};
use futures_util::stream::FuturesUnordered;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Mutex as AsyncMutex, mpsc, oneshot};

use crate::call_id::X_CALL_ID;
use crate::function::Function;
use crate::queue::call::QueuedCall;
use crate::queue::jetstream::bundle::{self, LARGEST, LONGEST, ROOM, TOGETHER};
use crate::queue::jetstream::fill::Admitted;
use crate::queue::jetstream::message::together_headers;
use crate::queue::jetstream::subject::CALLS;
use crate::queue::jetstream::{PUBLISH, Shared, within};
use crate::queue::reply_batch::{Reply, ReplyBatch, ReplyChannel};
use crate::queue::{Error, MemoryPermit, Published, now};

/// So many calls are brought at a time.
const WAITING: usize = 1024;
/// A message has a price of its own: where so many calls went together, the next ones wait so long for the others.
const MANY: usize = 8;
const GATHER: Duration = Duration::from_micros(500);
/// So many keys are tried, should somebody else make the same ones.
const TRIES: usize = 5;
/// So many messages of a function are on their way at a time, where far more calls come than one has room for.
const FLIGHTS: usize = 8;
/// A call of which more is stored beside its body goes alone: it must fit into the headers of a message of its own, should
/// it need one.
const BESIDE: usize = 16 << 10;
/// What is stored of a call beside what its caller says, about.
const FIXED: usize = 256;

/// Where the calls of all threads wait for each other. They are sent by one task, which is on the connection's thread.
pub(super) struct Gather {
    bring: mpsc::Sender<Waiting>,
    brought: Arc<AsyncMutex<mpsc::Receiver<Waiting>>>,
}

struct Waiting {
    call: QueuedCall,
    answer: Reply<Published>,
    /// Held for as long as the call is here.
    room: Option<MemoryPermit>,
}

/// The calls of one function.
#[derive(Default)]
struct Line {
    waiting: Vec<Waiting>,
    /// So many messages are on their way.
    flights: usize,
    /// How many went together the last time: who was answered then soon asks again.
    usual: usize,
    /// They have a time by which they go.
    timed: bool,
}

/// What happens to a task that sends calls.
enum Event {
    /// Those of a function are stored, or refused.
    Landed(Function),
    /// Those of a function have waited for others for long enough.
    Waited(Function),
    /// A call has gone alone.
    Alone,
}

impl Gather {
    pub(super) fn new() -> Self {
        let (bring, brought) = mpsc::channel(WAITING);
        Self { bring, brought: Arc::new(AsyncMutex::new(brought)) }
    }

    /// Sends what is brought, for as long as there is a queue.
    pub(super) fn start(shared: &Arc<Shared>) {
        let all = Arc::clone(shared);
        shared.tasks.supervise("publishing", move || run(Arc::clone(&all)));
    }

    /// Has a call sent, for one who hears of it at `reply_batch`.
    pub(super) async fn publish(
        &self,
        call: QueuedCall,
        room: Option<MemoryPermit>,
        desk: ReplyChannel,
    ) -> Result<Published, Error> {
        let (answer, answered) = oneshot::channel();
        let waiting = Waiting { call, answer: Reply::new(answer, Some(desk)), room };
        match self.bring.try_send(waiting) {
            Ok(()) => {}
            // On the heap, lest the call's size be that of every future twice.
            Err(TrySendError::Full(waiting)) => {
                Box::pin(self.bring.send(waiting)).await.map_err(|_| Error::Unreachable)?;
            }
            Err(TrySendError::Closed(_)) => return Err(Error::Unreachable),
        }
        answered.await.unwrap_or(Err(Error::Unreachable))
    }
}

/// Whether a call may be stored with others: one that is looked for by a name that its caller has chosen may not, nor one
/// that is not made at once.
fn may_join(call: &QueuedCall, max_payload: usize) -> bool {
    let options = &call.options;
    !options.chosen_id
        && options.idempotency_key.is_none()
        && options.not_before.is_none()
        && call.body.len() <= LONGEST
        && beside(call) <= BESIDE
        && max_payload >= ROOM
}

async fn run(shared: Arc<Shared>) {
    let mut brought = shared.gather.brought.lock().await;
    let mut lines: HashMap<Function, Line> = HashMap::new();
    let mut flying = FuturesUnordered::new();
    loop {
        let mut touched = Vec::new();
        tokio::select! {
            waiting = brought.recv() => {
                let Some(waiting) = waiting else { return };
                let more = std::iter::from_fn(|| brought.try_recv().ok());
                for waiting in std::iter::once(waiting).chain(more.take(WAITING)) {
                    if !may_join(&waiting.call, shared.server.client.max_payload()) {
                        flying.push(send_alone(&shared, waiting).map(|()| Event::Alone).boxed());
                        continue;
                    }
                    let function = waiting.call.function.clone();
                    let line = lines.entry(function.clone()).or_default();
                    if !touched.contains(&function) {
                        touched.push(function);
                    }
                    line.waiting.push(waiting);
                }
            }
            Some(event) = flying.next() => {
                match event {
                    Event::Landed(function) => {
                        if let Some(line) = lines.get_mut(&function) {
                            line.flights -= 1;
                        }
                        touched.push(function);
                    }
                    Event::Waited(function) => {
                        if let Some(line) = lines.get_mut(&function) {
                            line.timed = false;
                            if line.flights == 0 {
                                line.usual = 0;
                            }
                        }
                        touched.push(function);
                    }
                    Event::Alone => {}
                }
            }
        }
        for function in touched {
            let Some(line) = lines.get_mut(&function) else { continue };
            while line.may_fly() {
                if line.waits() {
                    if !std::mem::replace(&mut line.timed, true) {
                        let (waited, function) = (tokio::time::sleep(GATHER), function.clone());
                        flying.push(waited.map(|()| Event::Waited(function)).boxed());
                    }
                    break;
                }
                let next = line.next();
                if next.is_empty() {
                    break;
                }
                (line.usual, line.flights) = (next.len(), line.flights + 1);
                let landed = Event::Landed(function.clone());
                flying.push(send(&shared, function.clone(), next).map(|()| landed).boxed());
            }
            if line.waiting.is_empty() && line.flights == 0 && !line.timed {
                lines.remove(&function);
            }
        }
    }
}

async fn send_alone(shared: &Shared, waiting: Waiting) {
    // Nobody has heard that it was taken in, and nobody would.
    if !waiting.answer.is_closed() {
        waiting.answer.send(shared.publish_in_time(&waiting.call).await);
    }
}

impl Line {
    /// Whether a message may go beside those that are on their way.
    fn may_fly(&self) -> bool {
        self.flights == 0 || self.flights < FLIGHTS && self.waiting.len() >= TOGETHER
    }

    /// Whether far fewer calls have come than the last time, when there were many.
    fn waits(&self) -> bool {
        self.usual >= MANY && self.waiting.len() * 4 < self.usual * 3
    }

    /// The calls that go together next.
    fn next(&mut self) -> Vec<Waiting> {
        // Nobody has heard that these were taken in, and nobody would.
        self.waiting.retain(|waiting| !waiting.answer.is_closed());
        let mut size = 0;
        let fits = |waiting: &&Waiting| {
            size += stored(&waiting.call);
            size <= LARGEST
        };
        let count = self.waiting.iter().take(TOGETHER).take_while(fits).count().max(1);
        self.waiting.drain(..count.min(self.waiting.len())).collect()
    }
}

/// How much is stored of a call, at most.
fn stored(call: &QueuedCall) -> usize {
    call.body.len() + beside(call)
}

/// The same without its body.
fn beside(call: &QueuedCall) -> usize {
    let headers: usize = call.headers.iter().map(|(n, v)| n.as_str().len() + v.len() + 8).sum();
    let callback = call.options.callback.as_ref().map_or(0, String::len);
    // What is written as JSON may take two bytes for one.
    2 * (headers + call.target.len() + callback) + FIXED
}

/// Sends calls of `function`, and says what became of them.
async fn send(shared: &Shared, function: Function, waiting: Vec<Waiting>) {
    let (calls, answers): (Vec<_>, Vec<_>) =
        waiting.into_iter().map(|it| (it.call, (it.answer, it.room))).unzip();
    let published = match &calls[..] {
        [call] => vec![shared.publish_in_time(call).await],
        _ => match within(PUBLISH, shared.room(calls.len())).await {
            Ok(_taken) => {
                let count = calls.len();
                match within(PUBLISH, shared.publish_together(&function, calls)).await {
                    Ok(ids) => ids.into_iter().map(first).collect(),
                    Err(error) => vec![Err(error); count],
                }
            }
            // There may be some for a few of them.
            Err(Error::Full) => join_all(calls.iter().map(|it| shared.publish_in_time(it))).await,
            Err(error) => vec![Err(error); calls.len()],
        },
    };
    let mut outbox = ReplyBatch::default();
    answers.into_iter().zip(published).for_each(|((answer, _), it)| outbox.push(answer, it));
    outbox.send();
}

fn first(id: String) -> Result<Published, Error> {
    Ok(Published { id, duplicate: false })
}

impl Shared {
    /// Room for so many calls, once the server is there.
    async fn room(&self, calls: usize) -> Result<Admitted<'_>, Error> {
        self.ready().await?.make_room(calls).await
    }

    /// Takes several calls of `function` in, under new ids.
    async fn publish_together(
        &self,
        function: &Function,
        mut calls: Vec<QueuedCall>,
    ) -> Result<Vec<String>, Error> {
        // First the consumer: without one, nobody would look for the calls.
        self.consumer(function).await?;
        for tries in 1.. {
            let key = self.keys.next(calls.len(), now());
            calls = calls.into_iter().map(|call| under(call, key.id(function))).collect();
            let subject = self.names.together(CALLS, function, key);
            let stored =
                self.server.put(subject, together_headers(), bundle::encode(&calls), Some(0));
            match stored.await {
                Ok(_) => break,
                Err(fault) if fault.is_conflict() && tries < TRIES => self.keys.change(),
                Err(fault) => return Err(fault.into()),
            }
        }
        Ok(calls.into_iter().map(|call| call.id).collect())
    }
}

/// The call under another id, which its function is told, too.
fn under(mut call: QueuedCall, id: String) -> QueuedCall {
    if let Some(told) = call.headers.get_mut(&X_CALL_ID)
        && let Ok(id) = http::HeaderValue::from_str(&id)
    {
        *told = id;
    }
    call.with_new_id(id)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::queue::call::CallOptions;

    fn waiting(body: usize) -> (Waiting, oneshot::Receiver<Result<Published, Error>>) {
        let (answer, answered) = oneshot::channel();
        let call = QueuedCall {
            id: "first".to_owned(),
            function: Function { name: "echo".to_owned(), namespace: "fn".to_owned() },
            target: String::new(),
            headers: http::HeaderMap::from_iter([(
                X_CALL_ID,
                http::HeaderValue::from_static("first"),
            )]),
            body: Bytes::from(vec![0; body]),
            options: CallOptions::default(),
        };
        (Waiting { call, answer: Reply::new(answer, None), room: None }, answered)
    }

    #[test]
    fn as_many_go_together_as_fit_and_for_which_somebody_waits() {
        let mut line = Line::default();
        let (small, answers): (Vec<_>, Vec<_>) = (0..70).map(|_| waiting(10)).unzip();
        line.waiting.extend(small);
        let next: Vec<usize> = std::iter::from_fn(|| Some(line.next().len())).take(3).collect();
        assert_eq!(next, [TOGETHER, TOGETHER, 70 - 2 * TOGETHER]);
        drop(answers);
        let (gone, _) = waiting(10);
        line.waiting.push(gone);
        assert_eq!(line.next().len(), 0);
        let (large, answers): (Vec<_>, Vec<_>) = (0..3).map(|_| waiting(LARGEST / 2 - 400)).unzip();
        line.waiting.extend(large);
        let next: Vec<usize> = std::iter::from_fn(|| Some(line.next().len())).take(3).collect();
        assert_eq!(next, [2, 1, 0]);
        drop(answers);
    }

    #[test]
    fn a_call_tells_its_function_the_id_that_it_is_known_by() {
        let (Waiting { call, .. }, _) = waiting(0);
        let call = under(call, "second".to_owned());
        assert_eq!(
            (call.id.as_str(), &call.headers[X_CALL_ID]),
            ("second", &"second".parse().unwrap())
        );
    }
}
