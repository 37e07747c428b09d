//! Upstreams with addresses that take no connection.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::timeout;

use crate::support::eventually;
use crate::support::gateway::Gateway;
use crate::support::provider::{Provider, always};
use crate::support::wire::post;

/// A port that answers no attempt to connect, as that of a machine which is cut off: its queue is full.
async fn silent(address: SocketAddr) -> (SocketAddr, (TcpListener, Vec<TcpStream>)) {
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
async fn an_address_that_is_cut_off_is_passed_over_whatever_the_method_is() {
    // The system chooses a port that is free on 127.0.0.1, which other tests use. 127.0.0.2 is used by this test alone.
    let (silent, _silent) = silent(SocketAddr::from(([127, 0, 0, 1], 0))).await;
    let port = silent.port();
    let other = SocketAddr::from(([127, 0, 0, 2], port));
    let provider = Provider::builder().at(other).answering(|call| always(call, "hello")).start();
    let hosts = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(hosts.path(), "127.0.0.1 provider.test\n127.0.0.2 provider.test\n").unwrap();
    let gateway = Gateway::builder()
        .var("functions_provider_url", format!("http://provider.test:{port}"))
        .var("connect_timeout", "200ms")
        .hosts(hosts.path())
        .start()
        .await;
    let start = Instant::now();
    for number in 1..=3 {
        let answer = gateway.post("/function/echo", "body").await;
        assert_eq!((answer.status(), answer.text()), (200, "hello"));
        assert_eq!(provider.calls(), number);
    }
    // The time after which an attempt was given up without the setting.
    assert!(start.elapsed() < Duration::from_secs(10));
    eventually("ready", async || gateway.is_ready().await).await;
}

#[tokio::test]
async fn attempts_to_connect_end_with_the_time_of_the_call() {
    let (address, _silent) = silent(SocketAddr::from(([127, 0, 0, 1], 0))).await;
    let gateway = Gateway::builder()
        .var("functions_provider_url", format!("http://{address}"))
        .var("connect_timeout", "100ms")
        .var("upstream_timeout", "700ms")
        .start()
        .await;
    let mut client = gateway.connect().await;
    let start = Instant::now();
    client.send(post("/function/echo", "body")).await;
    let answer = client.answer().await;
    assert_eq!(answer.status(), 504, "{answer}");
    assert!(start.elapsed() >= Duration::from_millis(700));
}
