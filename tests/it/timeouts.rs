//! Timeouts: what takes too long is aborted, whichever side causes the delay; what makes progress may continue.

use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpSocket, TcpStream};

use crate::support::connection::{get, post};
use crate::support::gateway::Gateway;
use crate::support::provider::{Provider, respond_ok};

const SSE: &str =
    "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";

#[tokio::test]
async fn a_function_that_does_not_respond_in_time_is_a_gateway_timeout() {
    let mut provider = Provider::manual();
    let gateway =
        Gateway::builder().provider(&provider).var("upstream_timeout", "300ms").start().await;
    let start = Instant::now();
    let mut client = gateway.connect().await;
    client.send(get("/function/slow")).await;
    let mut call = provider.next_call().await;
    let response = client.read_response().await;
    assert!(start.elapsed() >= Duration::from_millis(300));
    assert_eq!(response.status(), 504);
    assert!(response.text().contains(response.header("x-call-id").unwrap()), "{response}");
    // The function's connection is closed: its response is no longer needed.
    call.connection.read_to_close().await;
    gateway.wait_for_metric("the metric is updated", |m| m.calls("unknown", "504") == 1).await;
    assert_eq!(client.get("/_/healthz").await.status(), 200);
}

#[tokio::test]
async fn a_response_body_that_exceeds_the_timeout_is_aborted() {
    let mut provider = Provider::manual();
    let gateway =
        Gateway::builder().provider(&provider).var("upstream_timeout", "500ms").start().await;
    let mut client = gateway.connect().await;
    client.send(get("/function/slow")).await;
    let mut call = provider.next_call().await;
    call.connection
        .send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n")
        .await;
    let head = client.read_head().await;
    assert!(client.read_body(&head).await.is_err());
    call.connection.read_to_close().await;
    gateway.wait_for_metric("the metric is updated", |m| m.calls("slow.fn", "504") == 1).await;
}

#[tokio::test]
async fn event_streams_may_exceed_the_request_timeout() {
    let mut provider = Provider::manual();
    let gateway =
        Gateway::builder().provider(&provider).var("upstream_timeout", "2s").start().await;
    let mut client = gateway.connect().await;
    client.send(get("/function/clock")).await;
    let mut call = provider.next_call().await;
    call.connection.send(SSE).await;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(5) {
        call.connection.send_chunk("data: tick\n\n").await;
        client.read_until("data: tick\n\n").await;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    call.connection.send("0\r\n\r\n").await;
    client.read_until("\r\n0\r\n\r\n").await;
    gateway.wait_for_metric("the metric is updated", |m| m.calls("clock.fn", "200") == 1).await;
}

#[tokio::test]
async fn idle_event_streams_are_aborted() {
    let mut provider = Provider::manual();
    let gateway =
        Gateway::builder().provider(&provider).var("upstream_timeout", "500ms").start().await;
    let mut client = gateway.connect().await;
    client.send(get("/function/clock")).await;
    let mut call = provider.next_call().await;
    call.connection.send(SSE).await;
    call.connection.send_chunk("data: last\n\n").await;
    let head = client.read_head().await;
    assert!(client.read_body(&head).await.is_err());
    call.connection.read_to_close().await;
    gateway.wait_for_metric("the metric is updated", |m| m.calls("clock.fn", "504") == 1).await;
}

#[tokio::test]
async fn a_slow_upload_is_a_request_timeout() {
    let mut provider = Provider::manual();
    let gateway = Gateway::builder().provider(&provider).var("read_timeout", "300ms").start().await;
    let mut client = gateway.connect().await;
    client.send("POST /function/sink HTTP/1.1\r\nHost: g\r\nContent-Length: 10\r\n\r\nfirst").await;
    let mut call = provider.next_call().await;
    let response = client.read_response().await;
    assert_eq!(response.status(), 408, "{response}");
    client.read_to_close().await;
    call.connection.read_to_close().await;
    gateway.wait_for_metric("the metric is updated", |m| m.calls("unknown", "408") == 1).await;
}

#[tokio::test]
async fn a_slow_upload_to_the_api_is_a_request_timeout() {
    let provider = Provider::manual();
    let gateway = Gateway::builder().provider(&provider).var("read_timeout", "300ms").start().await;
    for target in ["/system/functions", "/system/scale-function/echo", "/system/alert"] {
        let mut client = gateway.connect().await;
        let head = format!("POST {target} HTTP/1.1\r\nHost: g\r\nContent-Length: 10\r\n\r\n{{");
        assert_eq!(client.exchange(head).await.status(), 408, "{target}");
    }
}

#[tokio::test]
async fn a_head_sent_byte_by_byte_does_not_extend_its_timeout() {
    let provider = Provider::manual();
    let gateway = Gateway::builder().provider(&provider).var("read_timeout", "500ms").start().await;
    let mut client = gateway.connect().await;
    let start = Instant::now();
    client.send("GET /function/echo HTTP/1.1\r\nHost: g\r\nX-Long: ").await;
    // Ends when a write fails: the gateway has closed the connection with unread data.
    while client.try_send("x").await.is_ok() {
        assert!(start.elapsed() < crate::support::DEADLINE);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(start.elapsed() >= Duration::from_millis(500));
    assert_eq!(provider.call_count(), 0);
}

#[tokio::test]
async fn the_head_timeout_applies_to_later_requests_on_a_connection() {
    let provider = Provider::replying("hello");
    let gateway = Gateway::builder().provider(&provider).var("read_timeout", "500ms").start().await;
    let mut client = gateway.connect().await;
    assert_eq!(client.get("/function/echo").await.text(), "hello");
    client.send("GET /function/echo HTTP/1.1\r\nHost:").await;
    client.read_to_close().await;
    assert_eq!(provider.call_count(), 1);
}

/// A port whose accept queue is full: further attempts to connect get no response.
async fn port_with_full_queue() -> (TcpListener, Vec<TcpStream>) {
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
async fn an_upstream_that_accepts_no_connection_is_a_gateway_timeout() {
    let (listener, _waiting) = port_with_full_queue().await;
    let gateway = Gateway::builder()
        .var("functions_provider_url", format!("http://{}", listener.local_addr().unwrap()))
        .var("upstream_timeout", "500ms")
        .start()
        .await;
    let start = Instant::now();
    let response = gateway.get("/function/echo").await;
    assert_eq!(response.status(), 504, "{response}");
    assert!(start.elapsed() >= Duration::from_millis(500));
    assert_eq!(gateway.get("/system/functions").await.status(), 504);
    let ready = gateway.get("/_/ready").await;
    assert_eq!(ready.status(), 503, "{ready}");
}

#[tokio::test]
async fn idle_connections_are_closed_before_and_after_their_first_request() {
    let provider = Provider::replying("hello");
    let gateway = Gateway::builder().provider(&provider).var("idle_timeout", "300ms").start().await;
    let start = Instant::now();
    assert!(gateway.connect().await.read_to_close().await.is_empty());
    assert!(start.elapsed() >= Duration::from_millis(300));
    let mut client = gateway.connect().await;
    assert_eq!(client.get("/function/echo").await.text(), "hello");
    assert!(client.read_to_close().await.is_empty());
}

/// A client with a small receive buffer, so that few bytes are between the gateway and the client.
async fn connect_with_small_buffer(gateway: &Gateway) -> crate::support::connection::Connection {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(16 << 10).unwrap();
    crate::support::connection::Connection::new(socket.connect(gateway.address).await.unwrap())
}

#[tokio::test]
async fn a_client_that_does_not_read_its_response_is_disconnected_and_needs_little_memory() {
    let mut provider = Provider::manual();
    let gateway =
        Gateway::builder().provider(&provider).var("write_timeout", "500ms").start().await;
    let before = gateway.peak_memory();
    let mut client = connect_with_small_buffer(&gateway).await;
    client.send(get("/function/firehose")).await;
    let mut call = provider.next_call().await;
    call.connection.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    let water = "x".repeat(64 << 10);
    let chunk = format!("{:x}\r\n{water}\r\n", water.len());
    // Ends when the gateway has closed its connection to the function.
    while call.connection.try_send(&chunk).await.is_ok() {}
    gateway.wait_for_metric("the metric is updated", |m| m.calls("firehose.fn", "499") == 1).await;
    let grown = gateway.peak_memory() - before;
    assert!(grown < 16 << 20, "{grown} bytes more");
}

#[tokio::test]
async fn the_idle_timeout_starts_at_the_end_of_the_last_request() {
    let provider = Provider::builder().handler(|call| respond_ok(call, "hello")).start();
    let gateway = Gateway::builder().provider(&provider).var("idle_timeout", "2s").start().await;
    let mut client = gateway.connect().await;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(4) {
        assert_eq!(client.exchange(post("/function/echo", "x")).await.text(), "hello");
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

#[tokio::test]
async fn a_client_that_reads_slowly_receives_the_whole_response() {
    // More than the sockets hold: the gateway buffers some of it while the client still reads.
    const LENGTH: usize = 6 << 20;
    let provider = Provider::builder()
        .handler(async |mut call| {
            call.respond(200, &"x".repeat(LENGTH)).await;
            Some(call.connection)
        })
        .start();
    let gateway = Gateway::builder().provider(&provider).var("idle_timeout", "300ms").start().await;
    let mut client = connect_with_small_buffer(&gateway).await;
    client.send(get("/function/large")).await;
    let head = client.read_head().await;
    assert_eq!(head.header("content-length"), Some(LENGTH.to_string().as_str()));
    for _ in 0..48 {
        tokio::time::sleep(Duration::from_millis(80)).await;
        client.discard(LENGTH / 48).await;
    }
}

#[tokio::test]
async fn a_hibernated_connection_continues_where_it_was() {
    let provider = Provider::replying("hello");
    let gateway = Gateway::in_front_of(&provider).await;
    let next = post("/function/echo", "body");
    let (begun, rest) = next.split_at(next.len() / 2);
    let mut plain = gateway.connect().await;
    assert_eq!(plain.get("/function/echo").await.text(), "hello");
    let mut half = gateway.connect().await;
    assert_eq!(half.exchange(get("/function/echo") + begun).await.text(), "hello");
    let mut silent = gateway.connect().await;
    // Long enough for connections to hibernate.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(plain.exchange(&next).await.text(), "hello");
    assert_eq!(half.exchange(rest).await.text(), "hello");
    assert_eq!(silent.exchange(&next).await.text(), "hello");
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert!(gateway.terminate().await.success());
    for client in [&mut plain, &mut half, &mut silent] {
        assert!(client.read_to_close().await.is_empty());
    }
}
