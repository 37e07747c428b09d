//! How calls that come at the same time go to the server: while some of a function are on their way, those that come
//! wait for each other, and go together next. A call that comes alone goes alone, and at once.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{mpsc, oneshot};

use crate::call_id::X_CALL_ID;
use crate::function::Function;
use crate::queue::call::Call;
use crate::queue::jetstream::bundle::{self, LARGEST, LONGEST};
use crate::queue::jetstream::fill::Taken;
use crate::queue::jetstream::ids::{Key, TOGETHER};
use crate::queue::jetstream::message::together_headers;
use crate::queue::jetstream::server::Server;
use crate::queue::jetstream::subject::CALLS;
use crate::queue::jetstream::{PUBLISH, Shared, within};
use crate::queue::{Error, Published, now};

/// So many calls wait here at most before those who bring more wait, too.
const WAITING: usize = 1024;
/// So many keys are tried: one that is taken is as good as impossible.
const KEYS: usize = 3;

/// Where a thread's calls wait for each other.
pub(super) struct Gather(mpsc::Sender<Waiting>);

struct Waiting {
    call: Call,
    answer: oneshot::Sender<Result<Published, Error>>,
}

/// The calls of one function.
#[derive(Default)]
struct Line {
    waiting: Vec<Waiting>,
    /// Some are on their way.
    flies: bool,
}

impl Gather {
    /// On the current thread and its runtime; what is sent goes over `own` while that is there.
    #[expect(clippy::disallowed_methods, reason = "it ends when nobody can bring a call any more")]
    pub(super) fn start(shared: Arc<Shared>, own: Arc<OnceLock<Server>>) -> Self {
        let (bring, brought) = mpsc::channel(WAITING);
        tokio::spawn(run(shared, own, brought));
        Self(bring)
    }

    /// Whether a call may be stored with others: one that is looked for by a name that its caller has chosen may not,
    /// nor one that is not made at once.
    pub(super) fn takes(call: &Call) -> bool {
        let options = &call.options;
        !options.chosen_id
            && options.idempotency_key.is_none()
            && options.not_before.is_none()
            && call.body.len() <= LONGEST
    }

    pub(super) async fn publish(&self, call: Call) -> Result<Published, Error> {
        let (answer, answered) = oneshot::channel();
        // The other side goes only with the runtime.
        self.0.send(Waiting { call, answer }).await.map_err(|_| Error::Away)?;
        answered.await.unwrap_or(Err(Error::Away))
    }
}

async fn run(
    shared: Arc<Shared>,
    own: Arc<OnceLock<Server>>,
    mut brought: mpsc::Receiver<Waiting>,
) {
    let mut lines: HashMap<Function, Line> = HashMap::new();
    let mut flying = FuturesUnordered::new();
    loop {
        let mut touched = Vec::new();
        tokio::select! {
            waiting = brought.recv() => {
                let Some(waiting) = waiting else { break };
                let more = std::iter::from_fn(|| brought.try_recv().ok());
                for waiting in std::iter::once(waiting).chain(more) {
                    let function = waiting.call.function.clone();
                    let line = lines.entry(function.clone()).or_default();
                    if line.waiting.is_empty() {
                        touched.push(function);
                    }
                    line.waiting.push(waiting);
                }
            }
            Some(function) = flying.next() => {
                if let Some(line) = lines.get_mut(&function) {
                    line.flies = false;
                }
                touched.push(function);
            }
        }
        for function in touched {
            let Some(line) = lines.get_mut(&function).filter(|line| !line.flies) else { continue };
            let next = line.next();
            if next.is_empty() {
                lines.remove(&function);
                continue;
            }
            line.flies = true;
            flying.push(fly(&shared, &own, function, next));
        }
    }
    while flying.next().await.is_some() {}
}

impl Line {
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
async fn fly(
    shared: &Shared,
    own: &OnceLock<Server>,
    function: Function,
    waiting: Vec<Waiting>,
) -> Function {
    let server = own.get().filter(|server| server.is_connected()).unwrap_or(&shared.server);
    let (mut calls, answers): (Vec<_>, Vec<_>) =
        waiting.into_iter().map(|waiting| (waiting.call, waiting.answer)).unzip();
    match (calls.pop(), answers) {
        (Some(call), mut answers) if calls.is_empty() => {
            let published = within(PUBLISH, shared.publish(server, &call)).await;
            // Whoever has left does not want to know.
            if let Some(answer) = answers.pop() {
                let _ = answer.send(published);
            }
        }
        (Some(call), answers) => {
            calls.push(call);
            let published = match within(PUBLISH, shared.room(calls.len())).await {
                Ok(taken) => {
                    let stored = shared.publish_together(server, &function, calls);
                    let stored = within(PUBLISH, stored).await;
                    drop(taken);
                    match stored {
                        Ok(ids) => ids.into_iter().map(first).collect(),
                        Err(error) => vec![Err(error); answers.len()],
                    }
                }
                // There may be some for a few of them.
                Err(Error::Full) => {
                    let each = calls.iter().map(|call| shared.publish(server, call));
                    join_all(each.map(|published| within(PUBLISH, published))).await
                }
                Err(error) => vec![Err(error); answers.len()],
            };
            answers.into_iter().zip(published).for_each(|(answer, published)| {
                let _ = answer.send(published);
            });
        }
        (None, _) => {}
    }
    function
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
        server: &Server,
        function: &Function,
        mut calls: Vec<Call>,
    ) -> Result<Vec<String>, Error> {
        // First the consumer: without one, nobody would look for the calls.
        self.consumer(function).await?;
        for tries in 1.. {
            let key = Key::fresh(calls.len(), now());
            calls = calls.into_iter().map(|call| under(call, key.id(function))).collect();
            let subject = self.names.together(CALLS, function, key);
            let stored = server.put(subject, together_headers(), bundle::encode(&calls), Some(0));
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
        (Waiting { call, answer }, answered)
    }

    #[test]
    fn as_many_go_together_as_fit_and_for_which_somebody_waits() {
        let mut line = Line::default();
        let (small, answers): (Vec<_>, Vec<_>) = (0..70).map(|_| waiting(10)).unzip();
        line.waiting.extend(small);
        let next: Vec<usize> = std::iter::from_fn(|| Some(line.next().len())).take(3).collect();
        assert_eq!(next, [TOGETHER, 70 - TOGETHER, 0]);
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
