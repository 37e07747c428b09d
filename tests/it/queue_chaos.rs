//! What becomes of queued calls while gateway, worker and NATS server are killed again and again: every call that was
//! accepted is made, and none more than once but those that were under way at a kill. `make chaos` does this with many
//! calls, and prints how many there were of each kind.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::support::gateway::{Builder, Gateway};
use crate::support::nats::{Nats, free_port};
use crate::support::provider::Provider;
use crate::support::queue::{patient, queueing};
use crate::support::wire::{Wire, post};
use crate::support::within;

const CALLERS: usize = 32;
/// Calls that are made at a time, the default of `max_inflight`.
const PLACES: usize = 50;
/// So long nothing may stand still: a killed worker's calls are taken by another after `ack_wait`.
const STILL: Duration = Duration::from_secs(40);

/// How many calls there are, and how often each part is killed.
fn size() -> (usize, usize) {
    match std::env::var("CHAOS_CALLS").ok().and_then(|calls| calls.parse().ok()) {
        Some(calls) => (calls, 3),
        None => (600, 1),
    }
}

/// What is known of the calls, by their ids.
#[derive(Default)]
struct Tally {
    accepted: Mutex<Vec<String>>,
    made: Mutex<HashMap<String, usize>>,
}

impl Tally {
    fn accepted(&self) -> usize {
        self.accepted.lock().unwrap().len()
    }

    /// How many accepted calls have not been made.
    fn unmade(&self) -> usize {
        let made = self.made.lock().unwrap();
        self.accepted.lock().unwrap().iter().filter(|id| !made.contains_key(*id)).count()
    }
}

/// A provider that notes which calls are made.
fn noting(tally: &Arc<Tally>) -> Provider {
    let tally = Arc::clone(tally);
    patient()
        .answering(move |mut call| {
            let tally = Arc::clone(&tally);
            async move {
                call.body().await.ok()?;
                let id = call.head.header("x-call-id").unwrap_or_default().to_owned();
                *tally.made.lock().unwrap().entry(id).or_insert(0) += 1;
                let answer = "HTTP/1.1 200 X\r\nContent-Length: 4\r\n\r\ndone";
                // Whoever asked may have been killed.
                call.wire.try_send(answer).await.ok()?;
                Some(call.wire)
            }
        })
        .start()
}

/// Queues one call after the other until `calls` were accepted, whatever happens to the gateway meanwhile.
async fn call_until(tally: Arc<Tally>, address: SocketAddr, calls: usize) {
    let body = "x".repeat(100);
    while tally.accepted() < calls {
        let Ok(tcp) = TcpStream::connect(address).await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let mut caller = Wire::new(tcp);
        while tally.accepted() < calls {
            if caller.try_send(post("/async-function/echo", &body)).await.is_err() {
                break;
            }
            match caller.try_head().await {
                Some(head) if head.status() == 202 => {
                    let id = head.header("x-call-id").unwrap().to_owned();
                    tally.accepted.lock().unwrap().push(id);
                }
                // The queue is away for the moment.
                Some(_) => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    break;
                }
                None => break,
            }
        }
    }
}

/// Waits until `count` is as `holds` wants it. It may take long, but not stand still.
async fn moves(what: &str, count: impl Fn() -> usize, holds: impl Fn(usize) -> bool) {
    let (mut last, mut since) = (count(), Instant::now());
    while !holds(last) {
        assert!(since.elapsed() < STILL, "{what}: it stands still at {last}");
        tokio::time::sleep(Duration::from_millis(10)).await;
        let now = count();
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
}

/// Queues calls and has `kill` kill something in between, so many times; then looks at what became of each call.
async fn account(
    queue: &str,
    tally: &Arc<Tally>,
    address: SocketAddr,
    kills: usize,
    mut kill: impl AsyncFnMut(usize),
) {
    let (calls, _) = size();
    let start = Instant::now();
    let mut callers = JoinSet::new();
    for _ in 0..CALLERS {
        callers.spawn(call_until(Arc::clone(tally), address, calls));
    }
    for number in 0..kills {
        let enough = calls * (number + 1) / (kills + 1);
        moves("calls are accepted", || tally.accepted(), |accepted| accepted >= enough).await;
        kill(number).await;
    }
    moves("calls are accepted", || tally.accepted(), |accepted| accepted >= calls).await;
    callers.join_all().await;
    moves("accepted calls are made", || tally.unmade(), |unmade| unmade == 0).await;
    let accepted = tally.accepted.lock().unwrap().clone();
    succeed(address, &accepted).await;
    let made = tally.made.lock().unwrap().clone();
    let more: Vec<usize> = accepted.iter().map(|id| made[id]).filter(|times| *times > 1).collect();
    let (repeated, most) = (more.len(), more.iter().max().copied().unwrap_or(1));
    // A gateway that is killed may have stored a call that it has not answered for yet.
    let untold = made.len() - accepted.len();
    let took = start.elapsed().as_secs();
    println!(
        "{queue}: {} accepted, {kills} kills, 0 lost, {repeated} made more than once (at most {most} times), \
         {untold} made that were not answered for, {took} s",
        accepted.len(),
    );
    assert!(repeated <= kills * PLACES * 3, "{repeated} made more than once");
    assert!(untold <= kills * CALLERS, "{untold} made that nobody has heard of");
}

/// Waits until all these calls have succeeded.
async fn succeed(address: SocketAddr, ids: &[String]) {
    let mut checks = JoinSet::new();
    for part in ids.chunks(ids.len().div_ceil(8)) {
        let part = part.to_vec();
        checks.spawn(async move {
            let mut asking = Wire::connect(address).await;
            for id in part {
                let start = Instant::now();
                loop {
                    let told = asking.get(&format!("/async-function/{id}")).await;
                    // Its state may not be to be had for a moment: 503.
                    if told.status() == 200 && told.json()["state"] == "succeeded" {
                        break;
                    }
                    assert!(start.elapsed() < STILL, "{id}: {told}");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        });
    }
    checks.join_all().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_accepted_call_is_made_however_often_a_gateway_with_a_file_is_killed() {
    let (state, tally) = (tempfile::tempdir().unwrap(), Arc::new(Tally::default()));
    let (provider, port) = (noting(&tally), free_port());
    let start = async || queueing(&provider, state.path()).var("port", port).start().await;
    let mut gateway = Some(start().await);
    let address = gateway.as_ref().unwrap().address;
    account("embedded", &tally, address, size().1, async |_| {
        gateway.take().unwrap().kill().await;
        gateway = Some(start().await);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_accepted_call_is_made_however_often_all_that_has_to_do_with_nats_is_killed() {
    let tally = Arc::new(Tally::default());
    let (mut nats, provider, port) = (Nats::start(), noting(&tally), free_port());
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
    account("jetstream", &tally, address, 3 * size().1, async |number| match number % 3 {
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
