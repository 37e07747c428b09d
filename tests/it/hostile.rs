//! Hostile requests and responses, as data in `tests/hostile/`. Each row has the incoming bytes and the expected
//! messages on both sides of the gateway. The README there explains the notation.

mod rows;
mod upstream;

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::hostile::rows::{End, Expected, Row, read_rows};
use crate::hostile::upstream::{Message, Upstream, messages};
use crate::support::gateway::Gateway;

/// Sent after a row whose connection must stay open. Its response shows that the connection is open and that no part of
/// the row was parsed as part of this request.
const AFTER: &[u8] = b"GET /function/after HTTP/1.1\r\nHost: g\r\nConnection: close\r\n\r\n";

/// Rows with an incomplete message are answered after `read_timeout`, well before this.
const DEADLINE: Duration = Duration::from_secs(4);

async fn start(upstream: &Upstream) -> Gateway {
    Gateway::builder()
        .var("functions_provider_url", upstream.url())
        .var("read_timeout", "1s")
        .var("upstream_timeout", "2s")
        .start()
        .await
}

/// Returns everything that the gateway sends after `bytes`, and whether it closed the connection.
async fn exchange(address: SocketAddr, bytes: &[u8]) -> (Vec<u8>, bool) {
    let mut tcp = TcpStream::connect(address).await.unwrap();
    tcp.set_nodelay(true).unwrap();
    let (mut reader, mut writer) = tcp.split();
    let mut received = Vec::new();
    let both = async {
        // A gateway that refuses a row may close before all of it is written.
        let write = async { drop(writer.write_all(bytes).await) };
        let read = async { drop(reader.read_to_end(&mut received).await) };
        tokio::join!(write, read);
    };
    let closed = tokio::time::timeout(DEADLINE, both).await.is_ok();
    (received, closed)
}

/// The difference between `got` and the expected messages.
fn difference(side: &str, expected: &[Expected], got: &[Message]) -> Option<String> {
    if expected.len() != got.len() {
        let starts: Vec<&str> = got.iter().map(|message| message.start.as_str()).collect();
        return Some(format!("{side} got {starts:?}, not {} messages", expected.len()));
    }
    expected.iter().zip(got).find_map(|(expected, got)| {
        expected.difference(got).map(|what| format!("{side}: {what} in {got:?}"))
    })
}

async fn check_request(gateway: &Gateway, upstream: &Upstream, row: &Row) -> Option<String> {
    upstream.clear();
    let mut bytes = row.sent.clone();
    if row.end == End::Open {
        bytes.extend_from_slice(AFTER);
    }
    let (received, closed) = exchange(gateway.address, &bytes).await;
    if !closed {
        return Some(format!("left open after {:?}", String::from_utf8_lossy(&received)));
    }
    let heads = bytes.starts_with(b"HEAD ");
    let mut responses = messages(&received, heads);
    let mut requests = upstream.received().await;
    // The gateway aborts such requests. Their end may be seen while the next rows run.
    if row.upstream.iter().all(|expected| !expected.partial) {
        requests.retain(|request| request.whole);
    } else if let Some(whole) = requests.iter().find(|request| request.whole && !is_after(request))
    {
        return Some(format!("the upstream got all of {whole:?}"));
    }
    if row.end == End::Open {
        let last = responses.pop().map(|response| response.status());
        if last != Some(200) {
            return Some(format!(
                "the next request got {last:?}: {}",
                String::from_utf8_lossy(&received)
            ));
        }
        let last = requests.pop().map(|request| request.start);
        if last.as_deref() != Some("GET /function/after HTTP/1.1") {
            return Some(format!("the next request arrived as {last:?}"));
        }
    }
    if row.upstream.iter().any(|expected| expected.partial) {
        return difference("the client", &row.client, &responses);
    }
    difference("the client", &row.client, &responses)
        .or_else(|| difference("the upstream", &row.upstream, &requests))
}

fn is_after(request: &Message) -> bool {
    request.start == "GET /function/after HTTP/1.1"
}

async fn check_response(gateway: &Gateway, upstream: &Upstream, row: &Row) -> Option<String> {
    upstream.clear();
    upstream.respond(&row.sent);
    let request = row
        .request
        .as_deref()
        .unwrap_or(b"GET /function/f HTTP/1.1\r\nHost: g\r\nConnection: close\r\n\r\n");
    let (received, closed) = exchange(gateway.address, request).await;
    if !closed {
        return Some(format!("left open after {:?}", String::from_utf8_lossy(&received)));
    }
    let responses = messages(&received, request.starts_with(b"HEAD "));
    difference("the client", &row.client, &responses)
}

/// Runs every row of a folder, and reports all that fail.
async fn play(
    folder: &str,
    least: usize,
    check: impl AsyncFn(&Gateway, &Upstream, &Row) -> Option<String>,
) {
    let upstream = Upstream::start().await;
    let gateway = start(&upstream).await;
    let rows = read_rows(folder);
    assert!(rows.len() >= least, "{folder} has {} rows", rows.len());
    let mut failed = Vec::new();
    for row in &rows {
        if let Some(what) = check(&gateway, &upstream, row).await {
            failed.push(format!("{}: {}: {what}", row.location, row.name));
        }
    }
    println!("{folder}: {} of {} rows hold", rows.len() - failed.len(), rows.len());
    assert!(failed.is_empty(), "{} of {} rows:\n{}", failed.len(), rows.len(), failed.join("\n"));
    assert_eq!(gateway.get("/_/healthz").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_requests_are_handled_as_the_rfcs_require() {
    play("requests", 300, check_request).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_responses_reach_clients_complete_or_as_errors() {
    play("responses", 100, check_response).await;
}
