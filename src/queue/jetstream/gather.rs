//! How calls that come at the same time go to the server: while some of a function are on their way, those that come
//! wait for each other, and go together next. A call that comes alone goes alone, and at once.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::{FutureExt as _, join_all};
use futures_util::stream::FuturesUnordered;
use tokio::sync::{Mutex as AsyncMutex, mpsc, oneshot};

use crate::call_id::X_CALL_ID;
use crate::function::Function;
use crate::queue::call::Call;
use crate::queue::desk::{Desk, Outbox, Reply};
use crate::queue::jetstream::bundle::{self, LARGEST, LONGEST, ROOM, TOGETHER};
use crate::queue::jetstream::fill::Taken;
use crate::queue::jetstream::ids::Key;
use crate::queue::jetstream::message::together_headers;
use crate::queue::jetstream::subject::CALLS;
use crate::queue::jetstream::{PUBLISH, Shared, within};
use crate::queue::{Error, Published, now};

/// So many calls wait here at most before those who bring more wait, too.
const WAITING: usize = 1024;
/// A message has a price of its own: where so many calls went together, the next ones wait so long for the others.
const MANY: usize = 8;
const GATHER: Duration = Duration::from_micros(500);
/// So many keys are tried: one that is taken is as good as impossible.
const KEYS: usize = 3;

/// Where the calls of all threads wait for each other. They are sent by one task, which is on the connection's thread.
pub(super) struct Gather {
    bring: mpsc::Sender<Waiting>,
    brought: Arc<AsyncMutex<mpsc::Receiver<Waiting>>>,
}

struct Waiting {
    call: Call,
    answer: Reply<Published>,
}

/// The calls of one function.
#[derive(Default)]
struct Line {
    waiting: Vec<Waiting>,
    /// Some are on their way.
    flies: bool,
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
        shared.tasks.keep_up("publishing", move || run(Arc::clone(&all)));
    }

    /// Has a call sent, for one who hears of it at `desk`.
    pub(super) async fn publish(&self, call: Call, desk: Desk) -> Result<Published, Error> {
        let (answer, answered) = oneshot::channel();
        let waiting = Waiting { call, answer: Reply::new(answer, Some(desk)) };
        self.bring.send(waiting).await.map_err(|_| Error::Away)?;
        // It is dropped when the queue is stopped.
        answered.await.unwrap_or(Err(Error::Away))
    }
}

/// Whether a call may be stored with others: one that is looked for by a name that its caller has chosen may not, nor one
/// that is not made at once.
fn may_join(call: &Call, max_payload: usize) -> bool {
    let options = &call.options;
    !options.chosen_id
        && options.idempotency_key.is_none()
        && options.not_before.is_none()
        && call.body.len() <= LONGEST
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
                            line.flies = false;
                        }
                        touched.push(function);
                    }
                    Event::Waited(function) => {
                        if let Some(line) = lines.get_mut(&function) {
                            line.timed = false;
                            if !line.flies {
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
            let Some(line) = lines.get_mut(&function).filter(|line| !line.flies) else { continue };
            if line.waits() {
                if !std::mem::replace(&mut line.timed, true) {
                    let waited = tokio::time::sleep(GATHER);
                    flying.push(waited.map(|()| Event::Waited(function)).boxed());
                }
                continue;
            }
            let next = line.next();
            if next.is_empty() {
                if !line.timed {
                    lines.remove(&function);
                }
                continue;
            }
            line.usual = next.len();
            line.flies = true;
            let sent = send(&shared, function.clone(), next);
            flying.push(sent.map(|()| Event::Landed(function)).boxed());
        }
    }
}

async fn send_alone(shared: &Shared, Waiting { call, answer }: Waiting) {
    answer.send(shared.publish_in_time(&call).await);
}

impl Line {
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
            let headers = waiting.call.headers.iter();
            let headers: usize = headers.map(|(n, v)| n.as_str().len() + v.len() + 8).sum();
            size += waiting.call.body.len() + headers;
            size <= LARGEST
        };
        let count = self.waiting.iter().take(TOGETHER).take_while(fits).count().max(1);
        self.waiting.drain(..count.min(self.waiting.len())).collect()
    }
}

/// Sends calls of `function`, and says what became of them.
async fn send(shared: &Shared, function: Function, waiting: Vec<Waiting>) {
    let (calls, answers): (Vec<_>, Vec<_>) =
        waiting.into_iter().map(|waiting| (waiting.call, waiting.answer)).unzip();
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
    let mut outbox = Outbox::default();
    answers.into_iter().zip(published).for_each(|(answer, it)| outbox.put(answer, it));
    outbox.send();
}

fn first(id: String) -> Result<Published, Error> {
    Ok(Published { id, repeated: false })
}

impl Shared {
    /// Room for so many calls, once the server is there.
    async fn room(&self, calls: usize) -> Result<Taken<'_>, Error> {
        self.ready().await?.make_room(calls).await
    }

    /// Takes several calls of `function` in, under new ids.
    async fn publish_together(
        &self,
        function: &Function,
        mut calls: Vec<Call>,
    ) -> Result<Vec<String>, Error> {
        // First the consumer: without one, nobody would look for the calls.
        self.consumer(function).await?;
        for tries in 1.. {
            let key = Key::fresh(calls.len(), now());
            calls = calls.into_iter().map(|call| under(call, key.id(function))).collect();
            let subject = self.names.together(CALLS, function, key);
            let stored =
                self.server.put(subject, together_headers(), bundle::encode(&calls), Some(0));
            match stored.await {
                Ok(_) => break,
                Err(fault) if fault.is_conflict() && tries < KEYS => {}
                Err(fault) => return Err(fault.into()),
            }
        }
        Ok(calls.into_iter().map(|call| call.id).collect())
    }
}

/// The call under another id, which its function is told, too.
fn under(mut call: Call, id: String) -> Call {
    if let Some(told) = call.headers.get_mut(&X_CALL_ID)
        && let Ok(id) = http::HeaderValue::from_str(&id)
    {
        *told = id;
    }
    call.renamed(id)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::queue::call::Options;

    fn waiting(body: usize) -> (Waiting, oneshot::Receiver<Result<Published, Error>>) {
        let (answer, answered) = oneshot::channel();
        let call = Call {
            id: "first".to_owned(),
            function: Function { name: "echo".to_owned(), namespace: "fn".to_owned() },
            target: String::new(),
            headers: http::HeaderMap::from_iter([(
                X_CALL_ID,
                http::HeaderValue::from_static("first"),
            )]),
            body: Bytes::from(vec![0; body]),
            options: Options::default(),
        };
        (Waiting { call, answer: Reply::new(answer, None) }, answered)
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
        let (large, answers): (Vec<_>, Vec<_>) = (0..3).map(|_| waiting(LARGEST / 2 - 40)).unzip();
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
