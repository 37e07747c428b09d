//! Transfer codings of requests (RFC 9112, 6.1 and 6.3): what is not exactly `chunked` reaches no function.

use crate::support::gateway::Gateway;
use crate::support::provider::Provider;
use crate::support::wire::Wire;

const BODY: &str = "5\r\nhello\r\n0\r\n\r\n";

/// What a request with these header lines is answered with, and that its connection ends then.
async fn status_of(mut client: Wire, target: &str, version: &str, lines: &[&str]) -> u16 {
    let lines: String = lines.iter().map(|line| format!("Transfer-Encoding: {line}\r\n")).collect();
    let head = format!("POST {target} HTTP/{version}\r\nHost: g\r\n{lines}\r\n");
    client.send(format!("{head}{BODY}")).await;
    let answer = client.answer().await;
    assert_eq!(answer.header("connection"), Some("close"), "{answer}");
    assert!(answer.header("content-type").is_some_and(|t| t.starts_with("text/plain")), "{answer}");
    assert!(answer.text().to_ascii_lowercase().contains("transfer"), "{answer}");
    assert_eq!(client.closed().await, b"", "{lines:?}");
    answer.status()
}

#[tokio::test]
async fn a_list_of_transfer_codings_that_is_not_chunked_is_refused_and_the_connection_closed() {
    let provider = Provider::saying("called");
    let gateway = Gateway::before(&provider).await;
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
        let metrics = Wire::connect(gateway.metrics_address).await;
        assert_eq!(status_of(metrics, "/metrics", "1.1", lines).await, expect, "{lines:?}");
    }
    assert_eq!(provider.calls(), 0);
}

#[tokio::test]
async fn http_1_0_has_no_transfer_codings() {
    let provider = Provider::saying("called");
    let gateway = Gateway::before(&provider).await;
    let status = status_of(gateway.connect().await, "/function/echo", "1.0", &["chunked"]).await;
    assert_eq!(status, 400);
    assert_eq!(provider.calls(), 0);
}

#[tokio::test]
async fn empty_elements_of_the_list_do_not_count() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    for line in ["chunked", "CHUNKED", ", chunked", "\t chunked\t"] {
        let mut client = gateway.connect().await;
        let head = format!("POST /function/echo HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: {line}");
        client.send(format!("{head}\r\n\r\n{BODY}")).await;
        let mut call = provider.call().await;
        assert_eq!(call.body().await.unwrap(), b"hello");
        assert_eq!(call.head.header("transfer-encoding"), Some("chunked"));
        call.answer_with(200, b"ok").await;
        assert_eq!(client.answer().await.text(), "ok");
    }
}

#[tokio::test]
async fn beside_a_content_length_chunked_decides_and_the_connection_is_closed() {
    let mut provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    for lines in [
        "Content-Length: 4\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 4",
    ] {
        let mut client = gateway.connect().await;
        let head = format!("POST /function/echo HTTP/1.1\r\nHost: g\r\n{lines}\r\n\r\n");
        client
            .send(format!("{head}{BODY}GET /function/smuggled HTTP/1.1\r\nHost: g\r\n\r\n"))
            .await;
        let mut call = provider.call().await;
        assert_eq!(call.body().await.unwrap(), b"hello");
        assert_eq!(call.head.header("content-length"), None);
        call.answer_with(200, b"ok").await;
        let answer = client.answer().await;
        assert_eq!((answer.text(), answer.header("connection")), ("ok", Some("close")));
        assert_eq!(client.closed().await, b"");
    }
    assert_eq!(provider.calls(), 2);
}
