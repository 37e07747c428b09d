//! Bodies of queued calls, and their responses, take a bounded part of the memory, which is given back.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::support::eventually;
use crate::support::gateway::Gateway;
use crate::support::queue::{queueing, responding};

const MIB: u64 = 1 << 20;
/// What the bodies may take together.
const BUDGET: u64 = 256 * MIB;
/// What the process takes beside them at its peak, most of it memory that the allocator has not returned yet. Without
/// the budget, the bodies of either test are over 480 MiB, and their copies as much again.
const BESIDE: u64 = 180 * MIB;
/// How long an exchange may take, and the memory to be given back: half a gigabyte is written meanwhile.
const PATIENCE: Duration = Duration::from_secs(120);
/// What an idle process holds at most.
const IDLE: u64 = 120 * MIB;

/// A target of callbacks that does not answer until it is released; how many connections there were.
struct Silent {
    url: String,
    connections: Arc<AtomicUsize>,
    released: watch::Sender<bool>,
}

impl Silent {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let (connections, released) = (Arc::new(AtomicUsize::new(0)), watch::Sender::new(false));
        let (counted, release) = (Arc::clone(&connections), released.clone());
        tokio::spawn(async move {
            while let Ok((mut connection, _)) = listener.accept().await {
                counted.fetch_add(1, SeqCst);
                let mut release = release.subscribe();
                tokio::spawn(async move {
                    release.wait_for(|released| *released).await.ok()?;
                    // It wants none of them: nothing is tried again.
                    let gone = b"HTTP/1.1 410 Gone\r\nContent-Length: 0\r\n\r\n";
                    connection.write_all(gone).await.ok()?;
                    tokio::io::copy(&mut connection, &mut tokio::io::sink()).await.ok()
                });
            }
        });
        Self { url, connections, released }
    }
}

#[tokio::test]
async fn responses_wait_for_callbacks_in_bounded_memory() {
    const CALLS: usize = 70;
    let (directory, silent) = (tempfile::tempdir().unwrap(), Silent::start().await);
    let open = watch::Sender::new(false);
    let provider = responding(vec![b'r'; 12 << 20], &open);
    let gateway = queueing(&provider, directory.path()).start().await;
    let callback = format!("X-Callback-Url: {}", silent.url);
    for _ in 0..CALLS {
        gateway.queued("echo", &[&callback], "x").await;
    }
    open.send_replace(true);
    // As many as have room for their response are reported.
    eventually("callbacks are on their way", async || {
        silent.connections.load(SeqCst) as u64 >= BUDGET / (16 * MIB)
    })
    .await;
    // The target takes no more than before, and all that wait have got what there was.
    let mut seen = 0;
    eventually("nothing changes any more", async || {
        let before = seen;
        seen = silent.connections.load(SeqCst);
        tokio::time::sleep(Duration::from_millis(500)).await;
        before == seen && before > 0
    })
    .await;
    assert!(gateway.peak_memory() < BUDGET + BESIDE, "{} MiB", gateway.peak_memory() / MIB);
    // The queue takes no more, and says when to try again; other calls go on.
    let refused = gateway.queue("echo", &[], &"x".repeat(100_000)).await;
    if refused.status() != 202 {
        assert_eq!(refused.status(), 503, "{refused}");
        assert!(refused.header("retry-after").is_some(), "{refused}");
    }
    assert_eq!(gateway.post("/function/echo", "").await.status(), 200);
    silent.released.send_replace(true);
    given_back(&gateway).await;
    assert!(gateway.peak_memory() < BUDGET + BESIDE, "{} MiB", gateway.peak_memory() / MIB);
}

/// Waits until the memory is given back. The allocator does that while other calls go on.
async fn given_back(gateway: &Gateway) {
    let start = Instant::now();
    loop {
        gateway.queue("echo", &[], "x").await;
        let (queues, memory) = (gateway.get("/system/queues").await, gateway.memory());
        if memory < IDLE {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "{} MiB: {queues}", memory / MIB);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test]
async fn bodies_that_are_enqueued_together_are_counted_with_their_copies() {
    let directory = tempfile::tempdir().unwrap();
    let never = watch::Sender::new(false);
    let provider = responding(*b"r", &never);
    let gateway = queueing(&provider, directory.path()).start().await;
    let body: Arc<[u8]> = vec![b'x'; 8 << 20].into();
    let senders: Vec<_> =
        (0..60).map(|_| tokio::spawn(send(gateway.address, Arc::clone(&body)))).collect();
    let mut accepted = 0;
    for sender in senders {
        accepted += usize::from(sender.await.unwrap());
    }
    assert!(accepted > 0);
    assert!(gateway.peak_memory() < BUDGET + BESIDE, "{} MiB", gateway.peak_memory() / MIB);
}

/// Queues a call with `body`; whether it was accepted. One that is refused may be cut off.
async fn send(address: SocketAddr, body: Arc<[u8]>) -> bool {
    let mut connection = TcpStream::connect(address).await.unwrap();
    let head = format!(
        "POST /async-function/echo HTTP/1.1\r\nHost: g\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    let mut response = Vec::new();
    let exchange = async {
        connection.write_all(head.as_bytes()).await.ok()?;
        connection.write_all(&body).await.ok()?;
        connection.read_to_end(&mut response).await.ok()
    };
    let exchanged = tokio::time::timeout(PATIENCE, exchange).await.expect("it ends");
    exchanged.is_some() && response.starts_with(b"HTTP/1.1 202")
}
