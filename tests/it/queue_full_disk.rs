//! A queue that has filled its disk executes every call once, and accepts calls again afterwards.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tokio::sync::watch;

use crate::support::disk::Disk;
use crate::support::eventually;
use crate::support::gateway::{self, Gateway};
use crate::support::provider::Provider;
use crate::support::queue::{patient, queueing};
use crate::support::wire::request;

/// Long enough for some hundred calls on a machine that is busy with other tests.
const DRAINED_WITHIN: Duration = Duration::from_secs(120);

/// A function that waits until it is let go, and how often it executed each call.
struct Function {
    provider: Provider,
    open: watch::Sender<bool>,
    executed: Arc<Mutex<HashMap<String, usize>>>,
}

impl Function {
    /// One whose responses have `length` bytes.
    fn responding(length: usize) -> Self {
        let (open, executed) = (watch::Sender::new(false), Arc::<Mutex<HashMap<_, _>>>::default());
        let (gate, counts) = (open.subscribe(), Arc::clone(&executed));
        let provider = patient()
            .answering(move |mut call| {
                let (mut gate, counts) = (gate.clone(), Arc::clone(&counts));
                async move {
                    call.body().await.ok()?;
                    gate.wait_for(|open| *open).await.ok()?;
                    let id = call.head.header("x-call-id")?.to_owned();
                    *counts.lock().unwrap().entry(id).or_default() += 1;
                    call.answer_with(200, &vec![b'r'; length]).await;
                    Some(call.wire)
                }
            })
            .start();
        Self { provider, open, executed }
    }

    fn executed(&self) -> HashMap<String, usize> {
        self.executed.lock().unwrap().clone()
    }
}

/// A gateway whose queue is on `disk`. Calls that are held while the disk is filled do not time out: a call that timed out
/// would rightly be executed again.
fn queueing_on(disk: &Disk, provider: &Provider) -> gateway::Builder {
    queueing(provider, &disk.path().join("queue")).var("upstream_timeout", "10m").on(disk)
}

/// Queues calls of `length` bytes until there is no room for another; the ids of those that were accepted.
async fn until_full(gateway: &Gateway, length: usize) -> HashSet<String> {
    let (mut accepted, body) = (HashSet::new(), "x".repeat(length));
    let mut wire = gateway.connect().await;
    let deadline = Instant::now() + DRAINED_WITHIN;
    loop {
        let response = wire.ask(request("POST", "/async-function/echo", &[], &body)).await;
        match response.status() {
            202 => accepted.insert(response.header("x-call-id").unwrap().to_owned()),
            507 => return accepted,
            // The file is being opened again, which takes long on a busy machine.
            503 if Instant::now() < deadline => false,
            _ => panic!("{response}"),
        };
        assert!(accepted.len() < 100_000, "it is never full");
    }
}

async fn says_that_it_is_full(gateway: &Gateway) -> bool {
    let ready = gateway.get("/_/ready").await;
    assert_eq!(ready.status(), 200);
    ready.json()["degraded"] == serde_json::json!(["queue: disk full"])
}

fn executed_once(executed: &HashMap<String, usize>) {
    let repeated: Vec<_> = executed.iter().filter(|(_, times)| **times != 1).collect();
    assert!(repeated.is_empty(), "{repeated:?}");
}

/// Waits until no call waits or is executed.
async fn drained(gateway: &Gateway) {
    let start = Instant::now();
    loop {
        let queues = gateway.get("/system/queues").await;
        if queues.status() == 200 && !queues.text().contains("echo") {
            return;
        }
        assert!(
            start.elapsed() < DRAINED_WITHIN,
            "{queues} {:?}",
            gateway.log().iter().rev().take(8).collect::<Vec<_>>()
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn accepts_again(gateway: &Gateway, length: usize) {
    let body = "x".repeat(length);
    eventually("calls are accepted again", async || {
        gateway.queue("echo", &[], &body).await.status() == 202
    })
    .await;
    eventually("it is not degraded", async || {
        gateway.get("/_/ready").await.json()["degraded"] == serde_json::json!([])
    })
    .await;
}

/// Fills `disk` with calls of `body` bytes, and with the file of another program if `shared`; has them executed, kills
/// the gateway, and starts it again.
async fn fill_and_drain(disk: &Disk, body: usize, response: usize, shared: bool) {
    let function = Function::responding(response);
    let start = || queueing_on(disk, &function.provider).start();
    let gateway = start().await;
    let accepted = until_full(&gateway, body).await;
    assert!(accepted.len() > 3, "{}", accepted.len());
    if shared {
        disk.fill(u64::MAX);
    }
    function.open.send_replace(true);
    drained(&gateway).await;
    let executed = function.executed();
    assert!(accepted.iter().all(|id| executed.contains_key(id)));
    // One that was answered 503 may have been accepted all the same; it is executed once, too.
    executed_once(&executed);
    // That the calls are over is on the disk.
    gateway.kill().await;
    let gateway = start().await;
    drained(&gateway).await;
    if shared {
        disk.clear();
    }
    accepts_again(&gateway, body).await;
    drained(&gateway).await;
    let executed = function.executed();
    assert!(accepted.iter().all(|id| executed.get(id) == Some(&1)));
    assert_eq!(gateway.terminate().await.code(), Some(0));
}

#[tokio::test]
async fn large_calls_that_fill_a_disk_are_executed_once() {
    let Some(disk) = Disk::tmpfs(160) else { return };
    fill_and_drain(&disk, 1 << 20, 100, false).await;
}

#[tokio::test]
async fn large_responses_are_no_reason_to_stop() {
    let Some(disk) = Disk::tmpfs(96) else { return };
    fill_and_drain(&disk, 100_000, 900_000, false).await;
}

#[tokio::test]
async fn large_responses_that_come_together_do_not_use_up_the_reserve() {
    let Some(disk) = Disk::tmpfs(96) else { return };
    let function = Function::responding(900_000);
    let gateway = queueing_on(&disk, &function.provider).start().await;
    let accepted = until_full(&gateway, 100_000).await;
    // All of them arrive at the same pace once the gateway goes on, and are settled together.
    gateway.signal(Signal::STOP);
    let running = function.provider.calls();
    function.open.send_replace(true);
    eventually("all respond", async || function.executed().len() >= running).await;
    gateway.signal(Signal::CONT);
    drained(&gateway).await;
    let executed = function.executed();
    assert!(accepted.iter().all(|id| executed.contains_key(id)));
    executed_once(&executed);
    accepts_again(&gateway, 100_000).await;
}

#[tokio::test]
async fn small_calls_that_fill_a_disk_are_executed_once() {
    let Some(disk) = Disk::tmpfs(64) else { return };
    // What is left is filled by some thousand calls.
    disk.fill(18 << 20);
    fill_and_drain(&disk, 2000, 1500, false).await;
}

#[tokio::test]
async fn another_program_that_takes_what_is_left_is_no_reason_to_stop() {
    let Some(disk) = Disk::tmpfs(96) else { return };
    fill_and_drain(&disk, 300_000, 1000, true).await;
}

#[tokio::test]
async fn a_full_ext4_is_drained() {
    let Some(disk) = Disk::ext4(96) else { return };
    fill_and_drain(&disk, 300_000, 1000, true).await;
}

#[tokio::test]
async fn calls_on_a_disk_that_is_full_are_executed_after_a_restart() {
    let Some(disk) = Disk::tmpfs(96) else { return };
    let function = Function::responding(1000);
    let start = || queueing_on(&disk, &function.provider).start();
    let gateway = start().await;
    let mut accepted = until_full(&gateway, 300_000).await;
    disk.fill(u64::MAX);
    gateway.kill().await;
    let gateway = start().await;
    accepted.extend(until_full(&gateway, 300_000).await);
    function.open.send_replace(true);
    drained(&gateway).await;
    // Those that were being executed when the gateway was killed never got past the gate.
    let executed = function.executed();
    assert!(accepted.iter().all(|id| executed.contains_key(id)));
    disk.clear();
    accepts_again(&gateway, 300_000).await;
}

#[tokio::test]
async fn a_full_queue_without_a_reserve_uses_the_space_of_its_journal() {
    let Some(disk) = Disk::tmpfs(96) else { return };
    let function = Function::responding(1000);
    let start = || queueing_on(&disk, &function.provider).start();
    let gateway = start().await;
    let accepted = until_full(&gateway, 300_000).await;
    gateway.kill().await;
    // As a gateway left it that kept none.
    disk.remove("queue/queue.reserve");
    disk.fill(u64::MAX);
    let gateway = start().await;
    function.open.send_replace(true);
    drained(&gateway).await;
    let executed = function.executed();
    assert!(accepted.iter().all(|id| executed.contains_key(id)));
    disk.clear();
    accepts_again(&gateway, 300_000).await;
}

/// Fills `disk`, takes the blocks of the journal away and gives them to another program; whether the gateway is running
/// meanwhile or started afterwards, it executes what it has accepted.
async fn drain_with_a_sparse_journal(disk: &Disk, is_running: bool) {
    let function = Function::responding(1000);
    let start = || queueing_on(disk, &function.provider).start();
    let gateway = start().await;
    let accepted = until_full(&gateway, 300_000).await;
    let take_blocks = || {
        disk.make_sparse("queue/queue.journal");
        disk.fill(u64::MAX);
    };
    let gateway = if is_running {
        // Refusals are answered before the gateway has its file in order again.
        gateway.logs("The queue's file is open again").await;
        take_blocks();
        gateway
    } else {
        gateway.kill().await;
        take_blocks();
        start().await
    };
    function.open.send_replace(true);
    drained(&gateway).await;
    let executed = function.executed();
    assert!(accepted.iter().all(|id| executed.contains_key(id)));
    // A call that was being executed when the gateway was killed is executed again.
    assert!(!is_running || executed.values().all(|times| *times == 1), "{executed:?}");
    disk.clear();
    accepts_again(&gateway, 300_000).await;
}

#[tokio::test]
async fn a_sparse_journal_on_a_full_disk_does_not_stop_settlements() {
    let Some(disk) = Disk::tmpfs(96) else { return };
    drain_with_a_sparse_journal(&disk, true).await;
}

#[tokio::test]
async fn a_sparse_journal_on_a_full_disk_does_not_stop_a_start() {
    let Some(disk) = Disk::tmpfs(96) else { return };
    drain_with_a_sparse_journal(&disk, false).await;
}

#[tokio::test]
async fn a_sparse_journal_on_a_full_ext4_does_not_stop_a_start() {
    let Some(disk) = Disk::ext4(96) else { return };
    drain_with_a_sparse_journal(&disk, false).await;
}

#[tokio::test]
async fn readiness_names_a_full_disk_until_it_has_room() {
    let Some(disk) = Disk::tmpfs(96) else { return };
    let function = Function::responding(1);
    let gateway = queueing_on(&disk, &function.provider).start().await;
    disk.fill(u64::MAX);
    until_full(&gateway, 100_000).await;
    eventually("readiness names it", async || says_that_it_is_full(&gateway).await).await;
    disk.clear();
    eventually("it is not degraded", async || !says_that_it_is_full(&gateway).await).await;
    assert_eq!(gateway.queue("echo", &[], "x").await.status(), 202);
    function.open.send_replace(true);
}

#[tokio::test]
async fn the_reserve_is_allocated() {
    use std::os::unix::fs::MetadataExt;
    let Some(disk) = Disk::tmpfs(96) else { return };
    let function = Function::responding(1);
    let state = disk.path().join("queue");
    let _gateway = queueing(&function.provider, &state).on(&disk).start().await;
    let reserve = disk.open("queue/queue.reserve").metadata().unwrap();
    assert!(reserve.len() >= 8 << 20 && reserve.blocks() * 512 >= reserve.len());
}
