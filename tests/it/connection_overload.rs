//! More connections, or larger incomplete heads, than there is room for.

use std::time::Duration;

use tokio::task::JoinSet;

use crate::support::gateway::{Builder, Gateway};
use crate::support::provider::Provider;
use crate::support::wire::{Wire, get};

/// The beginning of a head, of some `length` bytes.
fn incomplete(length: usize) -> String {
    format!("GET /function/echo HTTP/1.1\r\nHost: g\r\nX-Pad: {}", "p".repeat(length))
}

/// Whether there is something to read on a connection, without waiting for it.
async fn has_answer(caller: &Wire) -> bool {
    let readable = tokio::time::timeout(Duration::from_millis(1), caller.readable()).await;
    readable.unwrap_or(false)
}

#[tokio::test]
async fn large_incomplete_heads_on_many_connections_have_one_budget() {
    const CONNECTIONS: usize = 1500;
    const BUDGET: u64 = 64 << 20;
    // A busy machine takes its time for 1.4 GiB, and no head is to be refused for that.
    const PATIENCE: Duration = Duration::from_secs(180);
    let provider = Provider::saying("hello");
    let gateway = Gateway::builder().provider(&provider).var("read_timeout", "10m").start().await;
    assert_eq!(gateway.get("/function/echo").await.status(), 200);
    let before = gateway.peak_memory();
    let mut sending = JoinSet::new();
    for _ in 0..CONNECTIONS {
        let address = gateway.address;
        sending.spawn(async move {
            let mut caller = Wire::connect(address).await;
            for piece in incomplete(1_000_000).as_bytes().chunks(32 << 10) {
                // What is refused may be closed.
                if caller.try_send(piece).await.is_err() {
                    break;
                }
            }
            caller
        });
    }
    let mut callers =
        tokio::time::timeout(PATIENCE, sending.join_all()).await.expect("all heads are sent");
    let grown = gateway.peak_memory() - before;
    // Buffers are larger than what is in them, and what is refused is freed when its task runs next. All heads
    // together are 1.4 GiB.
    assert!(grown < 5 * BUDGET, "{grown} bytes more");
    // Others are served meanwhile.
    assert_eq!(gateway.get("/function/echo").await.text(), "hello");
    let (mut refused, mut served) = (0, 0);
    for caller in &mut callers {
        if !has_answer(caller).await {
            let _ = caller.try_send("\r\n\r\n").await;
        }
        let answer = caller.answer().await;
        match answer.status() {
            200 => served += 1,
            503 => {
                assert!(answer.text().contains("max_head_memory"), "{answer}");
                assert_eq!(answer.header("connection"), Some("close"));
                refused += 1;
            }
            _ => panic!("{answer}"),
        }
    }
    assert!(served >= 30 && refused >= CONNECTIONS - 100, "{served} served, {refused} refused");
}

#[tokio::test]
async fn the_largest_incomplete_head_is_refused_first() {
    let provider = Provider::saying("hello");
    let gateway =
        Gateway::builder().provider(&provider).var("max_head_memory", 1 << 20).start().await;
    // Twice, since what was counted is to be free again.
    for _ in 0..2 {
        let sizes = [300_000, 600_000, 300_000, 20_000];
        let mut callers = Vec::new();
        for size in sizes {
            let mut caller = gateway.connect().await;
            caller.send(incomplete(size)).await;
            callers.push(caller);
        }
        assert_eq!(callers[1].answer().await.status(), 503);
        assert!(callers[1].closed().await.is_empty());
        for at in [0, 2, 3] {
            assert_eq!(callers[at].ask("\r\n\r\n").await.text(), "hello", "{at}");
            // The connection can be used further.
            assert_eq!(callers[at].get("/function/echo").await.text(), "hello", "{at}");
        }
    }
}

/// A gateway that accepts connections in the order in which they come: each of several threads has a queue of its own.
fn accepting_in_order(provider: &Provider) -> Builder {
    Gateway::builder().provider(provider).var("threads", "1")
}

#[tokio::test]
async fn the_connection_that_has_been_idle_longest_makes_room() {
    let mut provider = Provider::by_hand();
    let gateway = accepting_in_order(&provider).var("max_connections", "4").start().await;
    let mut busy = gateway.connect().await;
    busy.send(get("/function/slow")).await;
    let mut call = provider.call().await;
    // One that never says anything, and two that have.
    let mut silent = gateway.connect().await;
    let (mut second, mut third) = (gateway.connect().await, gateway.connect().await);
    assert_eq!(second.get("/_/healthz").await.status(), 200);
    assert_eq!(third.get("/_/healthz").await.status(), 200);

    let mut fourth = gateway.connect().await;
    assert_eq!(fourth.get("/_/healthz").await.status(), 200);
    assert!(silent.closed().await.is_empty());
    assert_eq!(third.get("/_/healthz").await.status(), 200);
    let mut fifth = gateway.connect().await;
    assert_eq!(fifth.get("/_/healthz").await.status(), 200);
    assert!(second.closed().await.is_empty());
    for caller in [&mut third, &mut fourth, &mut fifth] {
        assert_eq!(caller.get("/_/healthz").await.status(), 200);
    }
    call.answer(200, "done").await;
    assert_eq!(busy.answer().await.text(), "done");
}

#[tokio::test]
async fn beginnings_of_heads_do_not_lock_others_out() {
    let provider = Provider::saying("hello");
    let gateway = accepting_in_order(&provider).var("max_connections", "20").start().await;
    let mut slow = Vec::new();
    for _ in 0..20 {
        let mut caller = gateway.connect().await;
        caller.send("G").await;
        slow.push(caller);
    }
    assert_eq!(gateway.get("/function/echo").await.text(), "hello");
}

#[tokio::test]
async fn idle_connections_do_not_keep_a_scrape_out() {
    let provider = Provider::saying("hello");
    let gateway = Gateway::before(&provider).await;
    let mut idle = Vec::new();
    for _ in 0..300 {
        idle.push(Wire::connect(gateway.metrics_address).await);
    }
    let mut scraper = Wire::connect(gateway.metrics_address).await;
    assert_eq!(scraper.get("/metrics").await.status(), 200);
}
