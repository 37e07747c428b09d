//! Callbacks to receivers over real sockets.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use bytes::Bytes;
use gateway_base::backoff::Backoff;
use gateway_http::client::Tls;
use gateway_worker::callback::allowlist::CallbackAllowlist;
use gateway_worker::callback::own_addresses::OwnAddresses;
use gateway_worker::callback::signature::Secret;
use gateway_worker::callback::target::CallbackUrlError;
use gateway_worker::callback::{CallbackPayload, CallbackRetry, CallbackSender, Error};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use crate::support::provider::{Invocation, Provider};
use crate::support::{eventually, webhook, within};

/// Retry intervals short enough for a test.
const FAST_RETRY: CallbackRetry = CallbackRetry {
    attempts: 3,
    timeout: Duration::from_secs(10),
    backoff: Backoff::new(Duration::from_millis(1), Duration::from_millis(2)),
};

fn sender(allow: &str, secret: Option<&str>) -> CallbackSender {
    sender_with_retry(allow, secret, FAST_RETRY)
}

fn sender_with_retry(allow: &str, secret: Option<&str>, pace: CallbackRetry) -> CallbackSender {
    let secrets = secret.iter().map(|secret| Secret::parse(secret.as_bytes()).unwrap()).collect();
    CallbackSender::new(
        CallbackAllowlist::parse(allow).unwrap(),
        OwnAddresses::default(),
        secrets,
        pace,
        Tls::default(),
    )
}

/// A receiver that sends `answers` (heads included) in turn; the last one is repeated.
fn receiver(responses: &'static [&'static str]) -> Provider {
    let count = AtomicUsize::new(0);
    Provider::builder()
        .handler(move |mut call: Invocation| {
            let response = responses[count.fetch_add(1, SeqCst).min(responses.len() - 1)];
            async move {
                call.read_body().await.unwrap();
                call.connection
                    .send(format!("HTTP/1.1 {response}\r\nContent-Length: 0\r\n\r\n"))
                    .await;
                Some(call.connection)
            }
        })
        .start()
}

/// Callback URL of a receiver.
fn url(receiver: &Provider) -> String {
    format!("{}/function/hook", receiver.url())
}

fn payload(headers: &[(&'static str, &'static str)], body: &'static str) -> CallbackPayload {
    let headers: HeaderMap = headers
        .iter()
        .map(|(n, v)| (HeaderName::from_static(n), HeaderValue::from_static(v)))
        .collect();
    CallbackPayload {
        call_id: "id-1".to_owned(),
        function: "echo.dev".to_owned(),
        status: 418,
        headers,
        body: Bytes::from_static(body.as_bytes()),
        truncated: false,
        duration: Duration::from_micros(1_123_456),
        attempts: 2,
        max_attempts: 5,
        callbacks: 0,
        trace: HeaderMap::new(),
    }
}

/// Sends an empty payload.
async fn send(callbacks: &CallbackSender, url: &str) -> Result<(), Error> {
    within("a callback", callbacks.send(url, &payload(&[], ""))).await
}

#[tokio::test]
async fn a_callback_carries_the_response_and_its_metadata() {
    let mut receiver = Provider::manual();
    let response = [
        ("content-type", "text/x-tea"),
        ("content-length", "9999"),
        ("connection", "x-hop"),
        ("x-hop", "1"),
        ("transfer-encoding", "chunked"),
        ("trailer", "x-after"),
        ("expect", "100-continue"),
        ("host", "elsewhere"),
        ("x-call-id", "forged"),
        ("webhook-id", "forged"),
        ("webhook-signature", "forged"),
        ("x-own", "kept"),
    ];
    let report = payload(&response, "what do ya want for nothing?");
    let callbacks = sender("loopback", Some("Jefe"));
    let url = format!("http://me:secret@{}/function/hook?a=b", receiver.address);
    let (sent, head) = tokio::join!(callbacks.send(&url, &report), async {
        let mut call = receiver.next_call().await;
        assert_eq!(call.read_body().await.unwrap(), report.body);
        call.send_response(202, b"thanks").await;
        call.head
    });
    sent.unwrap();
    assert_eq!((head.method(), head.target()), ("POST", "/function/hook?a=b"));
    let authority = receiver.address.to_string();
    for (name, expect) in [
        ("host", Some(authority.as_str())),
        ("authorization", Some("Basic bWU6c2VjcmV0")),
        ("content-type", Some("text/x-tea")),
        ("content-length", Some("28")),
        ("x-own", Some("kept")),
        ("x-call-id", Some("id-1")),
        ("x-duration-seconds", Some("1.123456")),
        ("x-function-status", Some("418")),
        ("x-function-name", Some("echo.dev")),
        ("x-retry", Some("2")),
        ("x-retry-max", Some("5")),
        ("x-callback-signature", None),
        ("x-hop", None),
        ("transfer-encoding", None),
        ("trailer", None),
        ("expect", None),
    ] {
        assert_eq!(head.header(name), expect, "{name}");
        let count = head.headers.iter().filter(|(n, _)| n == name).count();
        assert!(count <= 1, "{name}: {count} times");
    }
    webhook::assert_signed(&head, "id-1", &report.body, &[b"Jefe"]);
}

#[tokio::test]
async fn each_attempt_is_signed_with_its_own_timestamp() {
    let mut receiver = Provider::manual();
    let (callbacks, url) = (sender("loopback", Some("whsec_SmVmZQ==")), url(&receiver));
    let report = payload(&[], "body");
    let (sent, ()) = tokio::join!(callbacks.send(&url, &report), async {
        let mut first = receiver.next_call().await;
        first.read_body().await.unwrap();
        webhook::assert_signed(&first.head, "id-1", b"body", &[b"Jefe"]);
        let sent_at = webhook::timestamp(&first.head);
        eventually("another second", async || webhook::unix_seconds() > sent_at).await;
        first.send_response(500, b"").await;
        let mut second = receiver.next_call().await;
        second.read_body().await.unwrap();
        webhook::assert_signed(&second.head, "id-1", b"body", &[b"Jefe"]);
        assert!(webhook::timestamp(&second.head) > sent_at);
        second.send_response(200, b"").await;
    });
    sent.unwrap();
}

#[tokio::test]
async fn without_a_secret_signature_headers_of_functions_are_removed() {
    let mut receiver = Provider::manual();
    let report = payload(&[("webhook-signature", "forged"), ("webhook-id", "forged")], "");
    let (callbacks, url) = (sender("loopback", None), url(&receiver));
    let (sent, head) = tokio::join!(callbacks.send(&url, &report), async {
        let mut call = receiver.next_call().await;
        call.respond(200, "").await;
        call.head
    });
    sent.unwrap();
    assert!(!head.headers.iter().any(|(name, _)| name.starts_with("webhook-")), "{head:?}");
    assert_eq!(head.header("content-length"), Some("0"));
}

#[tokio::test]
async fn callbacks_to_loopback_addresses_are_refused_in_every_notation() {
    let receiver = Provider::replying("taken");
    let port = receiver.address.port();
    let callbacks = sender("10.0.0.1, elsewhere", None);
    // The last two are parsed by the resolver.
    for host in
        ["127.0.0.1", "[::ffff:127.0.0.1]", "[::1]", "0.0.0.0", "localhost", "2130706433", "127.1"]
    {
        let failed = send(&callbacks, &format!("http://{host}:{port}/function/hook")).await;
        let refused = matches!(failed, Err(Error::Invalid(CallbackUrlError::NotAllowed)));
        assert!(refused, "{host}: {failed:?}");
        let text = failed.unwrap_err().to_string();
        assert_eq!(text, "the callback's address is not allowed");
    }
    assert_eq!(receiver.connection_count(), 0);
}

#[tokio::test]
async fn a_callback_to_an_allowed_address_is_sent() {
    let receiver = receiver(&["200 X"]);
    let port = receiver.address.port();
    for (allow, host) in [
        ("loopback", "127.0.0.1"),
        ("loopback", "localhost"),
        ("127.0.0.0/8", "localhost"),
        ("localhost", "LOCALHOST"),
        ("*", "0.0.0.0"),
    ] {
        let url = format!("http://{host}:{port}/function/hook");
        let sent = send(&sender(allow, None), &url).await;
        assert!(sent.is_ok(), "{host} with {allow}: {sent:?}");
    }
    assert_eq!(receiver.call_count(), 5);
}

#[tokio::test]
async fn each_callback_has_its_own_connection() {
    let receiver = receiver(&["200 X"]);
    let callbacks = sender("loopback", None);
    for _ in 0..3 {
        send(&callbacks, &url(&receiver)).await.unwrap();
    }
    assert_eq!(receiver.connection_count(), 3);
}

#[tokio::test]
async fn a_failed_callback_is_retried_until_it_is_accepted() {
    let receiver = receiver(&["500 X\r\nRetry-After: 3600", "200 X"]);
    send(&sender("loopback", None), &url(&receiver)).await.unwrap();
    assert_eq!(receiver.call_count(), 2);
}

#[tokio::test]
async fn a_callback_is_given_up_after_its_last_attempt() {
    let receiver = receiver(&["503 X"]);
    let failed = send(&sender("loopback", None), &url(&receiver)).await;
    let Err(Error::UnexpectedStatus { status: StatusCode::SERVICE_UNAVAILABLE, attempts: 3 }) =
        failed
    else {
        panic!("{failed:?}")
    };
    assert_eq!(receiver.call_count(), 3);
}

#[tokio::test]
async fn a_client_error_from_the_receiver_is_final() {
    let receiver = receiver(&["410 X"]);
    let failed = send(&sender("loopback", None), &url(&receiver)).await;
    let Err(Error::UnexpectedStatus { status: StatusCode::GONE, attempts: 1 }) = failed else {
        panic!("{failed:?}")
    };
    assert_eq!(receiver.call_count(), 1);
}

#[tokio::test]
async fn redirects_are_not_followed() {
    let mut by_hand = Provider::manual();
    let (callbacks, url) = (sender("loopback", None), url(&by_hand));
    let (failed, ()) = tokio::join!(send(&callbacks, &url), async {
        let mut call = by_hand.next_call().await;
        assert_eq!(call.head.target(), "/function/hook");
        let location = "Location: /function/elsewhere";
        let head = format!("HTTP/1.1 302 X\r\n{location}\r\nContent-Length: 0\r\n\r\n");
        call.connection.send(head).await;
    });
    assert!(
        matches!(failed, Err(Error::UnexpectedStatus { status: StatusCode::FOUND, .. })),
        "{failed:?}"
    );
    // It is not retried either: the result would be the same.
    assert_eq!(by_hand.call_count(), 1);
}

#[tokio::test]
async fn a_receiver_that_does_not_respond_times_out() {
    // The calls wait in the receiver's queue, and their connections stay open.
    let receiver = Provider::manual();
    let pace = CallbackRetry { timeout: Duration::from_millis(50), attempts: 2, ..FAST_RETRY };
    let failed = send(&sender_with_retry("loopback", None, pace), &url(&receiver)).await;
    let Err(Error::NotSent { attempts: 2, last }) = failed else { panic!("{failed:?}") };
    assert_eq!(last.to_string(), "the upstream did not respond in time");
}

#[tokio::test]
async fn an_unreachable_receiver_is_retried() {
    let receiver = Provider::replying("taken");
    let url = url(&receiver);
    drop(receiver);
    let failed = send(&sender("loopback", None), &url).await;
    assert!(matches!(failed, Err(Error::NotSent { attempts: 3, .. })), "{failed:?}");
}

#[tokio::test]
async fn failure_texts_contain_no_address_and_no_secret() {
    // A resolver may need long for a name that does not exist.
    let pace = CallbackRetry { timeout: Duration::from_secs(1), ..FAST_RETRY };
    let callbacks = sender_with_retry("loopback", None, pace);
    for url in ["http://me:secret@127.0.0.1:1/token", "http://me:secret@nowhere.invalid/token", "x"]
    {
        let text = send(&callbacks, url).await.unwrap_err();
        let text = format!("{text} {text:?}");
        for secret_part in ["127.0.0.1", "nowhere", "secret", "token"] {
            assert!(!text.contains(secret_part), "{text}");
        }
    }
}

#[tokio::test]
async fn a_truncated_body_is_marked() {
    let mut receiver = Provider::manual();
    let (callbacks, url) = (sender("loopback", None), url(&receiver));
    for (truncated, expect) in [(true, Some("true")), (false, None)] {
        let report = CallbackPayload { truncated, ..payload(&[("x-truncated", "forged")], "part") };
        let (sent, head) = tokio::join!(callbacks.send(&url, &report), async {
            let mut call = receiver.next_call().await;
            call.respond(202, "").await;
            call.head
        });
        sent.unwrap();
        assert_eq!(head.header("x-truncated"), expect);
    }
}
