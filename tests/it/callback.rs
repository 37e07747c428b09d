//! Callbacks, to receivers over real sockets.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use bytes::Bytes;
use gateway::config::allowlist::CallbackAllowlist;
use gateway::proxy::client::Tls;
use gateway::worker::callback::own_addresses::OwnAddresses;
use gateway::worker::callback::signature::Secret;
use gateway::worker::callback::target::CallbackUrlError;
use gateway::worker::callback::{CallbackPayload, CallbackRetry, CallbackSender, Error};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use crate::support::provider::{Call, Provider};
use crate::support::{eventually, webhook, within};

/// A pace at which a test need not wait.
const QUICK: CallbackRetry = CallbackRetry {
    attempts: 3,
    timeout: Duration::from_secs(10),
    min_wait: Duration::from_millis(1),
    max_wait: Duration::from_millis(2),
};

fn callbacks(allow: &str, secret: Option<&str>) -> CallbackSender {
    paced(allow, secret, QUICK)
}

fn paced(allow: &str, secret: Option<&str>, pace: CallbackRetry) -> CallbackSender {
    let secrets = secret.iter().map(|secret| Secret::parse(secret.as_bytes()).unwrap()).collect();
    CallbackSender::new(
        CallbackAllowlist::parse(allow).unwrap(),
        OwnAddresses::default(),
        secrets,
        pace,
        Tls::default(),
    )
}

/// A receiver whose answers, heads and all, are `answers` in turn, the last one for ever.
fn receiver(answers: &'static [&'static str]) -> Provider {
    let come = AtomicUsize::new(0);
    Provider::builder()
        .answering(move |mut call: Call| {
            let answer = answers[come.fetch_add(1, SeqCst).min(answers.len() - 1)];
            async move {
                call.body().await.unwrap();
                call.wire.send(format!("HTTP/1.1 {answer}\r\nContent-Length: 0\r\n\r\n")).await;
                Some(call.wire)
            }
        })
        .start()
}

/// Where a receiver takes its callbacks.
fn url(receiver: &Provider) -> String {
    format!("{}/function/hook", receiver.url())
}

fn report(headers: &[(&'static str, &'static str)], body: &'static str) -> CallbackPayload {
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

/// Sends an empty report and returns how that went.
async fn send(callbacks: &CallbackSender, url: &str) -> Result<(), Error> {
    within("a callback", callbacks.send(url, &report(&[], ""))).await
}

#[tokio::test]
async fn a_callback_carries_the_answer_and_how_it_came_about() {
    let mut receiver = Provider::by_hand();
    let answer = [
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
    let report = report(&answer, "what do ya want for nothing?");
    let callbacks = callbacks("loopback", Some("Jefe"));
    let url = format!("http://me:secret@{}/function/hook?a=b", receiver.address);
    let (sent, head) = tokio::join!(callbacks.send(&url, &report), async {
        let mut call = receiver.call().await;
        assert_eq!(call.body().await.unwrap(), report.body);
        call.answer_with(202, b"thanks").await;
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
    webhook::check(&head, "id-1", &report.body, &[b"Jefe"]);
}

#[tokio::test]
async fn each_attempt_is_signed_for_its_own_time() {
    let mut receiver = Provider::by_hand();
    let (callbacks, url) = (callbacks("loopback", Some("whsec_SmVmZQ==")), url(&receiver));
    let report = report(&[], "body");
    let (sent, ()) = tokio::join!(callbacks.send(&url, &report), async {
        let mut first = receiver.call().await;
        first.body().await.unwrap();
        webhook::check(&first.head, "id-1", b"body", &[b"Jefe"]);
        let sent_at = webhook::timestamp(&first.head);
        eventually("another second", async || webhook::seconds() > sent_at).await;
        first.answer_with(500, b"").await;
        let mut second = receiver.call().await;
        second.body().await.unwrap();
        webhook::check(&second.head, "id-1", b"body", &[b"Jefe"]);
        assert!(webhook::timestamp(&second.head) > sent_at);
        second.answer_with(200, b"").await;
    });
    sent.unwrap();
}

#[tokio::test]
async fn without_a_secret_there_is_no_signature_not_even_a_functions() {
    let mut receiver = Provider::by_hand();
    let report = report(&[("webhook-signature", "forged"), ("webhook-id", "forged")], "");
    let (callbacks, url) = (callbacks("loopback", None), url(&receiver));
    let (sent, head) = tokio::join!(callbacks.send(&url, &report), async {
        let mut call = receiver.call().await;
        call.answer(200, "").await;
        call.head
    });
    sent.unwrap();
    assert!(!head.headers.iter().any(|(name, _)| name.starts_with("webhook-")), "{head:?}");
    assert_eq!(head.header("content-length"), Some("0"));
}

#[tokio::test]
async fn a_callback_to_this_host_is_refused_however_it_is_written() {
    let receiver = Provider::saying("taken");
    let port = receiver.address.port();
    let callbacks = callbacks("10.0.0.1, elsewhere", None);
    // The last two are the resolver's to understand.
    for host in
        ["127.0.0.1", "[::ffff:127.0.0.1]", "[::1]", "0.0.0.0", "localhost", "2130706433", "127.1"]
    {
        let failed = send(&callbacks, &format!("http://{host}:{port}/function/hook")).await;
        let refused = matches!(failed, Err(Error::Invalid(CallbackUrlError::NotAllowed)));
        assert!(refused, "{host}: {failed:?}");
        let said = failed.unwrap_err().to_string();
        assert_eq!(said, "the callback's address is not allowed");
    }
    assert_eq!(receiver.connections(), 0);
}

#[tokio::test]
async fn a_callback_goes_where_it_is_allowed_to() {
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
        let sent = send(&callbacks(allow, None), &url).await;
        assert!(sent.is_ok(), "{host} with {allow}: {sent:?}");
    }
    assert_eq!(receiver.calls(), 5);
}

#[tokio::test]
async fn no_connection_is_used_for_two_callbacks() {
    let receiver = receiver(&["200 X"]);
    let callbacks = callbacks("loopback", None);
    for _ in 0..3 {
        send(&callbacks, &url(&receiver)).await.unwrap();
    }
    assert_eq!(receiver.connections(), 3);
}

#[tokio::test]
async fn a_callback_that_fails_is_sent_again_until_it_is_taken() {
    let receiver = receiver(&["500 X\r\nRetry-After: 3600", "200 X"]);
    send(&callbacks("loopback", None), &url(&receiver)).await.unwrap();
    assert_eq!(receiver.calls(), 2);
}

#[tokio::test]
async fn a_callback_is_given_up_after_its_last_attempt() {
    let receiver = receiver(&["503 X"]);
    let failed = send(&callbacks("loopback", None), &url(&receiver)).await;
    let Err(Error::UnexpectedStatus { status: StatusCode::SERVICE_UNAVAILABLE, attempts: 3 }) =
        failed
    else {
        panic!("{failed:?}")
    };
    assert_eq!(receiver.calls(), 3);
}

#[tokio::test]
async fn a_receivers_no_is_final() {
    let receiver = receiver(&["410 X"]);
    let failed = send(&callbacks("loopback", None), &url(&receiver)).await;
    let Err(Error::UnexpectedStatus { status: StatusCode::GONE, attempts: 1 }) = failed else {
        panic!("{failed:?}")
    };
    assert_eq!(receiver.calls(), 1);
}

#[tokio::test]
async fn a_redirect_is_not_followed() {
    let mut by_hand = Provider::by_hand();
    let (callbacks, url) = (callbacks("loopback", None), url(&by_hand));
    let (failed, ()) = tokio::join!(send(&callbacks, &url), async {
        let mut call = by_hand.call().await;
        assert_eq!(call.head.target(), "/function/hook");
        let location = "Location: /function/elsewhere";
        let head = format!("HTTP/1.1 302 X\r\n{location}\r\nContent-Length: 0\r\n\r\n");
        call.wire.send(head).await;
    });
    assert!(
        matches!(failed, Err(Error::UnexpectedStatus { status: StatusCode::FOUND, .. })),
        "{failed:?}"
    );
    // Nor tried again: it would be the same.
    assert_eq!(by_hand.calls(), 1);
}

#[tokio::test]
async fn a_receiver_that_says_nothing_is_not_waited_for() {
    // The calls lie in its queue, and their connections stay open.
    let receiver = Provider::by_hand();
    let pace = CallbackRetry { timeout: Duration::from_millis(50), attempts: 2, ..QUICK };
    let failed = send(&paced("loopback", None, pace), &url(&receiver)).await;
    let Err(Error::NotSent { attempts: 2, last }) = failed else { panic!("{failed:?}") };
    assert_eq!(last.to_string(), "the upstream did not respond in time");
}

#[tokio::test]
async fn a_receiver_that_is_away_is_tried_again() {
    let receiver = Provider::saying("taken");
    let url = url(&receiver);
    drop(receiver);
    let failed = send(&callbacks("loopback", None), &url).await;
    assert!(matches!(failed, Err(Error::NotSent { attempts: 3, .. })), "{failed:?}");
}

#[tokio::test]
async fn what_is_said_of_a_failure_holds_no_address_and_no_secret() {
    // A resolver may take its time over a name that is none.
    let pace = CallbackRetry { timeout: Duration::from_secs(1), ..QUICK };
    let callbacks = paced("loopback", None, pace);
    for url in ["http://me:secret@127.0.0.1:1/token", "http://me:secret@nowhere.invalid/token", "x"]
    {
        let said = send(&callbacks, url).await.unwrap_err();
        let said = format!("{said} {said:?}");
        for told in ["127.0.0.1", "nowhere", "secret", "token"] {
            assert!(!said.contains(told), "{said}");
        }
    }
}

#[tokio::test]
async fn a_body_that_was_cut_says_so() {
    let mut receiver = Provider::by_hand();
    let (callbacks, url) = (callbacks("loopback", None), url(&receiver));
    for (truncated, expect) in [(true, Some("true")), (false, None)] {
        let report = CallbackPayload { truncated, ..report(&[("x-truncated", "forged")], "part") };
        let (sent, head) = tokio::join!(callbacks.send(&url, &report), async {
            let mut call = receiver.call().await;
            call.answer(202, "").await;
            call.head
        });
        sent.unwrap();
        assert_eq!(head.header("x-truncated"), expect);
    }
}
