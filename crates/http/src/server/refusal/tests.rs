//! Tests of refused request heads, with the errors of hyper itself.

use std::convert::Infallible;
use std::time::Duration;

use hyper::Response;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::AsyncWriteExt;

use super::*;
use crate::server::connection::builder;

#[track_caller]
fn check(head: &str, expect: Result<&'static str, HeadError>) {
    let expect = match expect {
        Ok(corrected) => HeadOutcome::Corrected(Bytes::from_static(corrected.as_bytes())),
        Err(error) => HeadOutcome::Refused(error),
    };
    assert_eq!(HeadOutcome::from_version(head.as_bytes()), expect, "{head:?}");
}

#[test]
fn a_higher_minor_version_is_corrected_in_place() {
    check("GET / HTTP/1.2\r\nA: HTTP/1.3\r\n\r\n", Ok("GET / HTTP/1.1\r\nA: HTTP/1.3\r\n\r\n"));
    check("\r\nGET /HTTP/1.2 HTTP/1.9\n\n", Ok("\r\nGET /HTTP/1.2 HTTP/1.1\n\n"));
    check("GET / HTTP/1.7", Ok("GET / HTTP/1.1"));
}

#[test]
fn other_versions_are_refused() {
    for version in ["HTTP/2.0", "HTTP/0.9", "HTTP/9.9", "HTTP/2.1", "HTTP/2"] {
        check(&format!("GET / {version}\r\n\r\n"), Err(HeadError::UnsupportedVersion));
    }
    check("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Err(HeadError::UnsupportedVersion));
    for version in ["http/1.1", "HTTP/1.23", "HTTP/1,2", "HTTP/1.x", "x HTTP/1.2", ""] {
        check(&format!("GET / {version}\r\n\r\n"), Err(HeadError::Version));
    }
    check("GET /\r\nA b HTTP/1.2\r\n", Err(HeadError::Version));
    check("", Err(HeadError::Version));
}

#[test]
fn too_large_heads_and_lengths_are_distinguished() {
    let head =
        |count: usize| format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(count)).into_bytes();
    let refused = HeadOutcome::Refused;
    assert_eq!(classify_too_large(&head(MAX_HEADERS + 1)), refused(HeadError::TooManyHeaders));
    assert_eq!(classify_too_large(&head(DEFAULT_MAX_HEADERS + 1)), HeadOutcome::NeedsManyHeaders);
    assert_eq!(classify_too_large(&head(1)), refused(HeadError::ContentLength));
    assert_eq!(classify_too_large(b""), refused(HeadError::ContentLength));
    assert_eq!(classify_too_large(&vec![b'x'; MAX_HEAD_BYTES]), refused(HeadError::TooLarge));
    let large = format!("GET / HTTP/1.1\r\nA: {}\r\n\r\n", "x".repeat(MAX_HEAD_BYTES));
    assert_eq!(classify_too_large(large.as_bytes()), refused(HeadError::TooLarge));
    // A body whose head hyper has removed.
    assert_eq!(
        classify_too_large("A: b\n".repeat(300).as_bytes()),
        refused(HeadError::ContentLength)
    );
}

#[test]
fn a_response_is_complete_and_closes_the_connection() {
    let text = response(HeadError::Method, false);
    let text = std::str::from_utf8(&text).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{head}");
    assert!(head.contains("connection: close\r\n") && head.contains("content-type: text/plain"));
    assert!(head.contains(&format!("content-length: {}\r\n", body.len())), "{head}");
    assert_eq!(body, "the method of the request is malformed\n");
}

/// Passes `head` to hyper, and classifies its error.
async fn refused(head: &[u8]) -> HeadOutcome {
    let (mut client, server) = tokio::io::duplex(4 << 20);
    client.write_all(head).await.unwrap();
    let service = service_fn(|_| async { Ok::<_, Infallible>(Response::new(String::new())) });
    let mut builder = builder();
    builder.max_headers(MAX_HEADERS);
    let mut connection = builder.serve_connection(TokioIo::new(server), service);
    let served = tokio::time::timeout(Duration::from_secs(10), &mut connection).await;
    let error = served.expect("hyper ends").expect_err("hyper refuses it");
    HeadOutcome::from_hyper(&error, &connection.into_parts().read_buf)
}

#[tokio::test]
async fn every_error_of_hyper_is_recognized() {
    let line = |line: &str| format!("GET / HTTP/1.1\r\n{line}\r\n\r\n");
    let target = |length: usize| format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(length));
    for (head, expect) in [
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(), HeadError::UnsupportedVersion),
        ("GET / HTTP/2.0\r\n\r\n".to_owned(), HeadError::UnsupportedVersion),
        ("GET / HTTP/x\r\n\r\n".to_owned(), HeadError::Version),
        ("G@T / HTTP/1.1\r\n\r\n".to_owned(), HeadError::Method),
        ("GET /\u{1} HTTP/1.1\r\n\r\n".to_owned(), HeadError::Target),
        ("GET http://[::1/ HTTP/1.1\r\n\r\n".to_owned(), HeadError::Target),
        (line("no colon"), HeadError::Header),
        (line("A: \u{1}"), HeadError::Header),
        (line("Content-Length: x"), HeadError::ContentLength),
        (line("Content-Length: 1\r\nContent-Length: 2"), HeadError::ContentLength),
        (line("Content-Length: 18446744073709551615"), HeadError::ContentLength),
        (
            line("Content-Length: 18446744073709551615") + &"a body\n".repeat(300),
            HeadError::ContentLength,
        ),
        (line("Transfer-Encoding: gzip"), HeadError::TransferEncoding),
        (
            "GET / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n".to_owned(),
            HeadError::TransferEncodingInHttp10,
        ),
        (target(MAX_TARGET_BYTES), HeadError::TargetTooLong),
        (target(MAX_HEAD_BYTES), HeadError::TooLarge),
        (format!("GET / HTTP/1.1\r\nA: {}", "x".repeat(2 * MAX_HEAD_BYTES)), HeadError::TooLarge),
        (line(&"A: b\r\n".repeat(MAX_HEADERS + 1)), HeadError::TooManyHeaders),
    ] {
        let shown = head.get(..80).unwrap_or(&head);
        assert_eq!(refused(head.as_bytes()).await, HeadOutcome::Refused(expect), "{shown:?}");
    }
    let corrected = HeadOutcome::Corrected(Bytes::from_static(b"GET / HTTP/1.1\r\n\r\n"));
    assert_eq!(refused(b"GET / HTTP/1.7\r\n\r\n").await, corrected);
}
