//! More connections, or larger incomplete heads, than the limits allow.

use std::time::Duration;

use tokio::task::JoinSet;

use crate::support::connection::{Connection, get};
use crate::support::gateway::{Builder, Gateway};
use crate::support::provider::Provider;

/// An incomplete request head of about `length` bytes.
fn incomplete(length: usize) -> String {
    format!("GET /function/echo HTTP/1.1\r\nHost: g\r\nX-Pad: {}", "p".repeat(length))
}

/// Returns whether a connection has data to read, without waiting.
async fn has_data(client: &Connection) -> bool {
    let readable = tokio::time::timeout(Duration::from_millis(1), client.wait_readable()).await;
    readable.unwrap_or(false)
}

#[tokio::test]
async fn incomplete_request_heads_share_one_memory_budget() {
    const CONNECTIONS: usize = 1500;
    const BUDGET: u64 = 64 << 20;
    // A busy machine needs long for 1.4 GiB, and no head may time out meanwhile.
    const HEAD_TIMEOUT: Duration = Duration::from_secs(180);
    let provider = Provider::replying("hello");
    let gateway = Gateway::builder().provider(&provider).var("read_timeout", "10m").start().await;
    assert_eq!(gateway.get("/function/echo").await.status(), 200);
    let before = gateway.peak_memory();
    let mut sending = JoinSet::new();
    for _ in 0..CONNECTIONS {
        let address = gateway.address;
        sending.spawn(async move {
            let mut client = Connection::connect(address).await;
            for piece in incomplete(1_000_000).as_bytes().chunks(32 << 10) {
                // A refused connection may be closed.
                if client.try_send(piece).await.is_err() {
                    break;
                }
            }
            client
        });
    }
    let mut clients =
        tokio::time::timeout(HEAD_TIMEOUT, sending.join_all()).await.expect("all heads are sent");
    let grown = gateway.peak_memory() - before;
    // Buffers are larger than their contents, and a refused head is freed when its task runs next. All heads together
    // are 1.4 GiB.
    assert!(grown < 5 * BUDGET, "{grown} bytes more");
    // Other clients are served meanwhile.
    assert_eq!(gateway.get("/function/echo").await.text(), "hello");
    let (mut refused, mut served) = (0, 0);
    for client in &mut clients {
        if !has_data(client).await {
            let _ = client.try_send("\r\n\r\n").await;
        }
        let response = client.read_response().await;
        match response.status() {
            200 => served += 1,
            503 => {
                assert!(response.text().contains("max_head_memory"), "{response}");
                assert_eq!(response.header("connection"), Some("close"));
                refused += 1;
            }
            _ => panic!("{response}"),
        }
    }
    assert!(served >= 30 && refused >= CONNECTIONS - 100, "{served} served, {refused} refused");
}

#[tokio::test]
async fn the_largest_incomplete_head_is_refused_first() {
    let provider = Provider::replying("hello");
    let gateway =
        Gateway::builder().provider(&provider).var("max_head_memory", 1 << 20).start().await;
    // Twice, because the budget must be released.
    for _ in 0..2 {
        let sizes = [300_000, 600_000, 300_000, 20_000];
        let mut clients = Vec::new();
        for size in sizes {
            let mut client = gateway.connect().await;
            client.send(incomplete(size)).await;
            clients.push(client);
        }
        assert_eq!(clients[1].read_response().await.status(), 503);
        assert!(clients[1].read_to_close().await.is_empty());
        for at in [0, 2, 3] {
            assert_eq!(clients[at].exchange("\r\n\r\n").await.text(), "hello", "{at}");
            // The connection can be reused.
            assert_eq!(clients[at].get("/function/echo").await.text(), "hello", "{at}");
        }
    }
}

/// A gateway that accepts connections in the order of their arrival. With several threads, each has its own accept
/// queue.
fn accepting_in_order(provider: &Provider) -> Builder {
    Gateway::builder().provider(provider).var("threads", "1")
}

#[tokio::test]
async fn the_longest_idle_connection_is_closed_for_a_new_one() {
    let mut provider = Provider::manual();
    let gateway = accepting_in_order(&provider).var("max_connections", "4").start().await;
    let mut busy = gateway.connect().await;
    busy.send(get("/function/slow")).await;
    let mut call = provider.next_call().await;
    // One connection without a request, and two with one.
    let mut silent = gateway.connect().await;
    let (mut second, mut third) = (gateway.connect().await, gateway.connect().await);
    assert_eq!(second.get("/_/healthz").await.status(), 200);
    assert_eq!(third.get("/_/healthz").await.status(), 200);

    let mut fourth = gateway.connect().await;
    assert_eq!(fourth.get("/_/healthz").await.status(), 200);
    assert!(silent.read_to_close().await.is_empty());
    assert_eq!(third.get("/_/healthz").await.status(), 200);
    let mut fifth = gateway.connect().await;
    assert_eq!(fifth.get("/_/healthz").await.status(), 200);
    assert!(second.read_to_close().await.is_empty());
    for client in [&mut third, &mut fourth, &mut fifth] {
        assert_eq!(client.get("/_/healthz").await.status(), 200);
    }
    call.respond(200, "done").await;
    assert_eq!(busy.read_response().await.text(), "done");
}

#[tokio::test]
async fn incomplete_heads_do_not_block_new_connections() {
    let provider = Provider::replying("hello");
    let gateway = accepting_in_order(&provider).var("max_connections", "20").start().await;
    let mut slow = Vec::new();
    for _ in 0..20 {
        let mut client = gateway.connect().await;
        client.send("G").await;
        slow.push(client);
    }
    assert_eq!(gateway.get("/function/echo").await.text(), "hello");
}

#[tokio::test]
async fn idle_connections_do_not_block_the_metrics_port() {
    let provider = Provider::replying("hello");
    let gateway = Gateway::in_front_of(&provider).await;
    let mut idle = Vec::new();
    for _ in 0..300 {
        idle.push(Connection::connect(gateway.metrics_address).await);
    }
    let mut scraper = Connection::connect(gateway.metrics_address).await;
    assert_eq!(scraper.get("/metrics").await.status(), 200);
}
