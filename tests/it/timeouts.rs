//! What takes too long is ended, by whoever it is kept waiting; what goes on may go on.

use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpSocket, TcpStream};

use crate::support::gateway::Gateway;
use crate::support::provider::{Provider, always};
use crate::support::wire::{get, post};

const SSE: &str =
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";

#[tokio::test]
async fn a_function_that_does_not_answer_in_time_is_a_gateway_timeout() {
    let mut provider = Provider::by_hand();
    let gateway =
        Gateway::builder().provider(&provider).var("upstream_timeout", "300ms").start().await;
    let start = Instant::now();
    let mut caller = gateway.connect().await;
    caller.send(get("/function/slow")).await;
    let mut call = provider.call().await;
    let answer = caller.answer().await;
    assert!(start.elapsed() >= Duration::from_millis(300));
    assert_eq!(answer.status(), 504);
    assert!(answer.text().contains(answer.header("x-call-id").unwrap()), "{answer}");
    // The function is told as well: nobody waits for it.
    call.wire.closed().await;
    gateway.metrics_show("it is counted", |m| m.calls("unknown", "504") == 1).await;
    assert_eq!(caller.get("/_/healthz").await.status(), 200);
}

#[tokio::test]
async fn a_body_that_does_not_come_to_its_end_in_time_is_cut() {
    let mut provider = Provider::by_hand();
    let gateway =
        Gateway::builder().provider(&provider).var("upstream_timeout", "500ms").start().await;
    let mut caller = gateway.connect().await;
    caller.send(get("/function/slow")).await;
    let mut call = provider.call().await;
    call.wire.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n").await;
    let head = caller.head().await;
    assert!(caller.body(&head).await.is_err());
    call.wire.closed().await;
    gateway.metrics_show("it is counted", |m| m.calls("slow.fn", "504") == 1).await;
}

#[tokio::test]
async fn events_may_flow_for_longer_than_a_call_may_take() {
    let mut provider = Provider::by_hand();
    let gateway =
        Gateway::builder().provider(&provider).var("upstream_timeout", "2s").start().await;
    let mut caller = gateway.connect().await;
    caller.send(get("/function/clock")).await;
    let mut call = provider.call().await;
    call.wire.send(SSE).await;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(5) {
        call.wire.send_chunk("data: tick\n\n").await;
        caller.until("data: tick\n\n").await;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    call.wire.send("0\r\n\r\n").await;
    caller.until("\r\n0\r\n\r\n").await;
    gateway.metrics_show("it is counted", |m| m.calls("clock.fn", "200") == 1).await;
}

#[tokio::test]
async fn events_that_stop_coming_are_cut() {
    let mut provider = Provider::by_hand();
    let gateway =
        Gateway::builder().provider(&provider).var("upstream_timeout", "500ms").start().await;
    let mut caller = gateway.connect().await;
    caller.send(get("/function/clock")).await;
    let mut call = provider.call().await;
    call.wire.send(SSE).await;
    call.wire.send_chunk("data: last\n\n").await;
    let head = caller.head().await;
    assert!(caller.body(&head).await.is_err());
    call.wire.closed().await;
    gateway.metrics_show("it is counted", |m| m.calls("clock.fn", "504") == 1).await;
}

#[tokio::test]
async fn a_slow_upload_is_a_request_timeout() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::builder().provider(&provider).var("read_timeout", "300ms").start().await;
    let mut caller = gateway.connect().await;
    caller.send("POST /function/sink HTTP/1.1\r\nHost: g\r\nContent-Length: 10\r\n\r\nfirst").await;
    let mut call = provider.call().await;
    let answer = caller.answer().await;
    assert_eq!(answer.status(), 408, "{answer}");
    caller.closed().await;
    call.wire.closed().await;
    gateway.metrics_show("it is counted", |m| m.calls("unknown", "408") == 1).await;
}

#[tokio::test]
async fn a_slow_upload_to_the_api_is_a_request_timeout() {
    let provider = Provider::by_hand();
    let gateway = Gateway::builder().provider(&provider).var("read_timeout", "300ms").start().await;
    for target in ["/system/functions", "/system/scale-function/echo", "/system/alert"] {
        let mut caller = gateway.connect().await;
        let head = format!("POST {target} HTTP/1.1\r\nHost: g\r\nContent-Length: 10\r\n\r\n{{");
        assert_eq!(caller.ask(head).await.status(), 408, "{target}");
    }
}

#[tokio::test]
async fn a_head_that_comes_byte_by_byte_gains_no_time() {
    let provider = Provider::by_hand();
    let gateway = Gateway::builder().provider(&provider).var("read_timeout", "500ms").start().await;
    let mut caller = gateway.connect().await;
    let start = Instant::now();
    caller.send("GET /function/echo HTTP/1.1\r\nHost: g\r\nX-Long: ").await;
    // Ends when a write fails: the gateway has closed the connection, whatever was still to come.
    while caller.try_send("x").await.is_ok() {
        assert!(start.elapsed() < crate::support::DEADLINE);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(start.elapsed() >= Duration::from_millis(500));
    assert_eq!(provider.calls(), 0);
}

#[tokio::test]
async fn the_next_head_on_a_connection_may_not_dawdle_either() {
    let provider = Provider::saying("hello");
    let gateway = Gateway::builder().provider(&provider).var("read_timeout", "500ms").start().await;
    let mut caller = gateway.connect().await;
    assert_eq!(caller.get("/function/echo").await.text(), "hello");
    caller.send("GET /function/echo HTTP/1.1\r\nHost:").await;
    caller.closed().await;
    assert_eq!(provider.calls(), 1);
}

/// A port whose queue of connections is full: what more comes gets no reply.
async fn full() -> (TcpListener, Vec<TcpStream>) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let mut waiting = Vec::new();
    let address = listener.local_addr().unwrap();
    let patience = Duration::from_millis(300);
    while let Ok(connected) = tokio::time::timeout(patience, TcpStream::connect(address)).await {
        waiting.push(connected.unwrap());
    }
    (listener, waiting)
}

#[tokio::test]
async fn an_upstream_that_takes_no_connection_is_a_gateway_timeout() {
    let (listener, _waiting) = full().await;
    let gateway = Gateway::builder()
        .var("functions_provider_url", format!("http://{}", listener.local_addr().unwrap()))
        .var("upstream_timeout", "500ms")
        .start()
        .await;
    let start = Instant::now();
    let answer = gateway.get("/function/echo").await;
    assert_eq!(answer.status(), 504, "{answer}");
    assert!(start.elapsed() >= Duration::from_millis(500));
    assert_eq!(gateway.get("/system/functions").await.status(), 504);
    let ready = gateway.get("/_/ready").await;
    assert_eq!(ready.status(), 503, "{ready}");
}

#[tokio::test]
async fn an_idle_connection_is_closed_before_its_first_call_and_after_it() {
    let provider = Provider::saying("hello");
    let gateway = Gateway::builder().provider(&provider).var("idle_timeout", "300ms").start().await;
    let start = Instant::now();
    assert!(gateway.connect().await.closed().await.is_empty());
    assert!(start.elapsed() >= Duration::from_millis(300));
    let mut caller = gateway.connect().await;
    assert_eq!(caller.get("/function/echo").await.text(), "hello");
    assert!(caller.closed().await.is_empty());
}

/// A socket with small buffers, so that few bytes are between the gateway and what its caller reads.
async fn reads_little(gateway: &Gateway) -> crate::support::wire::Wire {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(16 << 10).unwrap();
    crate::support::wire::Wire::new(socket.connect(gateway.address).await.unwrap())
}

#[tokio::test]
async fn a_caller_that_does_not_take_its_answer_is_cut_and_costs_little_memory() {
    let mut provider = Provider::by_hand();
    let gateway =
        Gateway::builder().provider(&provider).var("write_timeout", "500ms").start().await;
    let before = gateway.peak_memory();
    let mut caller = reads_little(&gateway).await;
    caller.send(get("/function/firehose")).await;
    let mut call = provider.call().await;
    call.wire.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    let water = "x".repeat(64 << 10);
    let chunk = format!("{:x}\r\n{water}\r\n", water.len());
    // Ends when the gateway has closed its connection to the function.
    while call.wire.try_send(&chunk).await.is_ok() {}
    gateway.metrics_show("it is counted", |m| m.calls("firehose.fn", "499") == 1).await;
    let grown = gateway.peak_memory() - before;
    assert!(grown < 16 << 20, "{grown} bytes more");
}

#[tokio::test]
async fn a_connection_idles_from_the_end_of_its_last_call() {
    let provider = Provider::builder().answering(|call| always(call, "hello")).start();
    let gateway = Gateway::builder().provider(&provider).var("idle_timeout", "2s").start().await;
    let mut caller = gateway.connect().await;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(4) {
        assert_eq!(caller.ask(post("/function/echo", "x")).await.text(), "hello");
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

#[tokio::test]
async fn a_caller_that_takes_its_answer_slowly_gets_it_whole() {
    // More than sockets hold: some of it is in the gateway's hands while the caller still reads.
    const LENGTH: usize = 6 << 20;
    let provider = Provider::builder()
        .answering(async |mut call| {
            call.answer(200, &"x".repeat(LENGTH)).await;
            Some(call.wire)
        })
        .start();
    let gateway = Gateway::builder().provider(&provider).var("idle_timeout", "300ms").start().await;
    let mut caller = reads_little(&gateway).await;
    caller.send(get("/function/large")).await;
    let head = caller.head().await;
    assert_eq!(head.header("content-length"), Some(LENGTH.to_string().as_str()));
    for _ in 0..48 {
        tokio::time::sleep(Duration::from_millis(80)).await;
        caller.skip(LENGTH / 48).await;
    }
}

#[tokio::test]
async fn a_connection_that_has_rested_goes_on_where_it_was() {
    let provider = Provider::saying("hello");
    let gateway = Gateway::before(&provider).await;
    let next = post("/function/echo", "body");
    let (begun, rest) = next.split_at(next.len() / 2);
    let mut plain = gateway.connect().await;
    assert_eq!(plain.get("/function/echo").await.text(), "hello");
    let mut half = gateway.connect().await;
    assert_eq!(half.ask(get("/function/echo") + begun).await.text(), "hello");
    let mut silent = gateway.connect().await;
    // Long enough for connections to be put to rest.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(plain.ask(&next).await.text(), "hello");
    assert_eq!(half.ask(rest).await.text(), "hello");
    assert_eq!(silent.ask(&next).await.text(), "hello");
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert!(gateway.terminate().await.success());
    for caller in [&mut plain, &mut half, &mut silent] {
        assert!(caller.closed().await.is_empty());
    }
}
