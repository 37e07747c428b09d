//! An upstream that is away, or breaks off: the caller learns of it, and nothing of where the upstream is.

use crate::support::gateway::Gateway;
use crate::support::provider::{Call, Provider};
use crate::support::wire::{BrokenOff, get};

const CHUNKED: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";

/// The provider says `said` and then `ends`: the caller's transfer must not look whole.
async fn is_seen_as_broken(said: &str, ends: impl AsyncFnOnce(Call)) {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut caller = gateway.connect().await;
    caller.send(get("/function/frail")).await;
    let mut call = provider.call().await;
    call.wire.send(said).await;
    let head = caller.head().await;
    assert_eq!(head.status(), 200);
    ends(call).await;
    let BrokenOff(came) = caller.body(&head).await.expect_err("looks whole");
    assert!(b"half".starts_with(&came), "{came:?}");
    gateway.metrics_show("it is counted as 502", |m| m.calls("frail.fn", "502") == 1).await;
    assert_eq!(gateway.metrics().await.calls("frail.fn", "200"), 0);
}

#[tokio::test]
async fn a_body_shorter_than_its_length_breaks_off() {
    is_seen_as_broken("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf", async |call| {
        drop(call)
    })
    .await;
}

#[tokio::test]
async fn a_body_of_known_length_that_is_reset_breaks_off() {
    let said = "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf";
    is_seen_as_broken(said, async |call| call.wire.reset()).await;
}

#[tokio::test]
async fn a_body_that_ends_inside_a_chunk_breaks_off() {
    is_seen_as_broken(&format!("{CHUNKED}ff\r\nhalf"), async |call| drop(call)).await;
}

#[tokio::test]
async fn a_body_that_ends_between_two_chunks_breaks_off() {
    is_seen_as_broken(&format!("{CHUNKED}4\r\nhalf\r\n"), async |call| drop(call)).await;
}

#[tokio::test]
async fn a_body_whose_chunks_are_nonsense_breaks_off() {
    let ends = async |mut call: Call| call.wire.send("nonsense\r\n").await;
    is_seen_as_broken(&format!("{CHUNKED}4\r\nhalf\r\n"), ends).await;
}

#[tokio::test]
async fn a_dead_upstream_is_explained_to_those_who_want_events_too() {
    let provider = Provider::by_hand();
    let address = provider.address;
    drop(provider);
    let gateway =
        Gateway::builder().var("functions_provider_url", format!("http://{address}")).start().await;
    let request = "GET /function/clock HTTP/1.1\r\nHost: g\r\nAccept: text/event-stream\r\n\r\n";
    let answer = gateway.connect().await.ask(request).await;
    assert_eq!(answer.status(), 502);
    assert!(answer.header("content-type").unwrap().starts_with("text/plain"), "{answer}");
    assert!(answer.text().contains("connection refused"), "{answer}");
    assert!(answer.text().contains(answer.header("x-call-id").unwrap()), "{answer}");
    assert!(!answer.to_string().contains(&address.port().to_string()), "{answer}");
    gateway.metrics_show("it is counted", |m| m.calls("unknown", "502") == 1).await;
}

#[tokio::test]
async fn an_answer_that_is_not_http_is_a_bad_gateway() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut caller = gateway.connect().await;
    caller.send(get("/function/odd")).await;
    provider.call().await.wire.send("220 mail.example ESMTP\r\n\r\n").await;
    let answer = caller.answer().await;
    assert_eq!(answer.status(), 502);
    assert!(answer.text().contains("not valid HTTP"), "{answer}");
}

#[tokio::test]
async fn a_list_that_breaks_off_is_a_bad_gateway() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let gateway = Gateway::builder().var("functions_provider_url", url).start().await;
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let mut wire = crate::support::wire::Wire::new(tcp);
            if wire.try_head().await.is_some() {
                let _ = wire.try_send("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n[{\"na").await;
            }
        }
    });
    let answer = gateway.get("/system/functions").await;
    assert_eq!(answer.status(), 502, "{answer}");
    assert!(!gateway.is_ready().await);
}

#[tokio::test]
async fn an_error_in_answer_to_head_is_counted_as_what_it_is() {
    let provider = Provider::by_hand();
    let address = provider.address;
    drop(provider);
    let gateway =
        Gateway::builder().var("functions_provider_url", format!("http://{address}")).start().await;
    let mut caller = gateway.connect().await;
    caller.send("HEAD /function/echo HTTP/1.1\r\nHost: g\r\n\r\n").await;
    assert_eq!(caller.head().await.status(), 502);
    gateway.metrics_show("it is counted", |m| m.len() > 0 && m.text.contains("code=\"")).await;
    let metrics = gateway.metrics().await;
    assert_eq!((metrics.calls("unknown", "502"), metrics.calls("unknown", "499")), (1, 0));
    // The connection goes on.
    assert_eq!(caller.get("/_/healthz").await.status(), 200);
}
