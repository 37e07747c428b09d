//! What NATS Streaming cannot do, and messages that are no calls.

use crate::support::eventually;
use crate::support::fake_stan::{CHANNEL, Stan};
use crate::support::gateway::Gateway;
use crate::support::nats::Nats;
use crate::support::queue::{answering, patient};
use crate::support::stan_queue::{DEAD, all_done, on, tells};
use crate::support::wire::request;

#[tokio::test]
async fn a_message_that_is_no_call_holds_up_nobody() {
    let (nats, provider) = (Nats::start(), answering(&[200], "done"));
    let stan = Stan::start(&nats).await;
    // More headers than there is room for.
    let names: Vec<String> = (0..30_000).map(|n| format!(r#""h{n}":["1"]"#)).collect();
    let crowd = format!(r#"{{"Function":"echo","Header":{{{}}}}}"#, names.join(","));
    let dots = r#"{"Function":"echo","Path":"/%2e%2e/x"}"#;
    let outside = r#"{"Function":"../system","Header":{"X-Call-Id":["outside"]}}"#;
    for message in [outside, "7", dots, &crowd] {
        stan.store_message(CHANNEL, message.to_owned());
    }
    let worker = on(&nats, Gateway::worker()).provider(&provider).start().await;
    stan.store_message(CHANNEL, r#"{"Function":"echo"}"#);
    eventually("the call is made", async || provider.calls() == 1).await;
    all_done(&stan, CHANNEL).await;
    let (mut dead, queued) = (stan.messages(DEAD), stan.messages(CHANNEL));
    // They are stored side by side.
    dead.sort_by_key(|message| queued.iter().position(|it| it == message));
    assert_eq!(dead, queued[..4]);
    eventually("it is told of", async || {
        tells(&worker, "cannot be decoded was moved to", "outside")
    })
    .await;
}

#[tokio::test]
async fn what_cannot_be_done_is_said() {
    let (nats, provider) = (Nats::start(), patient().start());
    let stan = Stan::start(&nats).await;
    let gateway = on(&nats, Gateway::builder()).provider(&provider).var("with_worker", "false");
    let gateway = gateway.start().await;
    gateway.logs("Registered with NATS Streaming").await;
    gateway.logs("states, results, lists, cancelling").await;
    let id = gateway.queued("echo", &[], "").await;
    for (method, target) in [
        ("GET", format!("/async-function/{id}")),
        ("GET", format!("/async-function/{id}/result")),
        ("DELETE", format!("/async-function/{id}")),
        ("GET", "/system/queues".to_owned()),
        ("GET", "/system/calls".to_owned()),
        ("POST", format!("/system/calls/{id}/retry")),
        ("DELETE", format!("/system/calls/{id}")),
        ("POST", "/system/queues/purge?state=dead".to_owned()),
    ] {
        let answer = gateway.ask(method, &target, &[]).await;
        assert_eq!(answer.status(), 501, "{method} {target}: {answer}");
        assert!(answer.text().contains("NATS Streaming"), "{answer}");
    }
    assert_eq!(gateway.queue("echo", &["Idempotency-Key: a"], "").await.status(), 501);
    assert_eq!(stan.messages(CHANNEL).len(), 1);
    // A body that the server would not take is refused before it comes.
    let large = gateway.queue("echo", &[], &"x".repeat(700_000)).await;
    assert_eq!(large.status(), 202, "{large}");
    let mut wire = gateway.connect().await;
    let head = request("POST", "/async-function/echo", &["Content-Length: 900000"], "");
    wire.send(head.replace("Content-Length: 0\r\n", "")).await;
    assert_eq!(wire.answer().await.status(), 413);
}
