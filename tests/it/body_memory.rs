//! Bodies are streamed, not buffered.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use tokio::net::TcpSocket;

use crate::support::connection::{Connection, get, post};
use crate::support::eventually;
use crate::support::gateway::Gateway;
use crate::support::provider::{Invocation, Provider};

#[tokio::test]
async fn large_bodies_are_not_buffered() {
    const LENGTH: usize = 64 << 20;
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    // The first call is not measured: it loads code into memory.
    client.send(post("/function/copy", "x")).await;
    let mut call = provider.next_call().await;
    call.respond(200, "x").await;
    provider.reuse_connection(call);
    client.read_response().await;
    let before = gateway.peak_memory();
    let head = format!("HTTP/1.1\r\nHost: g\r\nContent-Length: {LENGTH}\r\n\r\n");
    client.send(format!("POST /function/copy {head}")).await;
    let mut call = provider.next_call().await;
    let piece = vec![b'x'; 256 << 10];

    let up = async {
        for _ in 0..LENGTH / piece.len() {
            client.send(&piece).await;
        }
    };
    tokio::join!(up, call.connection.discard(LENGTH));
    let down = async {
        call.connection.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {LENGTH}\r\n\r\n")).await;
        for _ in 0..LENGTH / piece.len() {
            call.connection.send(&piece).await;
        }
    };
    let taken = async {
        assert_eq!(client.read_head().await.status(), 200);
        client.discard(LENGTH).await;
    };
    tokio::join!(down, taken);
    let grown = gateway.peak_memory() - before;
    assert!(grown < 4 << 20, "{grown} bytes more");
    gateway.wait_for_metric("the calls are counted", |m| m.calls("copy.fn", "200") == 2).await;
}

/// Sends data in pieces of varying sizes until the peer has accepted none for a while.
async fn send_until_stalled(call: &mut Invocation) {
    call.connection.send("HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n").await;
    let piece = vec![b'x'; 1 << 20];
    for length in (1..piece.len()).step_by(997).cycle() {
        let sent = call.connection.try_send(&piece[..length]);
        if tokio::time::timeout(Duration::from_millis(500), sent).await.is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn clients_that_do_not_read_need_little_memory() {
    const CALLERS: usize = 20;
    let stalled = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&stalled);
    let provider = Provider::builder()
        .handler(move |mut call| {
            let counted = Arc::clone(&counted);
            async move {
                send_until_stalled(&mut call).await;
                counted.fetch_add(1, SeqCst);
                std::future::pending().await
            }
        })
        .start();
    let gateway = Gateway::in_front_of(&provider).await;
    let before = gateway.peak_memory();
    let mut clients = Vec::new();
    for _ in 0..CALLERS {
        // A small receive buffer: what it does not hold, the gateway would have to buffer, or leave unread.
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(16 << 10).unwrap();
        let mut client = Connection::new(socket.connect(gateway.address).await.unwrap());
        client.send(get("/function/firehose")).await;
        clients.push(client);
    }
    eventually("all have stalled", async || stalled.load(SeqCst) == CALLERS).await;
    let grown = (gateway.peak_memory() - before) / CALLERS as u64;
    assert!(grown < 2 << 20, "{grown} bytes for each caller");
}
