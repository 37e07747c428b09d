//! Bodies pass as they come, in both directions; one that breaks off never looks whole.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::gateway::Gateway;
use crate::support::provider::Provider;
use crate::support::wire::get;
use crate::support::within;

/// Each chunk is sent only after the caller has seen the one before.
async fn passes_chunk_by_chunk(content_type: &str) {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut caller = gateway.connect().await;
    caller.send(get("/function/clock")).await;
    let mut call = provider.call().await;
    call.wire
        .send(format!(
            "HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nTransfer-Encoding: chunked\r\n\r\n"
        ))
        .await;
    let head = caller.head().await;
    assert_eq!((head.status(), head.header("content-type")), (200, Some(content_type)));
    for tick in 0..5 {
        call.wire.send_chunk(&format!("data: {tick}\n\n")).await;
        caller.until(&format!("data: {tick}\n\n")).await;
    }
    call.wire.send("0\r\n\r\n").await;
    caller.until("\r\n0\r\n\r\n").await;
    gateway.metrics_show("the call is counted", |m| m.calls("clock.fn", "200") == 1).await;
}

#[tokio::test]
async fn events_come_one_by_one() {
    passes_chunk_by_chunk("text/event-stream").await;
}

#[tokio::test]
async fn text_comes_as_it_is_written() {
    passes_chunk_by_chunk("text/plain").await;
}

#[tokio::test]
async fn json_comes_as_it_is_written() {
    passes_chunk_by_chunk("application/json").await;
}

#[tokio::test]
async fn a_request_streams_up_while_it_is_written() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut caller = gateway.connect().await;
    caller.send("POST /function/sink HTTP/1.1\r\nHost: g\r\nContent-Length: 10\r\n\r\nfirst").await;
    let mut call = provider.call().await;
    call.wire.until("first").await;
    caller.send("secon").await;
    call.wire.until("secon").await;
    call.wire.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!(caller.answer().await.status(), 200);
}

#[tokio::test]
async fn both_directions_stream_at_once() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut caller = gateway.connect().await;
    caller
        .send("POST /function/chat HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n")
        .await;
    caller.send_chunk("ask 0").await;
    let mut call = provider.call().await;
    call.wire.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    assert_eq!(caller.head().await.status(), 200);
    for turn in 0..5 {
        call.wire.until(&format!("ask {turn}")).await;
        call.wire.send_chunk(&format!("say {turn}")).await;
        caller.until(&format!("say {turn}")).await;
        caller.send_chunk(&format!("ask {}", turn + 1)).await;
    }
    caller.send("0\r\n\r\n").await;
    call.wire.until("0\r\n\r\n").await;
    call.wire.send("0\r\n\r\n").await;
    caller.until("\r\n0\r\n\r\n").await;
}

#[tokio::test]
async fn an_answer_that_does_not_wait_for_the_request_is_passed_on() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut caller = gateway.connect().await;
    caller
        .send("POST /function/picky HTTP/1.1\r\nHost: g\r\nContent-Length: 1000000\r\n\r\nfirst")
        .await;
    let mut call = provider.call().await;
    call.wire.until("first").await;
    call.wire.send("HTTP/1.1 413 X\r\nContent-Length: 5\r\nConnection: close\r\n\r\nlarge").await;
    drop(call);
    let answer = caller.answer().await;
    assert_eq!((answer.status(), answer.text()), (413, "large"));
}

#[tokio::test]
async fn an_answer_that_ends_with_its_connection_is_passed_on_whole() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut caller = gateway.connect().await;
    caller.send(get("/function/old")).await;
    let mut call = provider.call().await;
    call.wire.send("HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nall ").await;
    assert_eq!(caller.head().await.status(), 200);
    caller.until("all ").await;
    call.wire.send("of it").await;
    drop(call);
    caller.until("of it\r\n0\r\n\r\n").await;
}

#[tokio::test]
async fn a_caller_in_the_middle_of_writing_hears_an_early_answer() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut caller = gateway.connect().await;
    let head = "POST /function/picky HTTP/1.1\r\nHost: g\r\nContent-Length: 100000000\r\n\r\n";
    caller.send(head).await;
    let mut call = provider.call().await;
    call.wire.send("HTTP/1.1 413 X\r\nContent-Length: 5\r\nConnection: close\r\n\r\nlarge").await;
    drop(call);
    // The caller goes on until it is told to stop, as most do, and only then looks what was said.
    let piece = vec![b'x'; 64 << 10];
    while caller.try_send(&piece).await.is_ok() {}
    let answer = caller.answer().await;
    assert_eq!((answer.status(), answer.text()), (413, "large"));
}

#[tokio::test]
async fn interim_answers_are_not_taken_for_the_answer() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut caller = gateway.connect().await;
    caller.send(get("/function/hints")).await;
    let mut call = provider.call().await;
    call.wire.send("HTTP/1.1 100 Continue\r\n\r\n").await;
    call.wire.send("HTTP/1.1 103 Early Hints\r\nLink: </x>; rel=preload\r\n\r\n").await;
    call.answer(200, "final").await;
    let mut answer = caller.answer().await;
    while answer.status() < 200 {
        answer = caller.answer().await;
    }
    assert_eq!((answer.status(), answer.text()), (200, "final"));
}

#[tokio::test]
async fn a_request_goes_on_while_its_caller_reads_nothing_of_the_answer() {
    const SIZE: usize = 24 << 20;
    let provider = Provider::builder()
        .answering(|call| async move {
            // Answers on its own, whatever is read.
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\n\r\n");
            let (mut read, mut write) = call.wire.into_halves();
            let answer = async {
                write.write_all(head.as_bytes()).await.unwrap();
                write.write_all(&vec![b'a'; SIZE]).await.unwrap();
            };
            let body = async {
                let mut left = SIZE;
                let mut piece = vec![0; 64 << 10];
                while left > 0 {
                    left -= read.read(&mut piece).await.unwrap();
                }
            };
            tokio::join!(answer, body);
            None
        })
        .start();
    let gateway = Gateway::before(&provider).await;
    let mut caller = gateway.connect().await;
    let head = "POST /function/both HTTP/1.1\r\nHost: g\r\n";
    caller.send(format!("{head}Content-Length: {SIZE}\r\n\r\n")).await;
    // All of it before anything is read.
    within("the request is taken", caller.send(vec![b'q'; SIZE])).await;
    assert_eq!(caller.answer().await.body.len(), SIZE);
}
