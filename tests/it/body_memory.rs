//! Bodies pass through; they are not held.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use tokio::net::TcpSocket;

use crate::support::eventually;
use crate::support::gateway::Gateway;
use crate::support::provider::{Call, Provider};
use crate::support::wire::{Wire, get, post};

#[tokio::test]
async fn large_bodies_pass_without_being_held() {
    const LENGTH: usize = 64 << 20;
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut caller = gateway.connect().await;
    // The first call is not counted: it brings code into memory.
    caller.send(post("/function/copy", "x")).await;
    let mut call = provider.call().await;
    call.answer(200, "x").await;
    provider.keep(call);
    caller.answer().await;
    let before = gateway.peak_memory();
    let head = format!("HTTP/1.1\r\nHost: g\r\nContent-Length: {LENGTH}\r\n\r\n");
    caller.send(format!("POST /function/copy {head}")).await;
    let mut call = provider.call().await;
    let piece = vec![b'x'; 256 << 10];

    let up = async {
        for _ in 0..LENGTH / piece.len() {
            caller.send(&piece).await;
        }
    };
    tokio::join!(up, call.wire.skip(LENGTH));
    let down = async {
        call.wire.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {LENGTH}\r\n\r\n")).await;
        for _ in 0..LENGTH / piece.len() {
            call.wire.send(&piece).await;
        }
    };
    let taken = async {
        assert_eq!(caller.head().await.status(), 200);
        caller.skip(LENGTH).await;
    };
    tokio::join!(down, taken);
    let grown = gateway.peak_memory() - before;
    assert!(grown < 4 << 20, "{grown} bytes more");
    gateway.metrics_show("counted", |m| m.calls("copy.fn", "200") == 2).await;
}

/// Says more and more, in pieces of every size, until none of it has been taken for a while.
async fn talk(call: &mut Call) {
    call.wire.send("HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n").await;
    let piece = vec![b'x'; 1 << 20];
    for length in (1..piece.len()).step_by(997).cycle() {
        let sent = call.wire.try_send(&piece[..length]);
        if tokio::time::timeout(Duration::from_millis(500), sent).await.is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn callers_who_take_nothing_cost_little_each() {
    const CALLERS: usize = 20;
    let stalled = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&stalled);
    let provider = Provider::builder()
        .answering(move |mut call| {
            let counted = Arc::clone(&counted);
            async move {
                talk(&mut call).await;
                counted.fetch_add(1, SeqCst);
                std::future::pending().await
            }
        })
        .start();
    let gateway = Gateway::before(&provider).await;
    let before = gateway.peak_memory();
    let mut callers = Vec::new();
    for _ in 0..CALLERS {
        // What this socket does not hold, the gateway must hold, or leave with the provider.
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(16 << 10).unwrap();
        let mut caller = Wire::new(socket.connect(gateway.address).await.unwrap());
        caller.send(get("/function/firehose")).await;
        callers.push(caller);
    }
    eventually("all have stalled", async || stalled.load(SeqCst) == CALLERS).await;
    let grown = (gateway.peak_memory() - before) / CALLERS as u64;
    assert!(grown < 2 << 20, "{grown} bytes for each caller");
}
