//! Tests of a connection over real sockets. The tests poll its task themselves, so that signals arrive at known
//! moments.

use std::convert::Infallible;
use std::future::Ready;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::task::{Wake, Waker};

use hyper::service::Service;
use hyper::{Request, Response};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

use super::*;
use crate::deadlines::ConnectionDeadlines;
use crate::server::Timeouts;
use crate::server::connection_shard::Shard;
use crate::server::head_budget::HeadBudget;
use crate::server::registry::{ConnectionRegistry, Registration};

const LONG: Duration = Duration::from_secs(3600);
const TIMEOUTS: Timeouts = Timeouts { read: LONG, write: LONG, idle: LONG, upstream: LONG };

type HelloResponse = Ready<Result<Response<String>, Infallible>>;

/// Responds `hello` to every request.
#[derive(Clone)]
struct Hello(Arc<ConnectionDeadlines>);

impl Service<Request<Incoming>> for Hello {
    type Response = Response<String>;
    type Error = Infallible;
    type Future = HelloResponse;

    fn call(&self, _: Request<Incoming>) -> HelloResponse {
        self.0.on_exchange_started();
        self.0.on_exchange_finished(Instant::now(), LONG);
        std::future::ready(Ok(Response::new("hello".to_owned())))
    }
}

#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, SeqCst);
    }
}

/// A connection, polled by the test, and its client.
struct ManualConnection {
    connection: Pin<Box<Connection<Hello>>>,
    woken: Arc<Woken>,
    client: TcpStream,
    deadlines: Arc<ConnectionDeadlines>,
    closing: CancellationToken,
    head_budget: Arc<HeadBudget>,
    shard: Arc<Shard>,
    registration: Arc<Registration>,
}

impl ManualConnection {
    /// Creates a connection that was accepted an hour ago and then received `first`. Incomplete heads have `budget`
    /// bytes.
    async fn new(first: &[u8], budget: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (tcp, address) = listener.accept().unwrap();
        client.write_all(first).unwrap();
        client.set_nonblocking(true).unwrap();
        tcp.set_nonblocking(true).unwrap();
        let tcp = tokio::net::TcpStream::from_std(tcp).unwrap();
        if !first.is_empty() {
            // The first poll reads it.
            tcp.readable().await.unwrap();
        }

        let long_ago = Instant::now().checked_sub(LONG).unwrap();
        let deadlines = Arc::new(ConnectionDeadlines::with_base(long_ago));
        deadlines.on_exchange_finished(long_ago, 2 * LONG);
        let permit = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let mut handle = ClientConnection::new(address, TaskTracker::new(), permit);
        handle.deadlines = Arc::clone(&deadlines);
        let (head_budget, registry) =
            (Arc::new(HeadBudget::new(budget)), ConnectionRegistry::default());
        let shard = registry.add_shard(&head_budget);
        let registration = registry::register(&shard, &deadlines, &head_budget);
        let stream =
            ClientIo::new(tcp, Arc::clone(&deadlines), TIMEOUTS, Arc::clone(&registration));
        let closing = CancellationToken::new();
        let guard = RegistrationGuard(Arc::clone(&registration));
        let service = Hello(Arc::clone(&deadlines));
        let mut connection =
            Connection::new(builder(), stream, handle, service, closing.clone(), guard);
        connection.accepted_at = long_ago;
        let connection = Box::pin(connection);
        Self {
            connection,
            woken: Arc::default(),
            client,
            deadlines,
            closing,
            head_budget,
            shard,
            registration,
        }
    }

    /// Polls once. Returns whether the connection has ended.
    fn ends(&mut self) -> bool {
        self.woken.0.store(false, SeqCst);
        let waker = Waker::from(Arc::clone(&self.woken));
        self.connection.as_mut().poll(&mut Context::from_waker(&waker)).is_ready()
    }

    fn is_woken(&self) -> bool {
        self.woken.0.load(SeqCst)
    }

    /// Waits until the task is woken.
    async fn woken(&self) {
        let woken = async {
            while !self.is_woken() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), woken).await.expect("the task is woken");
    }

    /// Sends `bytes`, and waits until the connection may read them.
    async fn send(&mut self, bytes: &[u8]) {
        self.client.write_all(bytes).unwrap();
        self.woken().await;
    }

    /// Sends `signal` to the connection, as another task does.
    fn signal(&self, signal: Signal) {
        self.shard.connections().open[&self.registration.connection.key].signal(signal);
    }

    /// Polls whenever the task is woken, until the client has received data that ends with `end`.
    async fn until(&mut self, end: &str) -> String {
        let (mut received, mut piece) = (String::new(), [0; 1 << 10]);
        let deadline = Instant::now() + Duration::from_secs(10);
        while !received.ends_with(end) {
            assert!(Instant::now() < deadline, "{received:?}");
            match self.client.read(&mut piece) {
                Ok(0) => panic!("closed after {received:?}"),
                Ok(length) => received.push_str(std::str::from_utf8(&piece[..length]).unwrap()),
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
            if self.is_woken() {
                assert!(!self.ends(), "ended after {received:?}");
            }
            tokio::task::yield_now().await;
        }
        received
    }

    /// Returns whether the client's next read shows the end of the connection.
    fn is_closed(&mut self) -> bool {
        matches!(self.client.read(&mut [0]), Ok(0))
    }
}

const STARTED_HEAD: &[u8] = b"GET / HTTP/1.1\r\nHost: g\r\n";
const MALFORMED: &[u8] = b"GET / HTTP/1.1\r\nHost g\r\n\r\n";

#[tokio::test]
async fn a_connection_that_lingers_after_its_first_poll_can_be_evicted() {
    let mut test = ManualConnection::new(MALFORMED, 1 << 20).await;
    assert!(!test.ends());
    assert!(test.until("malformed\n").await.starts_with("HTTP/1.1 400 "));
    test.signal(Signal::Evict);
    assert!(test.is_woken());
    assert!(test.ends());
}

#[tokio::test]
async fn a_connection_that_lingers_after_its_first_poll_is_woken_by_shutdown() {
    let mut test = ManualConnection::new(MALFORMED, 1 << 20).await;
    assert!(!test.ends());
    test.closing.cancel();
    assert!(test.is_woken());
}

#[tokio::test]
async fn a_head_that_starts_before_an_eviction_is_handled_cancels_it() {
    let mut test = ManualConnection::new(b"", 1 << 20).await;
    assert!(!test.ends());
    test.send(STARTED_HEAD).await;
    test.signal(Signal::Evict);
    assert!(!test.ends(), "closed in the middle of a head");
    assert_eq!(test.deadlines.state(), ConnectionState::ReadingHead);
    // The acceptor must not wait for this connection any longer.
    assert!(!test.deadlines.has_signal(Signal::Evict));
    test.send(b"\r\n").await;
    assert!(test.until("hello").await.starts_with("HTTP/1.1 200 "));
}

#[tokio::test]
async fn an_idle_connection_and_one_with_a_slow_head_can_be_evicted() {
    let mut idle = ManualConnection::new(b"", 1 << 20).await;
    assert!(!idle.ends());
    idle.signal(Signal::Evict);
    assert!(idle.ends());
    let mut slow = ManualConnection::new(b"", 1 << 20).await;
    assert!(!slow.ends());
    slow.send(STARTED_HEAD).await;
    assert!(!slow.ends());
    slow.deadlines
        .on_head_started_at(Instant::now().checked_sub(registry::HEAD_GRACE).unwrap(), LONG);
    slow.signal(Signal::Evict);
    assert!(slow.ends());
}

#[tokio::test]
async fn a_request_that_ends_before_an_eviction_is_handled_cancels_it() {
    let mut test = ManualConnection::new(b"", 1 << 20).await;
    assert!(!test.ends());
    test.send(&[STARTED_HEAD, b"\r\n"].concat()).await;
    test.signal(Signal::Evict);
    assert!(!test.ends());
    assert!(test.until("hello").await.starts_with("HTTP/1.1 200 "));
    test.send(&[STARTED_HEAD, b"\r\n"].concat()).await;
    assert!(test.until("hello").await.starts_with("HTTP/1.1 200 "));
}

#[tokio::test]
async fn shutdown_waits_for_the_rest_of_a_head() {
    let mut test = ManualConnection::new(&[STARTED_HEAD, b"\r\n"].concat(), 1 << 20).await;
    assert!(!test.ends());
    test.until("hello").await;
    test.send(STARTED_HEAD).await;
    assert!(!test.ends());
    test.closing.cancel();
    assert!(test.is_woken());
    assert!(!test.ends(), "closed in the middle of a head");
    let next = test.deadlines.next_deadline().unwrap();
    assert!(next <= Instant::now() + registry::HEAD_GRACE);
    test.client.write_all(b"\r\n").unwrap();
    test.woken().await;
    assert!(test.ends());
    let mut response = [0; 1 << 10];
    let length = test.client.read(&mut response).unwrap();
    let response = std::str::from_utf8(&response[..length]).unwrap();
    assert!(response.starts_with("HTTP/1.1 200 ") && response.ends_with("hello"), "{response}");
    assert!(test.is_closed());
}

#[tokio::test]
async fn shutdown_does_not_wait_for_a_slow_head() {
    let mut test = ManualConnection::new(b"", 1 << 20).await;
    assert!(!test.ends());
    test.send(STARTED_HEAD).await;
    assert!(!test.ends());
    test.deadlines
        .on_head_started_at(Instant::now().checked_sub(registry::HEAD_GRACE).unwrap(), LONG);
    test.closing.cancel();
    // The connection closes when its timer fires, whose deadline has passed.
    if !test.ends() {
        test.woken().await;
        assert!(test.ends());
    }
}

#[tokio::test]
async fn a_refused_head_is_released_while_its_connection_lingers() {
    const SIZE: usize = 60 << 10;
    let mut test = ManualConnection::new(b"", SIZE * 3 / 2).await;
    assert!(!test.ends());
    let head = [STARTED_HEAD, b"A: ", &[b'a'; SIZE]].concat();
    for piece in head.chunks(8 << 10) {
        test.send(piece).await;
        assert!(!test.ends());
    }
    test.send(b"\r\nmalformed\r\n\r\n").await;
    assert!(!test.ends());
    assert!(test.until("malformed\n").await.starts_with("HTTP/1.1 400 "));
    let other = Arc::new(ConnectionDeadlines::new());
    let registration =
        RegistrationGuard(registry::register(&test.shard, &other, &test.head_budget));
    assert!(registration.0.charge_head(SIZE));
    assert!(!test.deadlines.has_signal(Signal::RefuseHead));
}
