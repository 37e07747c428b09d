//! Upstream connections: they are reused, replaced when they have died, and never cause a non-idempotent request to be
//! sent twice.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use crate::support::connection::{Connection, get, post};
use crate::support::gateway::Gateway;
use crate::support::provider::{Invocation, Provider};

/// With one proxy thread there is one pool.
async fn start(provider: &Provider) -> Gateway {
    Gateway::builder().provider(provider).var("threads", "1").start().await
}

#[tokio::test]
async fn connections_are_reused() {
    let provider = Provider::replying("hello");
    let gateway = start(&provider).await;
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(gateway.connect().await);
    }
    for _ in 0..25 {
        for client in &mut clients {
            client.send(post("/function/echo", "x")).await;
        }
        for client in &mut clients {
            assert_eq!(client.read_response().await.text(), "hello");
        }
    }
    assert_eq!(provider.call_count(), 100);
    // At most one per client, and those for the gateway's own queries.
    assert!(provider.connection_count() <= 6, "{}", provider.connection_count());
}

#[tokio::test]
async fn without_idle_connections_none_is_kept() {
    let provider = Provider::replying("hello");
    let gateway = Gateway::builder().provider(&provider).var("max_idle_conns", "0").start().await;
    let mut client = gateway.connect().await;
    for _ in 0..5 {
        assert_eq!(client.get("/function/echo").await.status(), 200);
    }
    assert!(provider.connection_count() >= 5, "{}", provider.connection_count());
}

/// Runs calls against a provider that closes each connection some time after its first response, without announcing it.
async fn run_calls_against_closing_provider(
    delay: impl Fn(usize) -> Duration + Send + Sync + 'static,
) {
    let answered = AtomicUsize::new(0);
    let provider = Provider::builder()
        .handler(move |mut call| {
            let delay = delay(answered.fetch_add(1, SeqCst));
            async move {
                call.respond(200, "hello").await;
                tokio::spawn(async move {
                    tokio::time::sleep(delay).await;
                    drop(call);
                });
                None
            }
        })
        .start();
    let gateway = start(&provider).await;
    let mut client = gateway.connect().await;
    for _ in 0..200 {
        let response = client.get("/function/echo").await;
        assert_eq!(response.status(), 200, "{response}");
    }
    gateway
        .wait_for_metric("each call is counted once", |m| m.calls("echo.fn", "200") == 200)
        .await;
}

#[tokio::test]
async fn calls_succeed_when_the_upstream_closes_after_each_response() {
    run_calls_against_closing_provider(|_| Duration::ZERO).await;
}

#[tokio::test]
async fn calls_succeed_when_the_upstream_closes_with_a_delay() {
    run_calls_against_closing_provider(|number| Duration::from_micros(50 * (number as u64 % 40)))
        .await;
}

/// A provider that responds to the first request on each connection, and closes the connection after it has read the
/// second one.
fn closing_provider(seen: &Arc<AtomicUsize>) -> Provider {
    let seen = Arc::clone(seen);
    Provider::builder()
        .handler(move |mut call| {
            let seen = Arc::clone(&seen);
            async move {
                seen.fetch_add(1, SeqCst);
                call.respond(200, "hello").await;
                let Invocation { mut connection, .. } = call;
                let head = connection.try_read_head().await?;
                let _ = connection.read_body(&head).await;
                seen.fetch_add(1, SeqCst);
                None
            }
        })
        .start()
}

#[tokio::test]
async fn a_post_that_may_have_been_executed_is_not_retried() {
    let seen = Arc::default();
    let provider = closing_provider(&seen);
    let gateway = start(&provider).await;
    let mut client = gateway.connect().await;
    assert_eq!(client.exchange(post("/function/pay", "once")).await.status(), 200);
    let response = client.exchange(post("/function/pay", "once")).await;
    assert_eq!(response.status(), 502, "{response}");
    assert_eq!(seen.load(SeqCst), 2);
    assert_eq!(client.exchange(post("/function/pay", "")).await.status(), 200);
    let response = client.exchange(post("/function/pay", "")).await;
    assert_eq!(response.status(), 502, "a POST without a body is a POST: {response}");
    assert_eq!(seen.load(SeqCst), 4);
}

#[tokio::test]
async fn a_get_on_a_dead_connection_is_retried() {
    let seen = Arc::default();
    let provider = closing_provider(&seen);
    let gateway = start(&provider).await;
    let mut client = gateway.connect().await;
    assert_eq!(client.get("/function/echo").await.status(), 200);
    assert_eq!(client.get("/function/echo").await.status(), 200);
    assert_eq!(seen.load(SeqCst), 3);
}

#[tokio::test]
async fn a_get_is_retried_once() {
    let provider = Provider::builder().handler(async |_| None).start();
    let gateway = start(&provider).await;
    let mut client = gateway.connect().await;
    for _ in 0..5 {
        assert_eq!(client.get("/function/echo").await.status(), 502);
    }
    // None of these connections was reused.
    assert_eq!(provider.call_count(), 5);
}

#[tokio::test]
async fn posts_are_executed_once_when_connections_die() {
    let provider = Provider::builder()
        .handler(async |mut call| {
            let body = call.read_body().await.ok()?;
            call.connection.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
            // Half of the connections die just after the gateway has checked them in.
            (body[0] % 2 == 0).then_some(call.connection)
        })
        .start();
    let gateway = start(&provider).await;
    let mut client = gateway.connect().await;
    let mut answered = 0;
    for number in 0..200_u8 {
        let body = char::from(number % 26 + b'a').to_string().repeat(3);
        let status = client.exchange(post("/function/pay", &body)).await.status();
        assert!(matches!(status, 200 | 502), "{status}");
        answered += usize::from(status == 200);
    }
    let reached = provider.call_count();
    assert!(answered <= reached && reached <= 200, "{answered} answered, {reached} reached it");
    // A connection that was closed long before the next call costs no call.
    assert!(answered >= 100, "only {answered} answered");
}

#[tokio::test]
async fn a_connection_with_connection_close_is_not_reused() {
    let provider = Provider::builder()
        .handler(async |mut call| {
            call.read_body().await.ok()?;
            let response = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok";
            call.connection.send(response).await;
            // The connection stays open anyway.
            Some(call.connection)
        })
        .start();
    let gateway = start(&provider).await;
    let mut client = gateway.connect().await;
    for _ in 0..5 {
        let response = client.get("/function/echo").await;
        assert_eq!((response.text(), response.header("connection")), ("ok", None));
    }
    assert!(provider.connection_count() >= 5, "{}", provider.connection_count());
}

#[tokio::test]
async fn unsolicited_upstream_bytes_are_no_response() {
    let mut provider = Provider::manual();
    let gateway = start(&provider).await;
    let mut client = gateway.connect().await;
    client.send(get("/function/echo")).await;
    let mut call = provider.next_call().await;
    let stray = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstray";
    call.connection.send(format!("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfirst{stray}")).await;
    assert_eq!(client.read_response().await.text(), "first");
    client.send(get("/function/echo")).await;
    provider.reuse_connection(call);
    let mut call = provider.next_call().await;
    call.respond(200, "second").await;
    assert_eq!(client.read_response().await.text(), "second");
}

#[tokio::test]
async fn an_incompletely_sent_request_closes_its_connection() {
    let mut provider = Provider::manual();
    let gateway = start(&provider).await;
    let mut client: Connection = gateway.connect().await;
    client.send("POST /function/sink HTTP/1.1\r\nHost: g\r\nContent-Length: 10\r\n\r\nfirst").await;
    let mut call = provider.next_call().await;
    call.connection.read_until("first").await;
    // A complete response to an incomplete request: the connection is in the middle of a message.
    call.connection.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
    assert_eq!(client.read_response().await.text(), "ok");
    provider.reuse_connection(call);
    let mut other = gateway.connect().await;
    other.send(get("/function/echo")).await;
    let mut call = provider.next_call().await;
    assert_eq!(call.head.method(), "GET");
    call.respond(200, "fine").await;
    assert_eq!(other.read_response().await.text(), "fine");
}

#[tokio::test]
async fn a_request_that_meets_many_dead_connections_arrives_complete() {
    const DEAD: usize = 300;
    let all = Arc::new(tokio::sync::Barrier::new(DEAD));
    let provider = Provider::builder()
        .handler(move |mut call| {
            let all = Arc::clone(&all);
            async move {
                let body = call.read_body().await.ok()?;
                if body == b"warm" {
                    // Each call needs its own connection, which is closed after the response.
                    all.wait().await;
                    call.send_response(200, &body).await;
                    return None;
                }
                call.send_response(200, &body).await;
                Some(call.connection)
            }
        })
        .start();
    let gateway = start(&provider).await;
    let mut clients = Vec::new();
    for _ in 0..DEAD {
        let mut client = gateway.connect().await;
        client.send(post("/function/echo", "warm")).await;
        clients.push(client);
    }
    for client in &mut clients {
        assert_eq!(client.read_response().await.text(), "warm");
    }
    for client in clients.iter_mut().take(3) {
        let response = client.exchange(post("/function/echo", "precious")).await;
        assert_eq!((response.status(), response.text()), (200, "precious"));
    }
}

#[tokio::test]
async fn unsolicited_bytes_are_no_response() {
    let mut provider = Provider::manual();
    let gateway = start(&provider).await;
    // An incomplete response, and an interim one that a parser would skip.
    for stray in ["HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r", "HTTP/1.1 100 Continue\r\n\r\n"] {
        let mut client = gateway.connect().await;
        client.send(get("/function/echo")).await;
        let mut call = provider.next_call().await;
        call.respond(200, "first").await;
        assert_eq!(client.read_response().await.text(), "first");
        call.connection.send(stray).await;
        client.send(get("/function/echo")).await;
        // This call arrives on another connection.
        provider.next_call().await.respond(200, "second").await;
        assert_eq!(client.read_response().await.text(), "second");
        call.connection.read_to_close().await;
    }
}
