//! A JetStream queue in this process, without a gateway; and calls and settlements for it.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use gateway_base::function::Function;
use gateway_queue::call::{CallOptions, QueuedCall, UnixMillis};
use gateway_queue::embedded::Limits;
use gateway_queue::jetstream::{Auth, JetStream, Options};
use gateway_queue::status::{CallState, Settlement, StoredResponse};
use gateway_queue::{Delivery, Error, JobQueue as _, JobStore as _, Published};
use http::HeaderMap;

use crate::support::nats::Nats;
use crate::support::{eventually, within};

pub(crate) const LIMITS: Limits =
    Limits { max_pending: 50, result_ttl: 3_600_000, idempotency_ttl: 3_600_000 };
pub(crate) const CONCURRENCY: usize = 10;
/// As short as possible without a busy machine losing a lease that it renews.
pub(crate) const LEASE: Duration = Duration::from_secs(2);
/// A call is refused in less than 2 s while the server is unavailable; on a busy machine, in less than this.
pub(crate) const REFUSAL_TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) fn options(nats: &Nats) -> Options {
    Options {
        servers: vec![nats.url()],
        auth: Auth::Anonymous,
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

/// One client of the queue.
pub(crate) struct TestQueue {
    pub(crate) inner: JetStream,
}

impl TestQueue {
    pub(crate) async fn open(options: Options) -> Self {
        Self { inner: JetStream::open(options).await.unwrap() }
    }

    /// A queue that is connected to its server.
    pub(crate) async fn connected(nats: &Nats) -> Self {
        Self::open_connected(options(nats)).await
    }

    /// A connected queue whose leases do not expire during the test.
    pub(crate) async fn with_long_lease(nats: &Nats) -> Self {
        Self::open_connected(Options { lease: Duration::from_secs(600), ..options(nats) }).await
    }

    async fn open_connected(options: Options) -> Self {
        let queue = Self::open(options).await;
        eventually("the server responds", async || queue.inner.status("x").await.is_ok()).await;
        queue
    }

    pub(crate) async fn publish(&self, call: QueuedCall) -> Published {
        within("publish", self.inner.publish(call, None)).await.unwrap()
    }

    pub(crate) async fn receive(&self) -> Delivery {
        within("receive a call", self.inner.receive(CONCURRENCY)).await.unwrap()
    }

    pub(crate) async fn settle(&self, delivery: Delivery, settlement: Settlement) {
        within("settle", delivery.settle(&settlement)).await.unwrap();
    }

    pub(crate) async fn state(&self, id: &str) -> Option<CallState> {
        self.inner.status(id).await.unwrap().map(|status| status.state)
    }

    /// Returns whether nothing is delivered for `time`.
    pub(crate) async fn receives_nothing(&self, time: Duration) -> bool {
        tokio::time::timeout(time, self.inner.receive(CONCURRENCY)).await.is_err()
    }

    pub(crate) async fn collect_garbage(
        &self,
        age: Duration,
        idle: Duration,
    ) -> Result<u64, Error> {
        self.inner.collect_garbage(age, idle).await
    }

    pub(crate) async fn unfinished(&self) -> u64 {
        let counts = self.inner.depths().await.unwrap();
        counts.iter().map(|(_, counts)| counts.pending + counts.running + counts.delayed).sum()
    }

    /// Waits until no call is unfinished: the server deletes a call's message a moment after its end.
    pub(crate) async fn wait_until_empty(&self) {
        eventually("no call is unfinished", async || self.unfinished().await == 0).await;
    }

    /// A killed server may lose deletions. The next receiver notices that these calls have finished, and acknowledges
    /// them.
    pub(crate) async fn assert_nothing_redelivered(&self) {
        tokio::select! {
            taken = self.inner.receive(CONCURRENCY) => panic!("redelivered: {taken:?}"),
            () = self.wait_until_empty() => {}
        }
    }

    /// Simulates a killed process: the received calls are neither settled nor released.
    pub(crate) async fn crash(self, taken: Vec<Delivery>) {
        self.inner.close().await;
        taken.into_iter().for_each(std::mem::forget);
    }
}

pub(crate) fn unix_millis() -> UnixMillis {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis().try_into().unwrap()
}

pub(crate) fn call_to(function: &str, id: &str) -> QueuedCall {
    QueuedCall {
        id: id.to_owned(),
        function: Function { name: function.to_owned(), namespace: "fn".to_owned() },
        target: "/p?x=1".to_owned(),
        headers: HeaderMap::from_iter([(
            http::header::ACCEPT,
            http::HeaderValue::from_bytes(b"a\xff").unwrap(),
        )]),
        body: Bytes::from_static(b"body"),
        options: CallOptions { submitted_at: unix_millis(), ..CallOptions::default() },
    }
}

pub(crate) fn call(id: &str) -> QueuedCall {
    call_to("echo", id)
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

pub(crate) fn dead_lettered() -> Settlement {
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

/// A client that publishes arbitrary messages.
pub(crate) async fn foreign_client(nats: &Nats) -> async_nats::jetstream::Context {
    let options = async_nats::ConnectOptions::new().retry_on_initial_connect();
    async_nats::jetstream::new(options.connect(nats.url()).await.unwrap())
}
