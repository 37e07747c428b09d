//! Operations that NATS Streaming does not support, and messages that are no calls.

use crate::support::connection::request;
use crate::support::eventually;
use crate::support::fake_stan::{CHANNEL, FakeStan};
use crate::support::gateway::Gateway;
use crate::support::nats::Nats;
use crate::support::queue::{fast_retry, replying_with};
use crate::support::stan_queue::{DEAD_LETTERS, logs_call, on_stan, wait_until_acknowledged};

#[tokio::test]
async fn an_undecodable_message_does_not_block_other_calls() {
    let (nats, provider) = (Nats::start(), replying_with(&[200], "done"));
    let stan = FakeStan::start(&nats).await;
    // More headers than allowed.
    let names: Vec<String> = (0..30_000).map(|n| format!(r#""h{n}":["1"]"#)).collect();
    let crowd = format!(r#"{{"Function":"echo","Header":{{{}}}}}"#, names.join(","));
    let dots = r#"{"Function":"echo","Path":"/%2e%2e/x"}"#;
    let outside = r#"{"Function":"../system","Header":{"X-Call-Id":["outside"]}}"#;
    for message in [outside, "7", dots, &crowd] {
        stan.store_message(CHANNEL, message.to_owned());
    }
    let worker = on_stan(&nats, Gateway::worker()).provider(&provider).start().await;
    stan.store_message(CHANNEL, r#"{"Function":"echo"}"#);
    eventually("the call is executed", async || provider.call_count() == 1).await;
    wait_until_acknowledged(&stan, CHANNEL).await;
    let (mut dead, queued) = (stan.messages(DEAD_LETTERS), stan.messages(CHANNEL));
    // They are published concurrently.
    dead.sort_by_key(|message| queued.iter().position(|other| other == message));
    assert_eq!(dead, queued[..4]);
    eventually("the message is logged", async || {
        logs_call(&worker, "cannot be decoded was moved to", "outside")
    })
    .await;
}

#[tokio::test]
async fn unsupported_operations_are_a_501() {
    let (nats, provider) = (Nats::start(), fast_retry().start());
    let stan = FakeStan::start(&nats).await;
    let gateway =
        on_stan(&nats, Gateway::builder()).provider(&provider).var("with_worker", "false");
    let gateway = gateway.start().await;
    gateway.wait_for_log("Registered with NATS Streaming").await;
    gateway.wait_for_log("states, results, lists, cancelling").await;
    let id = gateway.enqueue("echo", &[], "").await;
    let (state, change, list) = (
        "does not store the state of calls",
        "cannot change queued calls",
        "cannot list queued calls",
    );
    for (method, target, text) in [
        ("GET", format!("/async-function/{id}"), state),
        ("GET", format!("/async-function/{id}/result"), state),
        ("DELETE", format!("/async-function/{id}"), state),
        ("GET", "/system/queues".to_owned(), list),
        ("GET", "/system/calls".to_owned(), list),
        ("POST", format!("/system/calls/{id}/retry"), change),
        ("DELETE", format!("/system/calls/{id}"), change),
        ("POST", "/system/queues/purge?state=dead".to_owned(), list),
    ] {
        let response = gateway.request(method, &target, &[]).await;
        assert_eq!(response.status(), 501, "{method} {target}: {response}");
        let text = format!("the queue does not support this: NATS Streaming {text}\n");
        assert_eq!(response.text(), text, "{method} {target}");
    }
    let keyed = gateway.send_async("echo", &["Idempotency-Key: a"], "").await;
    assert_eq!(keyed.status(), 501);
    let text = "the queue does not support this: NATS Streaming does not detect duplicates (call ";
    assert!(keyed.text().starts_with(text), "{keyed}");
    assert_eq!(stan.messages(CHANNEL).len(), 1);
    // A body above the server's limit is refused before it is sent.
    let large = gateway.send_async("echo", &[], &"x".repeat(700_000)).await;
    assert_eq!(large.status(), 202, "{large}");
    let mut connection = gateway.connect().await;
    let head = request("POST", "/async-function/echo", &["Content-Length: 900000"], "");
    connection.send(head.replace("Content-Length: 0\r\n", "")).await;
    assert_eq!(connection.read_response().await.status(), 413);
}
