//! A JetStream queue that is used in this process, without a gateway, and calls and settlements for it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use gateway::function::Function;
use gateway::queue::call::{CallOptions, QueuedCall, UnixMillis};
use gateway::queue::embedded::Limits;
use gateway::queue::jetstream::{Auth, JetStream, Options};
use gateway::queue::status::{CallState, Settlement, StoredResponse};
use gateway::queue::{Delivery, Error, Published, Queue};
use http::HeaderMap;

use crate::support::nats::Nats;
use crate::support::{eventually, within};

pub(crate) const LIMITS: Limits =
    Limits { max_pending: 50, result_ttl: 3_600_000, idempotency_ttl: 3_600_000 };
pub(crate) const PLACES: usize = 10;
/// As short as it can be without a busy machine losing a lease that it means to keep.
pub(crate) const LEASE: Duration = Duration::from_secs(2);
/// A call is refused in less than 2 s while the server is away; on a busy machine, in less than this.
pub(crate) const REFUSED_WITHIN: Duration = Duration::from_secs(10);

pub(crate) fn options(nats: &Nats) -> Options {
    Options {
        servers: vec![nats.url()],
        auth: Auth::Nobody,
        tls: false,
        root_ca: None,
        name: "gateway-test".to_owned(),
        queue: "faas-request".to_owned(),
        replicas: 1,
        in_memory: false,
        lease: LEASE,
        limits: LIMITS,
    }
}

/// One gateway's view of the queue.
pub(crate) struct Gateway {
    jetstream: JetStream,
    pub(crate) queue: Queue,
}

impl Gateway {
    pub(crate) async fn open(options: Options) -> Self {
        let jetstream = JetStream::open(options).await.unwrap();
        Self { queue: Queue::JetStream(jetstream.clone()), jetstream }
    }

    /// One whose server answers.
    pub(crate) async fn on(nats: &Nats) -> Self {
        Self::answered(options(nats)).await
    }

    /// The same, where the server gives no call to another before the end of the test.
    pub(crate) async fn leasing_long(nats: &Nats) -> Self {
        Self::answered(Options { lease: Duration::from_secs(600), ..options(nats) }).await
    }

    async fn answered(options: Options) -> Self {
        let gateway = Self::open(options).await;
        eventually("the server answers", async || gateway.queue.status("x").await.is_ok()).await;
        gateway
    }

    pub(crate) async fn publish(&self, call: QueuedCall) -> Published {
        within("publish", self.queue.publish(call)).await.unwrap()
    }

    pub(crate) async fn take(&self) -> Delivery {
        within("take", self.queue.receive(PLACES)).await.unwrap()
    }

    pub(crate) async fn settle(&self, delivery: Delivery, settlement: Settlement) {
        within("settle", self.queue.settle(&delivery, &settlement)).await.unwrap();
    }

    pub(crate) async fn state(&self, id: &str) -> Option<CallState> {
        self.queue.status(id).await.unwrap().map(|status| status.state)
    }

    /// Nothing is there to take for some time.
    pub(crate) async fn takes_nothing(&self, time: Duration) -> bool {
        tokio::time::timeout(time, self.queue.receive(PLACES)).await.is_err()
    }

    pub(crate) async fn tidy(&self, age: Duration, idle: Duration) -> Result<u64, Error> {
        self.jetstream.tidy(age, idle).await
    }

    pub(crate) async fn unfinished(&self) -> u64 {
        let counts = self.queue.depths().await.unwrap();
        counts.iter().map(|(_, it)| it.pending + it.running + it.delayed).sum()
    }

    /// Nothing is left to be made: the server removes a call's message a moment after its end.
    pub(crate) async fn is_empty(&self) {
        eventually("nothing is left", async || self.unfinished().await == 0).await;
    }

    /// A killed server may forget removals. Whoever takes next sees that these calls are over, and lets go of them.
    pub(crate) async fn lets_go(&self) {
        tokio::select! {
            taken = self.queue.receive(PLACES) => panic!("made once more: {taken:?}"),
            () = self.is_empty() => {}
        }
    }

    /// As when the process is killed: what it has taken is neither settled nor given back.
    pub(crate) async fn dies(self, taken: Vec<Delivery>) {
        self.jetstream.stop().await;
        taken.into_iter().for_each(std::mem::forget);
    }
}

pub(crate) fn now() -> UnixMillis {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis().try_into().unwrap()
}

pub(crate) fn call_of(function: &str, id: &str) -> QueuedCall {
    QueuedCall {
        id: id.to_owned(),
        function: Function { name: function.to_owned(), namespace: "fn".to_owned() },
        target: "/p?x=1".to_owned(),
        headers: HeaderMap::from_iter([(
            http::header::ACCEPT,
            http::HeaderValue::from_bytes(b"a\xff").unwrap(),
        )]),
        body: Bytes::from_static(b"body"),
        options: CallOptions { submitted_at: now(), ..CallOptions::default() },
    }
}

pub(crate) fn call(id: &str) -> QueuedCall {
    call_of("echo", id)
}

pub(crate) fn succeeded() -> Settlement {
    let answer = StoredResponse {
        status: 200,
        headers: vec![("x-a".to_owned(), "1".to_owned())],
        body: Bytes::from_static(b"answer"),
        truncated: false,
    };
    let (status, answer) = (Some(200), Some(answer));
    Settlement::Finished {
        state: CallState::Succeeded,
        status,
        reason: None,
        response: answer,
        executed: true,
    }
}

pub(crate) fn dead() -> Settlement {
    Settlement::DeadLetter { status: Some(500), reason: Some("gave up".to_owned()), response: None }
}

pub(crate) fn retry(at: UnixMillis) -> Settlement {
    Settlement::Retry { at, status: Some(503), reason: Some("busy".to_owned()) }
}

/// A stream of the queue, as the server has it.
pub(crate) async fn stream(nats: &Nats, name: &str) -> async_nats::jetstream::stream::Stream {
    let client = async_nats::connect(nats.url()).await.unwrap();
    async_nats::jetstream::new(client).get_stream(name).await.unwrap()
}

/// One who may publish whatever it likes.
pub(crate) async fn stranger(nats: &Nats) -> async_nats::jetstream::Context {
    let options = async_nats::ConnectOptions::new().retry_on_initial_connect();
    async_nats::jetstream::new(options.connect(nats.url()).await.unwrap())
}
