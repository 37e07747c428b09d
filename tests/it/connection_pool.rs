//! Connections to the upstream: used again, replaced when they have died, and never a reason to send twice what must
//! be done once.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use crate::support::gateway::Gateway;
use crate::support::provider::{Call, Provider};
use crate::support::wire::{Wire, get, post};

/// With one thread that carries calls there is one pool.
async fn start(provider: &Provider) -> Gateway {
    Gateway::builder().provider(provider).var("threads", "1").start().await
}

#[tokio::test]
async fn connections_are_used_again() {
    let provider = Provider::saying("hello");
    let gateway = start(&provider).await;
    let mut callers = Vec::new();
    for _ in 0..4 {
        callers.push(gateway.connect().await);
    }
    for _ in 0..25 {
        for caller in &mut callers {
            caller.send(post("/function/echo", "x")).await;
        }
        for caller in &mut callers {
            assert_eq!(caller.answer().await.text(), "hello");
        }
    }
    assert_eq!(provider.calls(), 100);
    // One for each caller at most, and what the gateway's own questions need.
    assert!(provider.connections() <= 6, "{}", provider.connections());
}

#[tokio::test]
async fn no_connection_is_kept_when_none_may_be() {
    let provider = Provider::saying("hello");
    let gateway = Gateway::builder().provider(&provider).var("max_idle_conns", "0").start().await;
    let mut caller = gateway.connect().await;
    for _ in 0..5 {
        assert_eq!(caller.get("/function/echo").await.status(), 200);
    }
    assert!(provider.connections() >= 5, "{}", provider.connections());
}

/// A provider that closes each connection some time after its first answer, and does not say so.
async fn survives_silent_closing(delay: impl Fn(usize) -> Duration + Send + Sync + 'static) {
    let answered = AtomicUsize::new(0);
    let provider = Provider::builder()
        .answering(move |mut call| {
            let delay = delay(answered.fetch_add(1, SeqCst));
            async move {
                call.answer(200, "hello").await;
                tokio::spawn(async move {
                    tokio::time::sleep(delay).await;
                    drop(call);
                });
                None
            }
        })
        .start();
    let gateway = start(&provider).await;
    let mut caller = gateway.connect().await;
    for _ in 0..200 {
        let answer = caller.get("/function/echo").await;
        assert_eq!(answer.status(), 200, "{answer}");
    }
    gateway.metrics_show("each is counted once", |m| m.calls("echo.fn", "200") == 200).await;
}

#[tokio::test]
async fn calls_go_on_when_the_upstream_closes_behind_each_answer() {
    survives_silent_closing(|_| Duration::ZERO).await;
}

#[tokio::test]
async fn calls_go_on_when_the_upstream_closes_a_little_later() {
    survives_silent_closing(|number| Duration::from_micros(50 * (number as u64 % 40))).await;
}

/// A provider that answers the first call on each connection, and closes at the second, after it has read it whole.
fn fickle(seen: &Arc<AtomicUsize>) -> Provider {
    let seen = Arc::clone(seen);
    Provider::builder()
        .answering(move |mut call| {
            let seen = Arc::clone(&seen);
            async move {
                seen.fetch_add(1, SeqCst);
                call.answer(200, "hello").await;
                let Call { mut wire, .. } = call;
                let head = wire.try_head().await?;
                let _ = wire.body(&head).await;
                seen.fetch_add(1, SeqCst);
                None
            }
        })
        .start()
}

#[tokio::test]
async fn a_post_that_may_have_been_carried_out_is_not_sent_again() {
    let seen = Arc::default();
    let provider = fickle(&seen);
    let gateway = start(&provider).await;
    let mut caller = gateway.connect().await;
    assert_eq!(caller.ask(post("/function/pay", "once")).await.status(), 200);
    let answer = caller.ask(post("/function/pay", "once")).await;
    assert_eq!(answer.status(), 502, "{answer}");
    assert_eq!(seen.load(SeqCst), 2);
    assert_eq!(caller.ask(post("/function/pay", "")).await.status(), 200);
    let answer = caller.ask(post("/function/pay", "")).await;
    assert_eq!(answer.status(), 502, "a POST without a body is a POST: {answer}");
    assert_eq!(seen.load(SeqCst), 4);
}

#[tokio::test]
async fn a_get_on_a_connection_that_died_goes_another_way() {
    let seen = Arc::default();
    let provider = fickle(&seen);
    let gateway = start(&provider).await;
    let mut caller = gateway.connect().await;
    assert_eq!(caller.get("/function/echo").await.status(), 200);
    assert_eq!(caller.get("/function/echo").await.status(), 200);
    assert_eq!(seen.load(SeqCst), 3);
}

#[tokio::test]
async fn a_get_is_sent_twice_at_most() {
    let provider = Provider::builder().answering(async |_| None).start();
    let gateway = start(&provider).await;
    let mut caller = gateway.connect().await;
    for _ in 0..5 {
        assert_eq!(caller.get("/function/echo").await.status(), 502);
    }
    // None of these connections was an old one.
    assert_eq!(provider.calls(), 5);
}

#[tokio::test]
async fn posts_are_carried_out_once_however_connections_die() {
    let provider = Provider::builder()
        .answering(async |mut call| {
            let body = call.body().await.ok()?;
            call.wire.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
            // Half of the connections die when the gateway has just taken them back.
            (body[0] % 2 == 0).then_some(call.wire)
        })
        .start();
    let gateway = start(&provider).await;
    let mut caller = gateway.connect().await;
    let mut answered = 0;
    for number in 0..200_u8 {
        let body = char::from(number % 26 + b'a').to_string().repeat(3);
        let status = caller.ask(post("/function/pay", &body)).await.status();
        assert!(matches!(status, 200 | 502), "{status}");
        answered += usize::from(status == 200);
    }
    let reached = provider.calls();
    assert!(answered <= reached && reached <= 200, "{answered} answered, {reached} reached it");
    // A connection that was closed long before the next call costs none.
    assert!(answered >= 100, "only {answered} answered");
}

#[tokio::test]
async fn a_connection_that_the_upstream_calls_closed_is_not_used_again() {
    let provider = Provider::builder()
        .answering(async |mut call| {
            call.body().await.ok()?;
            let answer = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok";
            call.wire.send(answer).await;
            // And yet it stays open.
            Some(call.wire)
        })
        .start();
    let gateway = start(&provider).await;
    let mut caller = gateway.connect().await;
    for _ in 0..5 {
        let answer = caller.get("/function/echo").await;
        assert_eq!((answer.text(), answer.header("connection")), ("ok", None));
    }
    assert!(provider.connections() >= 5, "{}", provider.connections());
}

#[tokio::test]
async fn what_an_upstream_says_unasked_is_nobodys_answer() {
    let mut provider = Provider::by_hand();
    let gateway = start(&provider).await;
    let mut caller = gateway.connect().await;
    caller.send(get("/function/echo")).await;
    let mut call = provider.call().await;
    let stray = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstray";
    call.wire.send(format!("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfirst{stray}")).await;
    assert_eq!(caller.answer().await.text(), "first");
    caller.send(get("/function/echo")).await;
    provider.keep(call);
    let mut call = provider.call().await;
    call.answer(200, "second").await;
    assert_eq!(caller.answer().await.text(), "second");
}

#[tokio::test]
async fn a_request_left_half_sent_spoils_no_connection() {
    let mut provider = Provider::by_hand();
    let gateway = start(&provider).await;
    let mut caller: Wire = gateway.connect().await;
    caller.send("POST /function/sink HTTP/1.1\r\nHost: g\r\nContent-Length: 10\r\n\r\nfirst").await;
    let mut call = provider.call().await;
    call.wire.until("first").await;
    // An answer, whole, while the request is not: this connection is in the middle of a message.
    call.wire.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
    assert_eq!(caller.answer().await.text(), "ok");
    provider.keep(call);
    let mut other = gateway.connect().await;
    other.send(get("/function/echo")).await;
    let mut call = provider.call().await;
    assert_eq!(call.head.method(), "GET");
    call.answer(200, "fine").await;
    assert_eq!(other.answer().await.text(), "fine");
}

#[tokio::test]
async fn a_call_that_meets_many_dead_connections_arrives_whole() {
    const DEAD: usize = 300;
    let all = Arc::new(tokio::sync::Barrier::new(DEAD));
    let provider = Provider::builder()
        .answering(move |mut call| {
            let all = Arc::clone(&all);
            async move {
                let body = call.body().await.ok()?;
                if body == b"warm" {
                    // So that each has a connection of its own; closed behind the answer.
                    all.wait().await;
                    call.answer_with(200, &body).await;
                    return None;
                }
                call.answer_with(200, &body).await;
                Some(call.wire)
            }
        })
        .start();
    let gateway = start(&provider).await;
    let mut callers = Vec::new();
    for _ in 0..DEAD {
        let mut caller = gateway.connect().await;
        caller.send(post("/function/echo", "warm")).await;
        callers.push(caller);
    }
    for caller in &mut callers {
        assert_eq!(caller.answer().await.text(), "warm");
    }
    for caller in callers.iter_mut().take(3) {
        let answer = caller.ask(post("/function/echo", "precious")).await;
        assert_eq!((answer.status(), answer.text()), (200, "precious"));
    }
}

#[tokio::test]
async fn what_is_said_unasked_is_nobodys_answer() {
    let mut provider = Provider::by_hand();
    let gateway = start(&provider).await;
    // Half an answer, and one that would be skipped.
    for stray in ["HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r", "HTTP/1.1 100 Continue\r\n\r\n"] {
        let mut caller = gateway.connect().await;
        caller.send(get("/function/echo")).await;
        let mut call = provider.call().await;
        call.answer(200, "first").await;
        assert_eq!(caller.answer().await.text(), "first");
        call.wire.send(stray).await;
        caller.send(get("/function/echo")).await;
        // It comes on another connection.
        provider.call().await.answer(200, "second").await;
        assert_eq!(caller.answer().await.text(), "second");
        call.wire.closed().await;
    }
}
