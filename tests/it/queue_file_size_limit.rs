//! A queue file that cannot grow: new calls are refused, nothing is lost, and accepted calls are executed.

use crate::support::eventually;
use crate::support::gateway::Gateway;
use crate::support::queue::{replying_when_open, with_embedded_queue};
use tokio::sync::watch;

/// Enqueues calls of `echo` until the file cannot grow. Returns the accepted ids.
async fn until_full(gateway: &Gateway) -> Vec<String> {
    let (mut accepted, body) = (Vec::new(), "x".repeat(100_000));
    loop {
        let response = gateway.send_async("echo", &[], &body).await;
        match response.status() {
            202 => accepted.push(response.header("x-call-id").unwrap().to_owned()),
            507 => return accepted,
            _ => panic!("{response}"),
        }
        assert!(accepted.len() < 1000, "the queue never fills up");
    }
}

#[tokio::test]
async fn a_queue_that_cannot_grow_refuses_calls_and_executes_the_accepted_ones() {
    let (state, open) = (tempfile::tempdir().unwrap(), watch::Sender::new(false));
    let provider = replying_when_open(*b"made", &open);
    let gateway =
        with_embedded_queue(&provider, state.path()).var("max_inflight", "4").start().await;
    gateway.limit_files(Some(4 << 20));
    let accepted = until_full(&gateway).await;
    assert!(accepted.len() > 10, "{}", accepted.len());
    for id in [&accepted[0], accepted.last().unwrap()] {
        assert_eq!(gateway.get(&format!("/async-function/{id}")).await.status(), 200);
    }
    open.send_replace(true);
    for id in &accepted {
        gateway.wait_for_state(id, "succeeded").await;
        assert_eq!(gateway.result(id).await.text(), "made");
    }
    gateway.limit_files(None);
    eventually("capacity is available", async || {
        gateway.send_async("echo", &[], "").await.status() == 202
    })
    .await;
    // The file is also intact after a crash at the limit.
    open.send_replace(false);
    gateway.limit_files(Some(4 << 20));
    let last = until_full(&gateway).await;
    gateway.kill().await;
    open.send_replace(true);
    let gateway = with_embedded_queue(&provider, state.path()).start().await;
    for id in accepted.iter().chain(&last) {
        gateway.wait_for_state(id, "succeeded").await;
    }
}
