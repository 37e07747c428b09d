//! An upstream that is unavailable, or aborts a response: the client is informed, without the upstream's address.

use crate::support::connection::{BodyAborted, get};
use crate::support::gateway::Gateway;
use crate::support::provider::{Invocation, Provider};

const CHUNKED: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";

/// The provider sends `said` and then runs `ends`: the response must not look complete to the client.
async fn assert_seen_as_aborted(sent: &str, ends: impl AsyncFnOnce(Invocation)) {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    client.send(get("/function/frail")).await;
    let mut call = provider.next_call().await;
    call.connection.send(sent).await;
    let head = client.read_head().await;
    assert_eq!(head.status(), 200);
    ends(call).await;
    let BodyAborted(came) = client.read_body(&head).await.expect_err("looks whole");
    assert!(b"half".starts_with(&came), "{came:?}");
    gateway
        .wait_for_metric("the call is counted as 502", |m| m.calls("frail.fn", "502") == 1)
        .await;
    assert_eq!(gateway.metrics().await.calls("frail.fn", "200"), 0);
}

#[tokio::test]
async fn a_body_shorter_than_its_content_length_is_aborted() {
    assert_seen_as_aborted("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf", async |call| {
        drop(call)
    })
    .await;
}

#[tokio::test]
async fn a_reset_inside_a_body_of_known_length_aborts_the_response() {
    let sent = "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf";
    assert_seen_as_aborted(sent, async |call| call.connection.reset()).await;
}

#[tokio::test]
async fn a_body_that_ends_inside_a_chunk_is_aborted() {
    assert_seen_as_aborted(&format!("{CHUNKED}ff\r\nhalf"), async |call| drop(call)).await;
}

#[tokio::test]
async fn a_body_that_ends_between_two_chunks_is_aborted() {
    assert_seen_as_aborted(&format!("{CHUNKED}4\r\nhalf\r\n"), async |call| drop(call)).await;
}

#[tokio::test]
async fn a_body_with_invalid_chunks_is_aborted() {
    let ends = async |mut call: Invocation| call.connection.send("nonsense\r\n").await;
    assert_seen_as_aborted(&format!("{CHUNKED}4\r\nhalf\r\n"), ends).await;
}

#[tokio::test]
async fn event_stream_clients_receive_the_error_of_an_unreachable_upstream() {
    let provider = Provider::manual();
    let address = provider.address;
    drop(provider);
    let gateway =
        Gateway::builder().var("functions_provider_url", format!("http://{address}")).start().await;
    let request = "GET /function/clock HTTP/1.1\r\nHost: g\r\nAccept: text/event-stream\r\n\r\n";
    let response = gateway.connect().await.exchange(request).await;
    assert_eq!(response.status(), 502);
    assert!(response.header("content-type").unwrap().starts_with("text/plain"), "{response}");
    assert!(response.text().contains("connection refused"), "{response}");
    assert!(response.text().contains(response.header("x-call-id").unwrap()), "{response}");
    assert!(!response.to_string().contains(&address.port().to_string()), "{response}");
    gateway.wait_for_metric("the metric is updated", |m| m.calls("unknown", "502") == 1).await;
}

#[tokio::test]
async fn a_response_that_is_not_http_is_a_bad_gateway() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    client.send(get("/function/odd")).await;
    provider.next_call().await.connection.send("220 mail.example ESMTP\r\n\r\n").await;
    let response = client.read_response().await;
    assert_eq!(response.status(), 502);
    assert!(response.text().contains("not valid HTTP"), "{response}");
}

#[tokio::test]
async fn an_aborted_function_list_is_a_bad_gateway() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let gateway = Gateway::builder().var("functions_provider_url", url).start().await;
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let mut connection = crate::support::connection::Connection::new(tcp);
            if connection.try_read_head().await.is_some() {
                let _ = connection
                    .try_send("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n[{\"na")
                    .await;
            }
        }
    });
    let response = gateway.get("/system/functions").await;
    assert_eq!(response.status(), 502, "{response}");
    assert!(!gateway.is_ready().await);
}

#[tokio::test]
async fn an_error_response_to_head_is_counted_with_its_status() {
    let provider = Provider::manual();
    let address = provider.address;
    drop(provider);
    let gateway =
        Gateway::builder().var("functions_provider_url", format!("http://{address}")).start().await;
    let mut client = gateway.connect().await;
    client.send("HEAD /function/echo HTTP/1.1\r\nHost: g\r\n\r\n").await;
    assert_eq!(client.read_head().await.status(), 502);
    gateway
        .wait_for_metric("the metric is updated", |m| m.len() > 0 && m.text.contains("code=\""))
        .await;
    let metrics = gateway.metrics().await;
    assert_eq!((metrics.calls("unknown", "502"), metrics.calls("unknown", "499")), (1, 0));
    // The connection can be reused.
    assert_eq!(client.get("/_/healthz").await.status(), 200);
}
