//! Transfer codings of requests (RFC 9112, 6.1 and 6.3): anything but exactly `chunked` reaches no function.

use crate::support::connection::Connection;
use crate::support::gateway::Gateway;
use crate::support::provider::Provider;

const BODY: &str = "5\r\nhello\r\n0\r\n\r\n";

/// The status of the response to a request with these header lines, after which the connection must be closed.
async fn status_of(mut client: Connection, target: &str, version: &str, lines: &[&str]) -> u16 {
    let lines: String = lines.iter().map(|line| format!("Transfer-Encoding: {line}\r\n")).collect();
    let head = format!("POST {target} HTTP/{version}\r\nHost: g\r\n{lines}\r\n");
    client.send(format!("{head}{BODY}")).await;
    let response = client.read_response().await;
    assert_eq!(response.header("connection"), Some("close"), "{response}");
    assert!(
        response.header("content-type").is_some_and(|t| t.starts_with("text/plain")),
        "{response}"
    );
    assert!(response.text().to_ascii_lowercase().contains("transfer"), "{response}");
    assert_eq!(client.read_to_close().await, b"", "{lines:?}");
    response.status()
}

#[tokio::test]
async fn transfer_codings_other_than_chunked_are_refused_and_the_connection_closed() {
    let provider = Provider::replying("called");
    let gateway = Gateway::in_front_of(&provider).await;
    for (lines, expect) in [
        (&["gzip"][..], 400),
        (&["identity"], 400),
        (&[""], 400),
        (&["chunked, gzip"], 400),
        (&["chunked", "gzip"], 400),
        (&["chunked", "identity"], 400),
        (&["chunked;q=1"], 400),
        (&["x\"chunked"], 400),
        (&["chunked, chunked"], 400),
        (&["chunked", "chunked"], 400),
        (&["Chunked,CHUNKED"], 400),
        (&["gzip, chunked, chunked"], 400),
        (&["chunked, gzip, chunked"], 400),
        (&["gzip, chunked"], 501),
        (&["gzip", "chunked"], 501),
        (&["identity, chunked"], 501),
        (&["deflate,gzip , chunked"], 501),
        (&["chunked-not, chunked"], 501),
    ] {
        for target in ["/function/echo", "/async-function/echo", "/system/functions"] {
            let status = status_of(gateway.connect().await, target, "1.1", lines).await;
            assert_eq!(status, expect, "{target} {lines:?}");
        }
        let metrics = Connection::connect(gateway.metrics_address).await;
        assert_eq!(status_of(metrics, "/metrics", "1.1", lines).await, expect, "{lines:?}");
    }
    assert_eq!(provider.call_count(), 0);
}

#[tokio::test]
async fn transfer_codings_in_http_1_0_are_refused() {
    let provider = Provider::replying("called");
    let gateway = Gateway::in_front_of(&provider).await;
    let status = status_of(gateway.connect().await, "/function/echo", "1.0", &["chunked"]).await;
    assert_eq!(status, 400);
    assert_eq!(provider.call_count(), 0);
}

#[tokio::test]
async fn empty_list_elements_are_ignored() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    for line in ["chunked", "CHUNKED", ", chunked", "\t chunked\t"] {
        let mut client = gateway.connect().await;
        let head = format!("POST /function/echo HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: {line}");
        client.send(format!("{head}\r\n\r\n{BODY}")).await;
        let mut call = provider.next_call().await;
        assert_eq!(call.read_body().await.unwrap(), b"hello");
        assert_eq!(call.head.header("transfer-encoding"), Some("chunked"));
        call.send_response(200, b"ok").await;
        assert_eq!(client.read_response().await.text(), "ok");
    }
}

#[tokio::test]
async fn chunked_overrides_content_length_and_closes_the_connection() {
    let mut provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    for lines in [
        "Content-Length: 4\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 4",
    ] {
        let mut client = gateway.connect().await;
        let head = format!("POST /function/echo HTTP/1.1\r\nHost: g\r\n{lines}\r\n\r\n");
        client
            .send(format!("{head}{BODY}GET /function/smuggled HTTP/1.1\r\nHost: g\r\n\r\n"))
            .await;
        let mut call = provider.next_call().await;
        assert_eq!(call.read_body().await.unwrap(), b"hello");
        assert_eq!(call.head.header("content-length"), None);
        call.send_response(200, b"ok").await;
        let response = client.read_response().await;
        assert_eq!((response.text(), response.header("connection")), ("ok", Some("close")));
        assert_eq!(client.read_to_close().await, b"");
    }
    assert_eq!(provider.call_count(), 2);
}
