//! Bodies are streamed in both directions; an aborted one never looks complete.

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::connection::get;
use crate::support::gateway::Gateway;
use crate::support::provider::Provider;
use crate::support::within;

/// Each chunk is sent only after the client has received the one before.
async fn assert_streams_chunks(content_type: &str) {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    client.send(get("/function/clock")).await;
    let mut call = provider.next_call().await;
    call.connection
        .send(format!(
            "HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nTransfer-Encoding: chunked\r\n\r\n"
        ))
        .await;
    let head = client.read_head().await;
    assert_eq!((head.status(), head.header("content-type")), (200, Some(content_type)));
    for tick in 0..5 {
        call.connection.send_chunk(&format!("data: {tick}\n\n")).await;
        client.read_until(&format!("data: {tick}\n\n")).await;
    }
    call.connection.send("0\r\n\r\n").await;
    client.read_until("\r\n0\r\n\r\n").await;
    gateway.wait_for_metric("the call is counted", |m| m.calls("clock.fn", "200") == 1).await;
}

#[tokio::test]
async fn events_are_forwarded_one_by_one() {
    assert_streams_chunks("text/event-stream").await;
}

#[tokio::test]
async fn text_is_forwarded_as_it_is_written() {
    assert_streams_chunks("text/plain").await;
}

#[tokio::test]
async fn json_is_forwarded_as_it_is_written() {
    assert_streams_chunks("application/json").await;
}

#[tokio::test]
async fn a_request_is_streamed_while_it_is_written() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    client.send("POST /function/sink HTTP/1.1\r\nHost: g\r\nContent-Length: 10\r\n\r\nfirst").await;
    let mut call = provider.next_call().await;
    call.connection.read_until("first").await;
    client.send("secon").await;
    call.connection.read_until("secon").await;
    call.connection.send("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!(client.read_response().await.status(), 200);
}

#[tokio::test]
async fn both_directions_are_streamed_simultaneously() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    client
        .send("POST /function/chat HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n")
        .await;
    client.send_chunk("ask 0").await;
    let mut call = provider.next_call().await;
    call.connection.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    assert_eq!(client.read_head().await.status(), 200);
    for turn in 0..5 {
        call.connection.read_until(&format!("ask {turn}")).await;
        call.connection.send_chunk(&format!("say {turn}")).await;
        client.read_until(&format!("say {turn}")).await;
        client.send_chunk(&format!("ask {}", turn + 1)).await;
    }
    client.send("0\r\n\r\n").await;
    call.connection.read_until("0\r\n\r\n").await;
    call.connection.send("0\r\n\r\n").await;
    client.read_until("\r\n0\r\n\r\n").await;
}

#[tokio::test]
async fn a_response_before_the_end_of_the_request_is_forwarded() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    client
        .send("POST /function/picky HTTP/1.1\r\nHost: g\r\nContent-Length: 1000000\r\n\r\nfirst")
        .await;
    let mut call = provider.next_call().await;
    call.connection.read_until("first").await;
    call.connection
        .send("HTTP/1.1 413 X\r\nContent-Length: 5\r\nConnection: close\r\n\r\nlarge")
        .await;
    drop(call);
    let response = client.read_response().await;
    assert_eq!((response.status(), response.text()), (413, "large"));
}

#[tokio::test]
async fn a_response_that_ends_with_its_connection_is_forwarded_completely() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    client.send(get("/function/old")).await;
    let mut call = provider.next_call().await;
    call.connection.send("HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\nall ").await;
    assert_eq!(client.read_head().await.status(), 200);
    client.read_until("all ").await;
    call.connection.send("of it").await;
    drop(call);
    client.read_until("of it\r\n0\r\n\r\n").await;
}

#[tokio::test]
async fn a_client_that_is_sending_receives_an_early_response() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    let head = "POST /function/picky HTTP/1.1\r\nHost: g\r\nContent-Length: 100000000\r\n\r\n";
    client.send(head).await;
    let mut call = provider.next_call().await;
    call.connection
        .send("HTTP/1.1 413 X\r\nContent-Length: 5\r\nConnection: close\r\n\r\nlarge")
        .await;
    drop(call);
    // Like most clients, this one sends until it is told to stop, and only then reads the response.
    let piece = vec![b'x'; 64 << 10];
    while client.try_send(&piece).await.is_ok() {}
    let response = client.read_response().await;
    assert_eq!((response.status(), response.text()), (413, "large"));
}

#[tokio::test]
async fn interim_responses_are_not_the_final_response() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    client.send(get("/function/hints")).await;
    let mut call = provider.next_call().await;
    call.connection.send("HTTP/1.1 100 Continue\r\n\r\n").await;
    call.connection.send("HTTP/1.1 103 Early Hints\r\nLink: </x>; rel=preload\r\n\r\n").await;
    call.respond(200, "final").await;
    let mut response = client.read_response().await;
    while response.status() < 200 {
        response = client.read_response().await;
    }
    assert_eq!((response.status(), response.text()), (200, "final"));
}

#[tokio::test]
async fn a_request_continues_while_its_client_does_not_read_the_response() {
    const SIZE: usize = 24 << 20;
    let provider = Provider::builder()
        .handler(|call| async move {
            // Responds independently of the request.
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\n\r\n");
            let (mut read, mut write) = call.connection.into_halves();
            let response = async {
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
            tokio::join!(response, body);
            None
        })
        .start();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    let head = "POST /function/both HTTP/1.1\r\nHost: g\r\n";
    client.send(format!("{head}Content-Length: {SIZE}\r\n\r\n")).await;
    // The request is sent completely before the client reads anything.
    within("the request is read", client.send(vec![b'q'; SIZE])).await;
    assert_eq!(client.read_response().await.body.len(), SIZE);
}
