//! Queued calls while gateway, worker and NATS server are killed repeatedly: every accepted call is executed, and only
//! those in flight at a kill are executed more than once. `make chaos` runs this with many calls and prints the counts
//! of each kind.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::support::connection::{Connection, post};
use crate::support::gateway::{Builder, Gateway};
use crate::support::nats::{Nats, free_port};
use crate::support::provider::Provider;
use crate::support::queue::{fast_retry, with_embedded_queue};
use crate::support::within;

const CLIENTS: usize = 32;
/// Concurrent executions, the default of `max_inflight`.
const CONCURRENCY: usize = 50;
/// Maximum time without progress: the calls of a killed worker are redelivered after `ack_wait`.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(40);

/// The number of calls, and of kills of each part.
fn size() -> (usize, usize) {
    match std::env::var("CHAOS_CALLS").ok().and_then(|calls| calls.parse().ok()) {
        Some(calls) => (calls, 3),
        None => (600, 1),
    }
}

/// Record of the calls, by id.
#[derive(Default)]
struct Tally {
    accepted: Mutex<Vec<String>>,
    executed: Mutex<HashMap<String, usize>>,
}

impl Tally {
    fn accepted(&self) -> usize {
        self.accepted.lock().unwrap().len()
    }

    /// Number of accepted calls that have not been executed.
    fn unexecuted(&self) -> usize {
        let executed = self.executed.lock().unwrap();
        self.accepted.lock().unwrap().iter().filter(|id| !executed.contains_key(*id)).count()
    }
}

/// A provider that records the executed calls.
fn recording_provider(tally: &Arc<Tally>) -> Provider {
    let tally = Arc::clone(tally);
    fast_retry()
        .handler(move |mut call| {
            let tally = Arc::clone(&tally);
            async move {
                call.read_body().await.ok()?;
                let id = call.head.header("x-call-id").unwrap_or_default().to_owned();
                *tally.executed.lock().unwrap().entry(id).or_insert(0) += 1;
                let response = "HTTP/1.1 200 X\r\nContent-Length: 4\r\n\r\ndone";
                // The client may have been killed.
                call.connection.try_send(response).await.ok()?;
                Some(call.connection)
            }
        })
        .start()
}

/// Enqueues calls sequentially until `calls` were accepted, whatever happens to the gateway meanwhile.
async fn enqueue_until(tally: Arc<Tally>, address: SocketAddr, calls: usize) {
    let body = "x".repeat(100);
    while tally.accepted() < calls {
        let Ok(tcp) = TcpStream::connect(address).await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let mut client = Connection::new(tcp);
        while tally.accepted() < calls {
            if client.try_send(post("/async-function/echo", &body)).await.is_err() {
                break;
            }
            match client.try_read_head().await {
                Some(head) if head.status() == 202 => {
                    let id = head.header("x-call-id").unwrap().to_owned();
                    tally.accepted.lock().unwrap().push(id);
                }
                // The queue is unavailable at the moment.
                Some(_) => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    break;
                }
                None => break,
            }
        }
    }
}

/// Waits until `holds` accepts `count`. It may take long, but the count must keep changing.
async fn wait_with_progress(what: &str, count: impl Fn() -> usize, holds: impl Fn(usize) -> bool) {
    let (mut last, mut since) = (count(), Instant::now());
    while !holds(last) {
        assert!(since.elapsed() < PROGRESS_TIMEOUT, "{what}: no progress at {last}");
        tokio::time::sleep(Duration::from_millis(10)).await;
        let now = count();
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
}

/// Enqueues calls while `kill` kills processes repeatedly; then checks each call.
async fn check_all_calls(
    queue: &str,
    tally: &Arc<Tally>,
    address: SocketAddr,
    kills: usize,
    mut kill: impl AsyncFnMut(usize),
) {
    let (calls, _) = size();
    let start = Instant::now();
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        clients.spawn(enqueue_until(Arc::clone(tally), address, calls));
    }
    for number in 0..kills {
        let enough = calls * (number + 1) / (kills + 1);
        wait_with_progress(
            "calls are accepted",
            || tally.accepted(),
            |accepted| accepted >= enough,
        )
        .await;
        kill(number).await;
    }
    wait_with_progress("calls are accepted", || tally.accepted(), |accepted| accepted >= calls)
        .await;
    clients.join_all().await;
    wait_with_progress(
        "accepted calls are executed",
        || tally.unexecuted(),
        |unexecuted| unexecuted == 0,
    )
    .await;
    let accepted = tally.accepted.lock().unwrap().clone();
    wait_until_succeeded(address, &accepted).await;
    let executed = tally.executed.lock().unwrap().clone();
    let more: Vec<usize> =
        accepted.iter().map(|id| executed[id]).filter(|times| *times > 1).collect();
    let (repeated, most) = (more.len(), more.iter().max().copied().unwrap_or(1));
    // A killed gateway may have stored a call without having responded.
    let unacknowledged = executed.len() - accepted.len();
    let took = start.elapsed().as_secs();
    println!(
        "{queue}: {} accepted, {kills} kills, 0 lost, {repeated} executed more than once (at most {most} times), \
         {unacknowledged} executed without a response to the client, {took} s",
        accepted.len(),
    );
    assert!(repeated <= kills * CONCURRENCY * 3, "{repeated} executed more than once");
    assert!(
        unacknowledged <= kills * CLIENTS,
        "{unacknowledged} executed without an accepted response"
    );
}

/// Waits until all these calls have succeeded.
async fn wait_until_succeeded(address: SocketAddr, ids: &[String]) {
    let mut checks = JoinSet::new();
    for part in ids.chunks(ids.len().div_ceil(8)) {
        let part = part.to_vec();
        checks.spawn(async move {
            let mut client = Connection::connect(address).await;
            for id in part {
                let start = Instant::now();
                loop {
                    let response = client.get(&format!("/async-function/{id}")).await;
                    // The state may be briefly unavailable (503).
                    if response.status() == 200 && response.json()["state"] == "succeeded" {
                        break;
                    }
                    assert!(start.elapsed() < PROGRESS_TIMEOUT, "{id}: {response}");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        });
    }
    checks.join_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_accepted_call_is_executed_while_a_gateway_with_an_embedded_queue_is_killed() {
    let (state, tally) = (tempfile::tempdir().unwrap(), Arc::new(Tally::default()));
    let (provider, port) = (recording_provider(&tally), free_port());
    let start =
        async || with_embedded_queue(&provider, state.path()).var("port", port).start().await;
    let mut gateway = Some(start().await);
    let address = gateway.as_ref().unwrap().address;
    check_all_calls("embedded", &tally, address, size().1, async |_| {
        gateway.take().unwrap().kill().await;
        gateway = Some(start().await);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_accepted_call_is_executed_while_gateway_worker_and_nats_are_killed() {
    let tally = Arc::new(Tally::default());
    let (mut nats, provider, port) = (Nats::start(), recording_provider(&tally), free_port());
    let nats_port = nats.port();
    let on_nats = |builder: Builder| {
        let builder = builder.provider(&provider).var("queue", "jetstream").var("ack_wait", "5s");
        builder.var("faas_nats_address", "127.0.0.1").var("faas_nats_port", nats_port)
    };
    let start_gateway = async || {
        let builder = on_nats(Gateway::builder()).var("with_worker", "false").var("port", port);
        builder.start().await
    };
    let start_worker = async || on_nats(Gateway::worker()).start().await;
    let mut gateway = Some(start_gateway().await);
    let mut worker = Some(start_worker().await);
    let address = gateway.as_ref().unwrap().address;
    check_all_calls("jetstream", &tally, address, 3 * size().1, async |number| match number % 3 {
        0 => {
            gateway.take().unwrap().kill().await;
            gateway = Some(start_gateway().await);
        }
        1 => {
            worker.take().unwrap().kill().await;
            worker = Some(start_worker().await);
        }
        _ => {
            nats.kill();
            nats.restart();
        }
    })
    .await;
    within("the worker stops", worker.take().unwrap().terminate()).await;
}
