//! Messages of Go gateways on NATS Streaming: their options, and the request that the function receives.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::eventually;
use crate::support::fake_stan::{CHANNEL, FakeStan};
use crate::support::gateway::Gateway;
use crate::support::nats::Nats;
use crate::support::provider::Provider;
use crate::support::queue::{fast_retry, replying_with, with_embedded_queue};
use crate::support::stan_queue::{on_stan, wait_until_acknowledged};

const DELAYED: &str = "faas-request.later";
const DEAD_LETTERS: &str = "faas-request.dead";

#[tokio::test]
async fn json_members_are_read_in_any_case_without_internal_headers() {
    let (nats, mut provider) = (Nats::start(), fast_retry().start());
    let stan = FakeStan::start(&nats).await;
    let mut receiver = Provider::manual();
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
    let _worker = on_stan(&nats, Gateway::worker()).provider(&provider).start().await;
    let mut call = provider.next_call().await;
    assert_eq!(call.head.target(), "/function/echo.fn/p?a=1");
    assert_eq!(call.read_body().await.unwrap(), b"x");
    assert_eq!((call.head.header("x-call-id"), call.head.header("x-kept")), (Some("a"), Some("1")));
    let is_internal = |name: &str| name.starts_with("x-gateway-") || name.ends_with("-seconds");
    assert!(!call.head.headers.iter().any(|(name, _)| is_internal(name)), "{:?}", call.head);
    assert_eq!(call.head.header("x-max-attempts"), None);
    call.send_response(200, b"").await;
    let mut called = receiver.next_call().await;
    assert_eq!(called.head.target(), "/function/hook?b=2");
    called.respond(200, "").await;
    wait_until_acknowledged(&stan, CHANNEL).await;
}

#[tokio::test]
async fn clients_of_a_go_gateway_choose_attempts_expiry_and_delay() {
    let (nats, provider) = (Nats::start(), replying_with(&[500], "no"));
    let stan = FakeStan::start(&nats).await;
    let message = |id: &str, name: &str, value: &str| {
        json!({ "Function": "echo", "Header": { "X-Call-Id": [id], name: [value] } }).to_string()
    };
    stan.store_message(CHANNEL, message("once", "X-Max-Attempts", "1"));
    stan.store_message(CHANNEL, message("late", "X-Expires-Seconds", "0"));
    let worker = on_stan(&nats, Gateway::worker()).provider(&provider).start().await;
    wait_until_acknowledged(&stan, CHANNEL).await;
    worker.wait_for_log("expired before it was executed").await;
    eventually("the call is dead-lettered", async || stan.messages(DEAD_LETTERS).len() == 1).await;
    assert_eq!(stan.messages(DEAD_LETTERS)[0]["Header"]["X-Call-Id"][0], "once");
    assert_eq!((provider.call_count(), stan.messages(DELAYED).len()), (1, 0));
    let stored = Instant::now();
    stan.store_message(CHANNEL, message("delayed", "X-Delay-Seconds", "2"));
    // The delayed call waits on a channel of its own, where it does not block others.
    eventually("the call is moved", async || stan.messages(DELAYED).len() == 1).await;
    wait_until_acknowledged(&stan, CHANNEL).await;
    assert_eq!(provider.call_count(), 1);
    eventually("the call is executed", async || provider.call_count() == 2).await;
    assert!(stored.elapsed() >= Duration::from_millis(1990), "{:?}", stored.elapsed());
}

#[tokio::test]
async fn delayed_calls_of_a_go_gateway_do_not_block_others() {
    let (nats, provider) = (Nats::start(), replying_with(&[200], "x"));
    let stan = FakeStan::start(&nats).await;
    for number in 0..20 {
        let headers = json!({ "X-Call-Id": [number.to_string()], "X-Delay-Seconds": ["1000"] });
        stan.store_message(CHANNEL, json!({ "Function": "far", "Header": headers }).to_string());
    }
    stan.store_message(CHANNEL, r#"{"Function":"echo"}"#);
    let worker = on_stan(&nats, Gateway::worker()).provider(&provider).var("max_inflight", "2");
    let _worker = worker.start().await;
    wait_until_acknowledged(&stan, CHANNEL).await;
    assert_eq!((provider.call_count(), stan.messages("faas-request.later.1h").len()), (1, 20));
}

#[tokio::test]
async fn clients_cannot_set_internal_headers() {
    let directory = tempfile::TempDir::new().unwrap();
    let mut provider = fast_retry().start();
    let gateway = with_embedded_queue(&provider, directory.path()).start().await;
    gateway.enqueue("echo", &["X-Gateway-Attempts: 7", "X-Kept: 1"], "").await;
    let mut call = provider.next_call().await;
    let (kept, attempts) = (call.head.header("x-kept"), call.head.header("x-gateway-attempts"));
    assert_eq!((kept, attempts), (Some("1"), None));
    call.respond(200, "").await;
}
