//! Bodies of queued calls and their responses use bounded memory, which is released.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::support::eventually;
use crate::support::gateway::Gateway;
use crate::support::queue::{replying_when_open, with_embedded_queue};

const MIB: u64 = 1 << 20;
/// The budget for all bodies.
const BUDGET: u64 = 256 * MIB;
/// Peak memory of the process besides the bodies, most of it memory that the allocator has not returned yet. Without
/// the budget, the bodies of either test are over 480 MiB, and their copies as much again.
const OTHER_MEMORY: u64 = 180 * MIB;
/// Timeout for an exchange and for the release of memory: half a gigabyte is written meanwhile.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(120);
/// Maximum memory of an idle process.
const IDLE_MEMORY: u64 = 120 * MIB;

/// A callback target that does not respond until it is released, and counts its connections.
struct SilentTarget {
    url: String,
    connections: Arc<AtomicUsize>,
    released: watch::Sender<bool>,
}

impl SilentTarget {
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
                    // The response is final: nothing is retried.
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
async fn responses_waiting_for_callbacks_use_bounded_memory() {
    const CALLS: usize = 70;
    let (directory, silent) = (tempfile::tempdir().unwrap(), SilentTarget::start().await);
    let open = watch::Sender::new(false);
    let provider = replying_when_open(vec![b'r'; 12 << 20], &open);
    let gateway = with_embedded_queue(&provider, directory.path()).start().await;
    let callback = format!("X-Callback-Url: {}", silent.url);
    for _ in 0..CALLS {
        gateway.enqueue("echo", &[&callback], "x").await;
    }
    open.send_replace(true);
    // Callbacks are sent for as many calls as the response budget allows.
    eventually("callbacks are being sent", async || {
        silent.connections.load(SeqCst) as u64 >= BUDGET / (16 * MIB)
    })
    .await;
    // The target accepts no more than before, and all waiting calls have received their share.
    let mut seen = 0;
    eventually("nothing changes any more", async || {
        let before = seen;
        seen = silent.connections.load(SeqCst);
        tokio::time::sleep(Duration::from_millis(500)).await;
        before == seen && before > 0
    })
    .await;
    assert!(gateway.peak_memory() < BUDGET + OTHER_MEMORY, "{} MiB", gateway.peak_memory() / MIB);
    // The queue refuses further calls with a Retry-After; synchronous calls continue.
    let refused = gateway.send_async("echo", &[], &"x".repeat(100_000)).await;
    if refused.status() != 202 {
        assert_eq!(refused.status(), 503, "{refused}");
        assert!(refused.header("retry-after").is_some(), "{refused}");
    }
    assert_eq!(gateway.post("/function/echo", "").await.status(), 200);
    silent.released.send_replace(true);
    wait_until_released(&gateway).await;
    assert!(gateway.peak_memory() < BUDGET + OTHER_MEMORY, "{} MiB", gateway.peak_memory() / MIB);
}

/// Waits until the memory is released. The allocator does that while other calls run.
async fn wait_until_released(gateway: &Gateway) {
    let start = Instant::now();
    loop {
        gateway.send_async("echo", &[], "x").await;
        let (queues, memory) = (gateway.get("/system/queues").await, gateway.memory());
        if memory < IDLE_MEMORY {
            return;
        }
        assert!(start.elapsed() < EXCHANGE_TIMEOUT, "{} MiB: {queues}", memory / MIB);
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test]
async fn the_memory_budget_includes_copies_of_enqueued_bodies() {
    let directory = tempfile::tempdir().unwrap();
    let never = watch::Sender::new(false);
    let provider = replying_when_open(*b"r", &never);
    let gateway = with_embedded_queue(&provider, directory.path()).start().await;
    let body: Arc<[u8]> = vec![b'x'; 8 << 20].into();
    let senders: Vec<_> =
        (0..60).map(|_| tokio::spawn(send(gateway.address, Arc::clone(&body)))).collect();
    let mut accepted = 0;
    for sender in senders {
        accepted += usize::from(sender.await.unwrap());
    }
    assert!(accepted > 0);
    assert!(gateway.peak_memory() < BUDGET + OTHER_MEMORY, "{} MiB", gateway.peak_memory() / MIB);
}

/// Enqueues a call with `body`. Returns whether it was accepted. A refused upload may be aborted.
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
    let exchanged =
        tokio::time::timeout(EXCHANGE_TIMEOUT, exchange).await.expect("the process exits");
    exchanged.is_some() && response.starts_with(b"HTTP/1.1 202")
}
