//! Upstreams with addresses that accept no connection.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::timeout;

use crate::support::connection::post;
use crate::support::eventually;
use crate::support::gateway::Gateway;
use crate::support::provider::{Provider, respond_ok};

/// A port that responds to no attempt to connect, as that of an unreachable machine: its accept queue is full.
async fn unresponsive_port(address: SocketAddr) -> (SocketAddr, (TcpListener, Vec<TcpStream>)) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(address).unwrap();
    let listener = socket.listen(1).unwrap();
    let (address, mut waiting) = (listener.local_addr().unwrap(), Vec::new());
    let short = Duration::from_millis(300);
    while let Ok(stream) = timeout(short, TcpStream::connect(address)).await {
        waiting.push(stream.unwrap());
    }
    (address, (listener, waiting))
}

#[tokio::test]
async fn an_unreachable_address_is_skipped_for_every_method() {
    // The system chooses a port that is free on 127.0.0.1, which other tests use. 127.0.0.2 is used by this test alone.
    let (silent, _silent) = unresponsive_port(SocketAddr::from(([127, 0, 0, 1], 0))).await;
    let port = silent.port();
    let other = SocketAddr::from(([127, 0, 0, 2], port));
    let provider =
        Provider::builder().listen_on(other).handler(|call| respond_ok(call, "hello")).start();
    let hosts = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(hosts.path(), "127.0.0.1 provider.test\n127.0.0.2 provider.test\n").unwrap();
    let gateway = Gateway::builder()
        .var("functions_provider_url", format!("http://provider.test:{port}"))
        .var("connect_timeout", "200ms")
        .hosts_file(hosts.path())
        .start()
        .await;
    let start = Instant::now();
    for number in 1..=3 {
        let response = gateway.post("/function/echo", "body").await;
        assert_eq!((response.status(), response.text()), (200, "hello"));
        assert_eq!(provider.call_count(), number);
    }
    // The connect timeout without the setting.
    assert!(start.elapsed() < Duration::from_secs(10));
    eventually("the gateway is ready", async || gateway.is_ready().await).await;
}

#[tokio::test]
async fn connection_attempts_end_at_the_request_timeout() {
    let (address, _silent) = unresponsive_port(SocketAddr::from(([127, 0, 0, 1], 0))).await;
    let gateway = Gateway::builder()
        .var("functions_provider_url", format!("http://{address}"))
        .var("connect_timeout", "100ms")
        .var("upstream_timeout", "700ms")
        .start()
        .await;
    let mut client = gateway.connect().await;
    let start = Instant::now();
    client.send(post("/function/echo", "body")).await;
    let response = client.read_response().await;
    assert_eq!(response.status(), 504, "{response}");
    assert!(start.elapsed() >= Duration::from_millis(700));
}
