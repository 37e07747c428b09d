//! Tests of the request writer: framing, replay, and broken peers.

use std::future::poll_fn;

use axum::body::Body as ApiBody;
use http::{HeaderName, HeaderValue, Request};
use http_body_util::channel::{Channel, Sender};
use tokio::io::{AsyncReadExt, DuplexStream, duplex};

use super::*;

fn post() -> Parts {
    let mut request = Request::new(());
    *request.method_mut() = Method::POST;
    request.into_parts().0
}

fn channel() -> (Sender<Bytes, io::Error>, RequestBody) {
    let (sender, body) = Channel::<Bytes, io::Error>::new(4);
    (sender, RequestBody::Api(ApiBody::new(body)))
}

async fn written(mut stream: DuplexStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    text.split_once("\r\n\r\n").unwrap().1.to_owned()
}

/// Sends `body` through a pipe with a buffer of `capacity` bytes. Returns what is received after the head.
async fn sent(body: RequestBody, capacity: usize) -> String {
    let (mut ours, theirs) = duplex(capacity);
    let mut writer = RequestWriter::new(&post(), body);
    let sending = async move {
        poll_fn(|cx| writer.poll_send(&mut ours, cx)).await.unwrap();
        assert!(writer.is_complete() && writer.has_started());
    };
    tokio::join!(written(theirs), sending).0
}

#[tokio::test]
async fn a_body_is_sent_completely_through_any_pipe() {
    for length in [1, COALESCE_LIMIT, COALESCE_LIMIT + 1, 3 * COALESCE_LIMIT] {
        for capacity in [7, COALESCE_LIMIT, 1 << 20] {
            let data = "x".repeat(length);
            let body = RequestBody::Full(Some(data.clone().into()));
            assert!(sent(body, capacity).await == data, "{length} through {capacity}");
        }
    }
}

#[tokio::test]
async fn large_and_small_chunks_and_the_end_are_sent() {
    for capacity in [7, 1 << 20] {
        let (mut sender, body) = channel();
        let large = "y".repeat(COALESCE_LIMIT + 1);
        for data in ["one", "", &large] {
            sender.send_data(Bytes::from(data.to_owned())).await.unwrap();
        }
        let name = HeaderName::from_static("x-checksum");
        let trailers = HeaderMap::from_iter([(name, HeaderValue::from_static("42"))]);
        sender.send_trailers(trailers).await.unwrap();
        drop(sender);
        let size = COALESCE_LIMIT + 1;
        let expect = format!("3\r\none\r\n{size:x}\r\n{large}\r\n0\r\nx-checksum: 42\r\n\r\n");
        assert!(sent(body, capacity).await == expect, "through {capacity}");
    }
}

#[tokio::test]
async fn available_data_is_sent_while_the_body_is_pending() {
    let (mut sender, body) = channel();
    let (mut ours, mut theirs) = duplex(1 << 20);
    let mut writer = RequestWriter::new(&post(), body);
    sender.send_data(Bytes::from_static(b"first")).await.unwrap();
    poll_fn(|cx| Poll::Ready(writer.poll_send(&mut ours, cx).is_pending())).await;
    let mut seen = Vec::new();
    while !seen.ends_with(b"first\r\n") {
        theirs.read_buf(&mut seen).await.unwrap();
    }
    assert!(!writer.is_complete());
}

#[tokio::test]
async fn a_failed_body_is_never_completed() {
    let (sender, body) = channel();
    sender.abort(io::Error::other("gone"));
    let (mut ours, _theirs) = duplex(1 << 20);
    let mut writer = RequestWriter::new(&post(), body);
    let failure = poll_fn(|cx| writer.poll_send(&mut ours, cx)).await.unwrap_err();
    assert!(matches!(failure, WriteError::Body(RequestBodyError::Malformed)), "{failure:?}");
    // Nor is it completed by a later poll.
    assert!(poll_fn(|cx| writer.poll_send(&mut ours, cx)).await.is_err());
    assert!(!writer.is_complete());
}

#[tokio::test]
async fn a_kept_request_can_be_sent_twice_and_a_longer_one_cannot() {
    let limit = 4 * COALESCE_LIMIT;
    for (length, again) in
        [(1, true), (COALESCE_LIMIT + 1, true), (3 * COALESCE_LIMIT, true), (limit, false)]
    {
        for ahead in [false, true] {
            let (mut sender, body) = channel();
            let data = "z".repeat(length);
            sender.send_data(Bytes::from(data.clone())).await.unwrap();
            drop(sender);
            let mut writer = RequestWriter::new(&post(), body);
            writer.enable_replay(limit);
            if ahead {
                let _ = poll_fn(|cx| Poll::Ready(writer.poll_buffer_body(cx))).await;
            }
            for time in 0..if again { 2 } else { 1 } {
                let (mut ours, theirs) = duplex(1 << 20);
                poll_fn(|cx| writer.poll_send(&mut ours, cx)).await.unwrap();
                drop(ours);
                let expect = format!("{length:x}\r\n{data}\r\n0\r\n\r\n");
                assert!(written(theirs).await == expect, "{length}, {ahead}, {time}");
                assert_eq!(writer.can_rewind(), again, "{length}, {ahead}");
                writer = writer.rewind();
            }
        }
    }
}

#[tokio::test]
async fn a_partly_sent_request_is_replayed_from_its_first_byte() {
    let (mut sender, body) = channel();
    let mut writer = RequestWriter::new(&post(), body);
    writer.enable_replay(1 << 10);
    sender.send_data(Bytes::from_static(b"first")).await.unwrap();
    let (mut ours, theirs) = duplex(1 << 20);
    poll_fn(|cx| Poll::Ready(writer.poll_send(&mut ours, cx).is_pending())).await;
    drop(ours);
    assert_eq!(written(theirs).await, "5\r\nfirst\r\n");
    let mut writer = writer.rewind();
    sender.send_data(Bytes::from_static(b"second")).await.unwrap();
    drop(sender);
    let (mut ours, theirs) = duplex(1 << 20);
    poll_fn(|cx| writer.poll_send(&mut ours, cx)).await.unwrap();
    drop(ours);
    assert_eq!(written(theirs).await, "5\r\nfirst\r\n6\r\nsecond\r\n0\r\n\r\n");
}

#[tokio::test]
async fn a_request_is_sent_at_most_three_times_and_failed_connections_do_not_count() {
    let body = RequestBody::Full(Some(Bytes::from_static(b"small")));
    let mut writer = RequestWriter::new(&post(), body);
    for times_sent in 1..=MAX_SENDS {
        // The connection failed before anything was written.
        writer = writer.rewind();
        let (mut ours, _theirs) = duplex(1 << 20);
        poll_fn(|cx| writer.poll_send(&mut ours, cx)).await.unwrap();
        assert_eq!(writer.can_rewind(), times_sent < 3, "{times_sent}");
        writer = writer.rewind();
    }
}

#[tokio::test]
async fn a_small_request_is_always_kept() {
    let body = RequestBody::Full(Some(Bytes::from_static(b"small")));
    let mut writer = RequestWriter::new(&post(), body);
    let (mut ours, _theirs) = duplex(1 << 20);
    poll_fn(|cx| writer.poll_send(&mut ours, cx)).await.unwrap();
    assert!(writer.can_rewind() && !RequestWriter::default().can_rewind());
    let body = RequestBody::Full(Some(Bytes::from("x".repeat(3 * COALESCE_LIMIT))));
    let mut writer = RequestWriter::new(&post(), body);
    poll_fn(|cx| writer.poll_send(&mut ours, cx)).await.unwrap();
    assert!(!writer.can_rewind());
}

#[tokio::test]
async fn a_write_to_a_closed_peer_fails_and_does_not_start_the_request() {
    let (mut ours, theirs) = duplex(1 << 20);
    drop(theirs);
    let mut writer = RequestWriter::new(
        &post(),
        RequestBody::Full(Some(Bytes::from("x".repeat(3 * COALESCE_LIMIT)))),
    );
    let failure = poll_fn(|cx| writer.poll_send(&mut ours, cx)).await.unwrap_err();
    assert!(matches!(failure, WriteError::Io(_)), "{failure:?}");
    assert!(!writer.has_started());
}
