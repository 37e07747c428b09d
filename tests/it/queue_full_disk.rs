//! A queue that has filled its disk executes every call once, and accepts calls again afterwards.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tokio::sync::watch;

use crate::support::connection::request;
use crate::support::disk::Disk;
use crate::support::eventually;
use crate::support::gateway::{self, Gateway};
use crate::support::provider::Provider;
use crate::support::queue::{fast_retry, with_embedded_queue};

/// Long enough for some hundred calls on a machine that is busy with other tests.
const DRAINED_WITHIN: Duration = Duration::from_secs(120);

/// A function that waits until it is released, and counts the executions of each call.
struct Function {
    provider: Provider,
    open: watch::Sender<bool>,
    executed: Arc<Mutex<HashMap<String, usize>>>,
}

impl Function {
    /// A function whose responses have `length` bytes.
    fn responding(length: usize) -> Self {
        let (open, executed) = (watch::Sender::new(false), Arc::<Mutex<HashMap<_, _>>>::default());
        let (gate, counts) = (open.subscribe(), Arc::clone(&executed));
        let provider = fast_retry()
            .handler(move |mut call| {
                let (mut gate, counts) = (gate.clone(), Arc::clone(&counts));
                async move {
                    call.read_body().await.ok()?;
                    gate.wait_for(|open| *open).await.ok()?;
                    let id = call.head.header("x-call-id")?.to_owned();
                    *counts.lock().unwrap().entry(id).or_default() += 1;
                    call.send_response(200, &vec![b'r'; length]).await;
                    Some(call.connection)
                }
            })
            .start();
        Self { provider, open, executed }
    }

    fn executed(&self) -> HashMap<String, usize> {
        self.executed.lock().unwrap().clone()
    }
}

/// A gateway whose queue is on `disk`. Calls that are held while the disk is filled do not time out: a call that timed
/// out would rightly be executed again.
fn with_queue_on(disk: &Disk, provider: &Provider) -> gateway::Builder {
    with_embedded_queue(provider, &disk.path().join("queue"))
        .var("upstream_timeout", "10m")
        .on_disk(disk)
}

/// Enqueues calls of `length` bytes until the disk is full. Returns the accepted ids.
async fn until_full(gateway: &Gateway, length: usize) -> HashSet<String> {
    let (mut accepted, body) = (HashSet::new(), "x".repeat(length));
    let mut connection = gateway.connect().await;
    let deadline = Instant::now() + DRAINED_WITHIN;
    loop {
        let response =
            connection.exchange(request("POST", "/async-function/echo", &[], &body)).await;
        match response.status() {
            202 => accepted.insert(response.header("x-call-id").unwrap().to_owned()),
            507 => return accepted,
            // The file is being reopened, which takes long on a busy machine.
            503 if Instant::now() < deadline => false,
            _ => panic!("{response}"),
        };
        assert!(accepted.len() < 100_000, "the queue never fills up");
    }
}

async fn reports_full_disk(gateway: &Gateway) -> bool {
    let ready = gateway.get("/_/ready").await;
    assert_eq!(ready.status(), 200);
    ready.json()["degraded"] == serde_json::json!(["queue: disk full"])
}

fn assert_executed_once(executed: &HashMap<String, usize>) {
    let repeated: Vec<_> = executed.iter().filter(|(_, times)| **times != 1).collect();
    assert!(repeated.is_empty(), "{repeated:?}");
}

/// Waits until no call is pending or running.
async fn wait_until_drained(gateway: &Gateway) {
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

async fn assert_accepts_again(gateway: &Gateway, length: usize) {
    let body = "x".repeat(length);
    eventually("calls are accepted again", async || {
        gateway.send_async("echo", &[], &body).await.status() == 202
    })
    .await;
    eventually("the gateway is not degraded", async || {
        gateway.get("/_/ready").await.json()["degraded"] == serde_json::json!([])
    })
    .await;
}

/// Fills `disk` with calls of `body` bytes, and with the file of another program if `shared`. Has the calls executed,
/// kills the gateway, and restarts it.
async fn fill_and_drain(disk: &Disk, body: usize, response: usize, shared: bool) {
    let function = Function::responding(response);
    let start = || with_queue_on(disk, &function.provider).start();
    let gateway = start().await;
    let accepted = until_full(&gateway, body).await;
    assert!(accepted.len() > 3, "{}", accepted.len());
    if shared {
        disk.fill(u64::MAX);
    }
    function.open.send_replace(true);
    wait_until_drained(&gateway).await;
    let executed = function.executed();
    assert!(accepted.iter().all(|id| executed.contains_key(id)));
    // A call that was answered 503 may have been accepted; it is executed once, too.
    assert_executed_once(&executed);
    // The final states are on the disk.
    gateway.kill().await;
    let gateway = start().await;
    wait_until_drained(&gateway).await;
    if shared {
        disk.clear();
    }
    assert_accepts_again(&gateway, body).await;
    wait_until_drained(&gateway).await;
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
async fn large_responses_do_not_stop_a_full_queue() {
    let Some(disk) = Disk::tmpfs(96) else { return };
    fill_and_drain(&disk, 100_000, 900_000, false).await;
}

#[tokio::test]
async fn simultaneous_large_responses_do_not_use_up_the_reserve() {
    let Some(disk) = Disk::tmpfs(96) else { return };
    let function = Function::responding(900_000);
    let gateway = with_queue_on(&disk, &function.provider).start().await;
    let accepted = until_full(&gateway, 100_000).await;
    // All responses arrive at the same time once the gateway continues, and are settled together.
    gateway.signal(Signal::STOP);
    let running = function.provider.call_count();
    function.open.send_replace(true);
    eventually("all respond", async || function.executed().len() >= running).await;
    gateway.signal(Signal::CONT);
    wait_until_drained(&gateway).await;
    let executed = function.executed();
    assert!(accepted.iter().all(|id| executed.contains_key(id)));
    assert_executed_once(&executed);
    assert_accepts_again(&gateway, 100_000).await;
}

#[tokio::test]
async fn small_calls_that_fill_a_disk_are_executed_once() {
    let Some(disk) = Disk::tmpfs(64) else { return };
    // The rest is filled by some thousand calls.
    disk.fill(18 << 20);
    fill_and_drain(&disk, 2000, 1500, false).await;
}

#[tokio::test]
async fn a_disk_filled_by_another_program_does_not_stop_the_queue() {
    let Some(disk) = Disk::tmpfs(96) else { return };
    fill_and_drain(&disk, 300_000, 1000, true).await;
}

#[tokio::test]
async fn a_queue_on_a_full_ext4_is_drained() {
    let Some(disk) = Disk::ext4(96) else { return };
    fill_and_drain(&disk, 300_000, 1000, true).await;
}

#[tokio::test]
async fn calls_on_a_full_disk_are_executed_after_a_restart() {
    let Some(disk) = Disk::tmpfs(96) else { return };
    let function = Function::responding(1000);
    let start = || with_queue_on(&disk, &function.provider).start();
    let gateway = start().await;
    let mut accepted = until_full(&gateway, 300_000).await;
    disk.fill(u64::MAX);
    gateway.kill().await;
    let gateway = start().await;
    accepted.extend(until_full(&gateway, 300_000).await);
    function.open.send_replace(true);
    wait_until_drained(&gateway).await;
    // Calls that were running when the gateway was killed never passed the gate.
    let executed = function.executed();
    assert!(accepted.iter().all(|id| executed.contains_key(id)));
    disk.clear();
    assert_accepts_again(&gateway, 300_000).await;
}

#[tokio::test]
async fn a_full_queue_without_a_reserve_uses_the_space_of_its_write_ahead_log() {
    let Some(disk) = Disk::tmpfs(96) else { return };
    let function = Function::responding(1000);
    let start = || with_queue_on(&disk, &function.provider).start();
    let gateway = start().await;
    let accepted = until_full(&gateway, 300_000).await;
    gateway.kill().await;
    // As an older gateway without a reserve would have left it.
    disk.remove("queue/queue.reserve");
    disk.fill(u64::MAX);
    let gateway = start().await;
    function.open.send_replace(true);
    wait_until_drained(&gateway).await;
    let executed = function.executed();
    assert!(accepted.iter().all(|id| executed.contains_key(id)));
    disk.clear();
    assert_accepts_again(&gateway, 300_000).await;
}

/// Fills `disk`, makes the write-ahead log sparse and gives its blocks to another program. The gateway, running
/// meanwhile or started afterwards, executes all accepted calls.
async fn drain_with_a_sparse_journal(disk: &Disk, is_running: bool) {
    let function = Function::responding(1000);
    let start = || with_queue_on(disk, &function.provider).start();
    let gateway = start().await;
    let accepted = until_full(&gateway, 300_000).await;
    let take_blocks = || {
        disk.make_sparse("queue/queue.journal");
        disk.fill(u64::MAX);
    };
    let gateway = if is_running {
        // Refusals are sent before the gateway has reopened its file.
        gateway.wait_for_log("The queue's file is open again").await;
        take_blocks();
        gateway
    } else {
        gateway.kill().await;
        take_blocks();
        start().await
    };
    function.open.send_replace(true);
    wait_until_drained(&gateway).await;
    let executed = function.executed();
    assert!(accepted.iter().all(|id| executed.contains_key(id)));
    // A call that was running when the gateway was killed is executed again.
    assert!(!is_running || executed.values().all(|times| *times == 1), "{executed:?}");
    disk.clear();
    assert_accepts_again(&gateway, 300_000).await;
}

#[tokio::test]
async fn a_sparse_write_ahead_log_on_a_full_disk_does_not_stop_settlements() {
    let Some(disk) = Disk::tmpfs(96) else { return };
    drain_with_a_sparse_journal(&disk, true).await;
}

#[tokio::test]
async fn a_sparse_write_ahead_log_on_a_full_disk_does_not_stop_a_start() {
    let Some(disk) = Disk::tmpfs(96) else { return };
    drain_with_a_sparse_journal(&disk, false).await;
}

#[tokio::test]
async fn a_sparse_write_ahead_log_on_a_full_ext4_does_not_stop_a_start() {
    let Some(disk) = Disk::ext4(96) else { return };
    drain_with_a_sparse_journal(&disk, false).await;
}

#[tokio::test]
async fn readiness_reports_a_full_disk_until_it_has_space() {
    let Some(disk) = Disk::tmpfs(96) else { return };
    let function = Function::responding(1);
    let gateway = with_queue_on(&disk, &function.provider).start().await;
    disk.fill(u64::MAX);
    until_full(&gateway, 100_000).await;
    eventually("readiness reports it", async || reports_full_disk(&gateway).await).await;
    disk.clear();
    eventually("the gateway is not degraded", async || !reports_full_disk(&gateway).await).await;
    assert_eq!(gateway.send_async("echo", &[], "x").await.status(), 202);
    function.open.send_replace(true);
}

#[tokio::test]
async fn the_reserve_file_occupies_disk_blocks() {
    use std::os::unix::fs::MetadataExt;
    let Some(disk) = Disk::tmpfs(96) else { return };
    let function = Function::responding(1);
    let state = disk.path().join("queue");
    let _gateway = with_embedded_queue(&function.provider, &state).on_disk(&disk).start().await;
    let reserve = disk.open("queue/queue.reserve").metadata().unwrap();
    assert!(reserve.len() >= 8 << 20 && reserve.blocks() * 512 >= reserve.len());
}
