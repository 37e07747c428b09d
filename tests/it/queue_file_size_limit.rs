//! A disk without room: nothing more is taken in, nothing is lost, and what is there is made.

use crate::support::eventually;
use crate::support::gateway::Gateway;
use crate::support::queue::{queueing, responding};
use tokio::sync::watch;

/// Queues calls of `echo` until there is no room for another; the ids of those that were taken in.
async fn until_full(gateway: &Gateway) -> Vec<String> {
    let (mut taken, body) = (Vec::new(), "x".repeat(100_000));
    loop {
        let answer = gateway.queue("echo", &[], &body).await;
        match answer.status() {
            202 => taken.push(answer.header("x-call-id").unwrap().to_owned()),
            507 => return taken,
            _ => panic!("{answer}"),
        }
        assert!(taken.len() < 1000, "it is never full");
    }
}

#[tokio::test]
async fn a_full_disk_takes_nothing_in_and_hinders_nothing_that_is_there() {
    let (state, open) = (tempfile::tempdir().unwrap(), watch::Sender::new(false));
    let provider = responding(*b"made", &open);
    let gateway = queueing(&provider, state.path()).var("max_inflight", "4").start().await;
    gateway.limit_files(Some(4 << 20));
    let taken = until_full(&gateway).await;
    assert!(taken.len() > 10, "{}", taken.len());
    for id in [&taken[0], taken.last().unwrap()] {
        assert_eq!(gateway.get(&format!("/async-function/{id}")).await.status(), 200);
    }
    open.send_replace(true);
    for id in &taken {
        gateway.becomes(id, "succeeded").await;
        assert_eq!(gateway.result(id).await.text(), "made");
    }
    gateway.limit_files(None);
    eventually("there is room", async || gateway.queue("echo", &[], "").await.status() == 202)
        .await;
    // It is whole after a crash on a full disk as well.
    open.send_replace(false);
    gateway.limit_files(Some(4 << 20));
    let last = until_full(&gateway).await;
    gateway.kill().await;
    open.send_replace(true);
    let gateway = queueing(&provider, state.path()).start().await;
    for id in taken.iter().chain(&last) {
        gateway.becomes(id, "succeeded").await;
    }
}
