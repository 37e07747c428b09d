//! Messages of Go gateways on NATS Streaming: what they ask for, and what the function is told.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::eventually;
use crate::support::fake_stan::{CHANNEL, Stan};
use crate::support::gateway::Gateway;
use crate::support::nats::Nats;
use crate::support::provider::Provider;
use crate::support::queue::{answering, patient, queueing};
use crate::support::stan_queue::{all_done, on};

const LATER: &str = "faas-request.later";
const DEAD: &str = "faas-request.dead";

#[tokio::test]
async fn members_are_read_in_any_case_and_internal_headers_are_not_told() {
    let (nats, mut provider) = (Nats::start(), patient().start());
    let stan = Stan::start(&nats).await;
    let mut receiver = Provider::by_hand();
    let address = receiver.address.to_string();
    let message = json!({
        "function": "echo", "BODY": "eA==", "PATH": "/p", "querystring": "a=1",
        "header": {
            "X-Call-Id": ["a"], "X-Gateway-Moves": ["9"], "X-Gateway-Of-Tomorrow": ["x"], "X-Kept": ["1"],
            "X-Max-Attempts": ["2"], "X-Expires-Seconds": ["1000"],
        },
        "CallbackURL": { "scheme": "http", "HOST": address, "path": "/function/hook", "rawquery": "b=2" },
    });
    stan.store_message(CHANNEL, message.to_string());
    let _worker = on(&nats, Gateway::worker()).provider(&provider).start().await;
    let mut call = provider.call().await;
    assert_eq!(call.head.target(), "/function/echo.fn/p?a=1");
    assert_eq!(call.body().await.unwrap(), b"x");
    assert_eq!((call.head.header("x-call-id"), call.head.header("x-kept")), (Some("a"), Some("1")));
    let told = |name: &str| name.starts_with("x-gateway-") || name.ends_with("-seconds");
    assert!(!call.head.headers.iter().any(|(name, _)| told(name)), "{:?}", call.head);
    assert_eq!(call.head.header("x-max-attempts"), None);
    call.answer_with(200, b"").await;
    let mut called = receiver.call().await;
    assert_eq!(called.head.target(), "/function/hook?b=2");
    called.answer(200, "").await;
    all_done(&stan, CHANNEL).await;
}

#[tokio::test]
async fn a_go_gateways_clients_choose_attempts_life_and_delay() {
    let (nats, provider) = (Nats::start(), answering(&[500], "no"));
    let stan = Stan::start(&nats).await;
    let message = |id: &str, name: &str, value: &str| {
        json!({ "Function": "echo", "Header": { "X-Call-Id": [id], name: [value] } }).to_string()
    };
    stan.store_message(CHANNEL, message("once", "X-Max-Attempts", "1"));
    stan.store_message(CHANNEL, message("late", "X-Expires-Seconds", "0"));
    let worker = on(&nats, Gateway::worker()).provider(&provider).start().await;
    all_done(&stan, CHANNEL).await;
    worker.logs("expired before it was executed").await;
    eventually("it is dead", async || stan.messages(DEAD).len() == 1).await;
    assert_eq!(stan.messages(DEAD)[0]["Header"]["X-Call-Id"][0], "once");
    assert_eq!((provider.calls(), stan.messages(LATER).len()), (1, 0));
    let stored = Instant::now();
    stan.store_message(CHANNEL, message("delayed", "X-Delay-Seconds", "2"));
    // It waits where it holds up nobody.
    eventually("it is moved", async || stan.messages(LATER).len() == 1).await;
    all_done(&stan, CHANNEL).await;
    assert_eq!(provider.calls(), 1);
    eventually("it is made", async || provider.calls() == 2).await;
    assert!(stored.elapsed() >= Duration::from_millis(1990), "{:?}", stored.elapsed());
}

#[tokio::test]
async fn delayed_calls_of_a_go_gateway_hold_up_no_others() {
    let (nats, provider) = (Nats::start(), answering(&[200], "x"));
    let stan = Stan::start(&nats).await;
    for number in 0..20 {
        let headers = json!({ "X-Call-Id": [number.to_string()], "X-Delay-Seconds": ["1000"] });
        stan.store_message(CHANNEL, json!({ "Function": "far", "Header": headers }).to_string());
    }
    stan.store_message(CHANNEL, r#"{"Function":"echo"}"#);
    let worker = on(&nats, Gateway::worker()).provider(&provider).var("max_inflight", "2");
    let _worker = worker.start().await;
    all_done(&stan, CHANNEL).await;
    assert_eq!((provider.calls(), stan.messages("faas-request.later.1h").len()), (1, 20));
}

#[tokio::test]
async fn a_client_writes_no_internal_headers() {
    let directory = tempfile::TempDir::new().unwrap();
    let mut provider = patient().start();
    let gateway = queueing(&provider, directory.path()).start().await;
    gateway.queued("echo", &["X-Gateway-Attempts: 7", "X-Kept: 1"], "").await;
    let mut call = provider.call().await;
    let (kept, attempts) = (call.head.header("x-kept"), call.head.header("x-gateway-attempts"));
    assert_eq!((kept, attempts), (Some("1"), None));
    call.answer(200, "").await;
}
