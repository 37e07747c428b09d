//! A connection over real sockets whose task is polled by hand, so that what it is told comes at a known moment.

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
use crate::config::Timeouts;
use crate::serve::heads::Heads;
use crate::serve::register::{Register, Seat, Shard};
use crate::watch::Watch;

const LONG: Duration = Duration::from_secs(3600);
const TIMEOUTS: Timeouts = Timeouts { read: LONG, write: LONG, idle: LONG, upstream: LONG };

type Answer = Ready<Result<Response<String>, Infallible>>;

/// Says `hello` to every request.
#[derive(Clone)]
struct Hello(Arc<Watch>);

impl Service<Request<Incoming>> for Hello {
    type Response = Response<String>;
    type Error = Infallible;
    type Future = Answer;

    fn call(&self, _: Request<Incoming>) -> Answer {
        self.0.call_begins();
        self.0.call_ended(Instant::now(), LONG);
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

/// A connection, its task, and its client.
struct ByHand {
    connection: Pin<Box<Connection<Hello>>>,
    woken: Arc<Woken>,
    client: TcpStream,
    watch: Arc<Watch>,
    closing: CancellationToken,
    heads: Arc<Heads>,
    shard: Arc<Shard>,
    seat: Arc<Seat>,
}

impl ByHand {
    /// A connection that was accepted an hour ago, before `first` came. Incomplete heads have `budget` bytes.
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
        let watch = Arc::new(Watch::at(long_ago));
        watch.call_ended(long_ago, 2 * LONG);
        let place = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let mut caller = Caller::new(address, TaskTracker::new(), place);
        caller.watch = Arc::clone(&watch);
        let (heads, register) = (Arc::new(Heads::new(budget)), Register::default());
        let shard = register.shard(&heads);
        let seat = shard.enter(&watch, &heads);
        let stream = CallerStream::new(tcp, Arc::clone(&watch), TIMEOUTS, Arc::clone(&seat));
        let closing = CancellationToken::new();
        let seated = Seated(Arc::clone(&seat));
        let service = Hello(Arc::clone(&watch));
        let mut connection =
            Connection::new(builder(), stream, caller, service, closing.clone(), seated);
        connection.accepted = long_ago;
        let connection = Box::pin(connection);
        Self { connection, woken: Arc::default(), client, watch, closing, heads, shard, seat }
    }

    /// Polls once; whether the connection has ended.
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
        tokio::time::timeout(Duration::from_secs(10), woken).await.expect("it is woken");
    }

    /// Sends `bytes`, and waits until the connection may read them.
    async fn send(&mut self, bytes: &[u8]) {
        self.client.write_all(bytes).unwrap();
        self.woken().await;
    }

    /// Tells the connection something, as another task does.
    fn tell(&self, note: Note) {
        self.shard.lock().open[&self.seat.key].tell(note);
    }

    /// Polls, whenever the task is woken, until the client has received something that ends with `end`.
    async fn until(&mut self, end: &str) -> String {
        let (mut received, mut piece) = (String::new(), [0; 1 << 10]);
        let deadline = Instant::now() + Duration::from_secs(10);
        while !received.ends_with(end) {
            assert!(Instant::now() < deadline, "{received:?}");
            match self.client.read(&mut piece) {
                Ok(0) => panic!("it is closed after {received:?}"),
                Ok(length) => received.push_str(std::str::from_utf8(&piece[..length]).unwrap()),
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
            if self.is_woken() {
                assert!(!self.ends(), "it has ended after {received:?}");
            }
            tokio::task::yield_now().await;
        }
        received
    }

    /// Whether the client sees the end of the connection next.
    fn is_closed(&mut self) -> bool {
        matches!(self.client.read(&mut [0]), Ok(0))
    }
}

const BEGUN: &[u8] = b"GET / HTTP/1.1\r\nHost: g\r\n";
const MALFORMED: &[u8] = b"GET / HTTP/1.1\r\nHost g\r\n\r\n";

#[tokio::test]
async fn a_connection_that_lingers_in_its_first_poll_hears_that_it_is_to_leave() {
    let mut it = ByHand::new(MALFORMED, 1 << 20).await;
    assert!(!it.ends());
    assert!(it.until("malformed\n").await.starts_with("HTTP/1.1 400 "));
    it.tell(Note::Leave);
    assert!(it.is_woken());
    assert!(it.ends());
}

#[tokio::test]
async fn a_connection_that_lingers_in_its_first_poll_hears_that_the_process_stops() {
    let mut it = ByHand::new(MALFORMED, 1 << 20).await;
    assert!(!it.ends());
    it.closing.cancel();
    assert!(it.is_woken());
}

#[tokio::test]
async fn a_connection_whose_head_begins_before_it_heeds_that_it_is_to_leave_stays() {
    let mut it = ByHand::new(b"", 1 << 20).await;
    assert!(!it.ends());
    it.send(BEGUN).await;
    it.tell(Note::Leave);
    assert!(!it.ends(), "closed in the middle of a head");
    assert_eq!(it.watch.stage(), Stage::Head);
    // The acceptor need not wait for this connection any longer.
    assert!(!it.watch.has(Note::Leave));
    it.send(b"\r\n").await;
    assert!(it.until("hello").await.starts_with("HTTP/1.1 200 "));
}

#[tokio::test]
async fn a_connection_that_is_idle_or_whose_head_takes_too_long_leaves() {
    let mut idle = ByHand::new(b"", 1 << 20).await;
    assert!(!idle.ends());
    idle.tell(Note::Leave);
    assert!(idle.ends());
    let mut slow = ByHand::new(b"", 1 << 20).await;
    assert!(!slow.ends());
    slow.send(BEGUN).await;
    assert!(!slow.ends());
    slow.watch.head_began(Instant::now().checked_sub(register::HEAD).unwrap(), LONG);
    slow.tell(Note::Leave);
    assert!(slow.ends());
}

#[tokio::test]
async fn a_call_that_ends_before_its_connection_heeds_that_it_is_to_leave_keeps_it() {
    let mut it = ByHand::new(b"", 1 << 20).await;
    assert!(!it.ends());
    it.send(&[BEGUN, b"\r\n"].concat()).await;
    it.tell(Note::Leave);
    assert!(!it.ends());
    assert!(it.until("hello").await.starts_with("HTTP/1.1 200 "));
    it.send(&[BEGUN, b"\r\n"].concat()).await;
    assert!(it.until("hello").await.starts_with("HTTP/1.1 200 "));
}

#[tokio::test]
async fn the_rest_of_a_head_is_waited_for_when_the_process_stops() {
    let mut it = ByHand::new(&[BEGUN, b"\r\n"].concat(), 1 << 20).await;
    assert!(!it.ends());
    it.until("hello").await;
    it.send(BEGUN).await;
    assert!(!it.ends());
    it.closing.cancel();
    assert!(it.is_woken());
    assert!(!it.ends(), "closed in the middle of a head");
    let due = it.watch.due().unwrap();
    assert!(due <= Instant::now() + register::HEAD);
    it.client.write_all(b"\r\n").unwrap();
    it.woken().await;
    assert!(it.ends());
    let mut response = [0; 1 << 10];
    let length = it.client.read(&mut response).unwrap();
    let response = std::str::from_utf8(&response[..length]).unwrap();
    assert!(response.starts_with("HTTP/1.1 200 ") && response.ends_with("hello"), "{response}");
    assert!(it.is_closed());
}

#[tokio::test]
async fn a_head_that_takes_too_long_is_not_waited_for_when_the_process_stops() {
    let mut it = ByHand::new(b"", 1 << 20).await;
    assert!(!it.ends());
    it.send(BEGUN).await;
    assert!(!it.ends());
    it.watch.head_began(Instant::now().checked_sub(register::HEAD).unwrap(), LONG);
    it.closing.cancel();
    // It closes when its timer fires, which is due.
    if !it.ends() {
        it.woken().await;
        assert!(it.ends());
    }
}

#[tokio::test]
async fn a_refused_head_counts_no_more_while_its_connection_lingers() {
    const SIZE: usize = 60 << 10;
    let mut it = ByHand::new(b"", SIZE * 3 / 2).await;
    assert!(!it.ends());
    let head = [BEGUN, b"A: ", &[b'a'; SIZE]].concat();
    for piece in head.chunks(8 << 10) {
        it.send(piece).await;
        assert!(!it.ends());
    }
    it.send(b"\r\nmalformed\r\n\r\n").await;
    assert!(!it.ends());
    assert!(it.until("malformed\n").await.starts_with("HTTP/1.1 400 "));
    let other = Arc::new(Watch::new());
    let seat = Seated(it.shard.enter(&other, &it.heads));
    assert!(it.heads.grows(&seat.0, SIZE));
    assert!(!it.watch.has(Note::Refuse));
}
