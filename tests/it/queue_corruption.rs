//! A queue file with flipped bits: the error names the file and a remedy, without panic or hang, and what is readable
//! can be copied.

use std::collections::BTreeSet;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use tempfile::TempDir;
use tokio::sync::watch;

use crate::support::eventually;
use crate::support::gateway::{Gateway, command};
use crate::support::provider::Provider;
use crate::support::queue::{fast_retry, replying_when_open, replying_with, with_embedded_queue};

const BLOCK_SIZE: usize = 4096;
/// Longer than any command takes on a file of a few MB.
const RUN_TIMEOUT: Duration = Duration::from_secs(60);

/// A function that never responds, so that its calls stay in the file.
pub(crate) fn unresponsive_provider() -> Provider {
    let silent = |call| async move {
        let _held = call;
        std::future::pending().await
    };
    fast_retry().handler(silent).start()
}

/// A directory with a queue file that has `small` short and `large` long pending calls, and some finished ones; and the
/// ids of the pending ones.
pub(crate) async fn queue_with_calls(small: usize, large: usize) -> (TempDir, BTreeSet<String>) {
    let directory = TempDir::new().unwrap();
    let quick = replying_with(&[200], "made");
    let gateway = with_embedded_queue(&quick, directory.path()).start().await;
    for number in 0..20 {
        let id = gateway.enqueue("echo", &[], &format!("over {number}")).await;
        gateway.wait_for_state(&id, "succeeded").await;
    }
    assert_eq!(gateway.terminate().await.code(), Some(0));
    let silent = unresponsive_provider();
    let gateway =
        with_embedded_queue(&silent, directory.path()).var("shutdown_grace", "0s").start().await;
    let mut ids = BTreeSet::new();
    for number in 0..small {
        ids.insert(gateway.enqueue("echo", &[], &format!("small {number}")).await);
    }
    let body = "x".repeat(50_000);
    for _ in 0..large {
        ids.insert(gateway.enqueue("echo", &[], &body).await);
    }
    assert_eq!(gateway.terminate().await.code(), Some(0));
    (directory, ids)
}

pub(crate) fn queue_file(directory: &TempDir) -> PathBuf {
    directory.path().join("queue.redb")
}

/// A copy of `from` with `flips` applied.
fn copy_with_flips(from: &[u8], flips: &[usize]) -> TempDir {
    let directory = TempDir::new().unwrap();
    let mut bytes = from.to_vec();
    for position in flips {
        bytes[*position] ^= 1 << (position % 8);
    }
    std::fs::write(queue_file(&directory), bytes).unwrap();
    directory
}

pub(crate) async fn run(arguments: &[&str]) -> Output {
    let output = command().args(arguments).kill_on_drop(true).output();
    tokio::time::timeout(RUN_TIMEOUT, output).await.expect("the process exits").unwrap()
}

pub(crate) fn output_text(output: &Output) -> String {
    let of = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    of(&output.stdout) + &of(&output.stderr)
}

/// First number on the line that begins with `name`.
pub(crate) fn reported_count(output: &Output, name: &str) -> usize {
    let text = output_text(output);
    let line = text.lines().find_map(|line| line.strip_prefix(name)).expect("a log line");
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// Positions in used blocks of `bytes`, chosen by a fixed pseudo-random sequence.
fn positions(bytes: &[u8], count: usize) -> Vec<usize> {
    let used: Vec<usize> = (0..bytes.len() / BLOCK_SIZE)
        .filter(|block| bytes[block * BLOCK_SIZE..][..BLOCK_SIZE].iter().any(|byte| *byte != 0))
        .collect();
    let mut seed = 7_u64;
    let mut roll = move |sides: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % sides
    };
    // Half of them near the beginning of a page, which contains its header.
    (0..count)
        .map(|number| {
            let within = if number % 2 == 0 { roll(64) } else { roll(BLOCK_SIZE) };
            used[roll(used.len())] * BLOCK_SIZE + within
        })
        .collect()
}

#[tokio::test]
async fn an_intact_file_passes_the_check_and_is_copied() {
    let (directory, ids) = queue_with_calls(300, 5).await;
    let path = queue_file(&directory);
    let checked = run(&["queue", "check", path.to_str().unwrap()]).await;
    assert_eq!(checked.status.code(), Some(0), "{}", output_text(&checked));
    assert_eq!(reported_count(&checked, "calls: "), ids.len(), "{}", output_text(&checked));
    assert_eq!(reported_count(&checked, "results: "), 20);
    let out = TempDir::new().unwrap();
    let copy = queue_file(&out);
    let arguments = ["queue", "salvage", path.to_str().unwrap(), copy.to_str().unwrap()];
    let salvaged = run(&arguments).await;
    assert_eq!(salvaged.status.code(), Some(0), "{}", output_text(&salvaged));
    // An existing file is not overwritten.
    assert_eq!(run(&arguments).await.status.code(), Some(1));
    assert_executes_all(&out, &ids).await;
}

/// Asserts that a gateway on the queue in `directory` executes the calls with `ids`.
async fn assert_executes_all(directory: &TempDir, ids: &BTreeSet<String>) {
    let quick = replying_with(&[200], "made");
    let gateway = with_embedded_queue(&quick, directory.path()).start().await;
    for id in ids {
        gateway.wait_for_state(id, "succeeded").await;
    }
    assert_eq!(gateway.terminate().await.code(), Some(0));
}

#[tokio::test]
async fn a_flipped_bit_is_reported_and_the_rest_is_copied() {
    const FLIPS: usize = 40;
    let (directory, ids) = queue_with_calls(600, 20).await;
    let sound = std::fs::read(queue_file(&directory)).unwrap();
    let (mut found, mut copied) = (0, 0);
    for (number, position) in positions(&sound, FLIPS).into_iter().enumerate() {
        let damaged = copy_with_flips(&sound, &[position]);
        let path = queue_file(&damaged);
        let name = path.to_str().unwrap();
        let checked = run(&["queue", "check", name]).await;
        let is_sound = checked.status.code() == Some(0);
        if !is_sound {
            found += 1;
            assert_eq!(checked.status.code(), Some(1), "at {position}: {}", output_text(&checked));
            assert!(output_text(&checked).contains(name), "{}", output_text(&checked));
        }
        let out = TempDir::new().unwrap();
        let copy = queue_file(&out);
        let salvaged = run(&["queue", "salvage", name, copy.to_str().unwrap()]).await;
        if salvaged.status.code() == Some(0) {
            let calls = reported_count(&salvaged, "calls: ");
            assert!(calls <= ids.len(), "{calls} at {position}");
            copied += usize::from(calls * 2 >= ids.len());
            // The copy is intact.
            let again = run(&["queue", "check", copy.to_str().unwrap()]).await;
            assert_eq!(again.status.code(), Some(0), "at {position}: {}", output_text(&again));
            assert_eq!(reported_count(&again, "calls: "), calls);
        } else {
            assert_eq!(
                salvaged.status.code(),
                Some(1),
                "at {position}: {}",
                output_text(&salvaged)
            );
        }
        if number % 4 == 0 && !is_sound {
            assert_refuses_to_start(damaged.path(), name).await;
        }
    }
    assert!(found > FLIPS / 2, "{found} found");
    assert!(copied > FLIPS * 3 / 4, "{copied} copied for the most part");
}

/// Asserts that a gateway that starts on a damaged file exits and names the remedy.
async fn assert_refuses_to_start(state: &Path, name: &str) {
    let provider = unresponsive_provider();
    let started = with_embedded_queue(&provider, state).run_to_exit(&["serve"]).await;
    assert_eq!(started.status.code(), Some(1), "{}", output_text(&started));
    let text = output_text(&started);
    assert!(text.contains(name) && text.contains("gateway queue salvage"), "{text}");
    assert!(!text.contains("panicked"), "{text}");
}

/// Flips a bit in each occurrence of `needle` in the file at `path`. Returns the number of occurrences.
async fn flip_all_matches(path: &Path, needle: &str) -> usize {
    let found = tokio::process::Command::new("grep")
        .args(["--only-matching", "--byte-offset", "--text", "--fixed-strings", needle])
        .arg(path)
        .env("LC_ALL", "C")
        .output()
        .await
        .unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    let found = String::from_utf8(found.stdout).unwrap();
    found
        .lines()
        .map(|line| line.split_once(':').unwrap().0.parse().unwrap())
        .map(|position: u64| file.write_all_at(&[needle.as_bytes()[0] ^ 1], position).unwrap())
        .count()
}

#[tokio::test]
async fn a_damaged_call_is_skipped_and_the_others_are_executed() {
    let directory = TempDir::new().unwrap();
    let (open, executed) = (watch::Sender::new(false), watch::Sender::new(Vec::new()));
    let (gate, bodies) = (open.subscribe(), executed.clone());
    let provider = fast_retry()
        .handler(move |mut call| {
            let (mut gate, bodies) = (gate.clone(), bodies.clone());
            async move {
                let body = call.read_body().await.ok()?;
                gate.wait_for(|open| *open).await.ok()?;
                bodies.send_modify(|bodies| bodies.push(body[..8].to_vec()));
                call.send_response(200, b"made").await;
                Some(call.connection)
            }
        })
        .start();
    let gateway =
        with_embedded_queue(&provider, directory.path()).var("max_inflight", "1").start().await;
    // The file's cache holds the last few MB, and one call is being executed.
    let filler = "f".repeat(1 << 20);
    let first = gateway.enqueue("echo", &[], &format!("running {filler}")).await;
    let damaged = gateway.enqueue("echo", &[], &format!("damaged!{filler}")).await;
    let mut others = vec![first];
    for _ in 0..30 {
        others.push(gateway.enqueue("echo", &[], &format!("others..{filler}")).await);
    }
    assert!(flip_all_matches(&queue_file(&directory), "damaged!").await >= 1);
    open.send_replace(true);
    for id in &others {
        gateway.wait_for_state(id, "succeeded").await;
    }
    gateway.wait_for_log("A queued call is damaged and set aside").await;
    let is_logged = gateway.log().iter().any(|line| line.contains(&damaged));
    assert!(is_logged, "{:?}", gateway.log());
    assert_eq!(executed.borrow().len(), others.len());
    eventually("readiness reports it", async || {
        gateway.get("/_/ready").await.json()["degraded"]
            == serde_json::json!(["queue: damaged calls set aside"])
    })
    .await;
    let next = gateway.enqueue("echo", &[], "next....").await;
    gateway.wait_for_state(&next, "succeeded").await;
    // The damaged call can be cancelled and is not logged again, and the others are counted correctly.
    open.send_replace(false);
    assert_eq!(gateway.cancel(&damaged).await.status(), 204);
    assert_eq!(gateway.state(&damaged).await["state"], "cancelled");
    for _ in 0..2 {
        gateway.enqueue("echo", &[], "counted.").await;
    }
    eventually("one runs, and one waits", async || {
        let queue = &gateway.get("/system/queues").await.json()[0];
        (&queue["running"], &queue["pending"]) == (&1.into(), &1.into())
    })
    .await;
    eventually("readiness reports no problem", async || {
        gateway.get("/_/ready").await.json()["degraded"] == serde_json::json!([])
    })
    .await;
    open.send_replace(true);
}

/// Overwrites each block of the file but the first with noise.
fn corrupt(path: &Path) {
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    let length = file.metadata().unwrap().len();
    for block in 1..length / BLOCK_SIZE as u64 {
        file.write_all_at(&[0xa5; BLOCK_SIZE], block * BLOCK_SIZE as u64).unwrap();
    }
}

#[tokio::test]
async fn a_file_damaged_while_in_use_stops_the_queue_only() {
    let directory = TempDir::new().unwrap();
    let provider = replying_with(&[200], "made");
    let gateway = with_embedded_queue(&provider, directory.path()).start().await;
    let filler = "f".repeat(1 << 20);
    for _ in 0..20 {
        gateway.enqueue("echo", &["X-Delay-Seconds: 600"], &filler).await;
    }
    corrupt(&queue_file(&directory));
    eventually("the queue is unavailable", async || {
        gateway.get("/system/calls").await;
        gateway.send_async("echo", &[], "x").await.status() == 503
    })
    .await;
    eventually("readiness reports it", async || names_the_damage(&gateway).await).await;
    gateway.wait_for_log("gateway queue salvage").await;
    assert_eq!(gateway.post("/function/echo", "").await.status(), 200);
    assert_eq!(gateway.terminate().await.code(), Some(0));
}

async fn names_the_damage(gateway: &Gateway) -> bool {
    let ready = gateway.get("/_/ready").await;
    let degraded = ready.json()["degraded"].to_string();
    ready.status() == 200 && degraded.contains("queue: file damaged")
}

#[tokio::test]
async fn damaged_packed_calls_can_be_cancelled() {
    let directory = TempDir::new().unwrap();
    let open = watch::Sender::new(false);
    let provider = replying_when_open(*b"made", &open);
    let gateway =
        with_embedded_queue(&provider, directory.path()).var("max_inflight", "1").start().await;
    let first = gateway.enqueue("echo", &[], "first").await;
    // Small calls that arrive at the same time are packed into one batch.
    let (in_body, in_head, whole) = tokio::join!(
        gateway.enqueue("echo", &[], "damaged!"),
        gateway.enqueue("echo", &["X-Marker: head"], "x"),
        gateway.enqueue("echo", &[], "whole"),
    );
    assert!(flip_all_matches(&queue_file(&directory), "damaged!").await >= 1);
    // The flipped bit is in a quotation mark: the rest cannot be parsed.
    assert!(flip_all_matches(&queue_file(&directory), "\"x-marker\"").await >= 1);
    // The file's cache holds the last few MB, and frequently read pages for longer.
    let filler = "f".repeat(1 << 20);
    eventually("the file is reloaded", async || {
        for _ in 0..20 {
            gateway.enqueue("echo", &["X-Delay-Seconds: 600"], &filler).await;
        }
        gateway.get(&format!("/async-function/{in_head}")).await.status() == 404
    })
    .await;
    open.send_replace(true);
    for id in [&first, &whole] {
        gateway.wait_for_state(id, "succeeded").await;
    }
    eventually("both are set aside", async || {
        let set_aside = "A queued call is damaged and set aside";
        gateway.log().iter().filter(|line| line.contains(set_aside)).count() == 2
    })
    .await;
    assert_eq!(gateway.state(&in_body).await["state"], "queued");
    assert_eq!(gateway.cancel(&in_body).await.status(), 204);
    assert_eq!(gateway.state(&in_body).await["state"], "cancelled");
    // Only its sequence number is readable, so access by id cannot be checked. Operators can remove it.
    assert_eq!(gateway.cancel(&in_head).await.status(), 404);
    let path = format!("/system/calls/{in_head}");
    assert_eq!(gateway.request("DELETE", &path, &[]).await.status(), 204);
    assert_eq!(gateway.request("DELETE", &path, &[]).await.status(), 404);
    eventually("readiness reports no problem", async || {
        gateway.get("/_/ready").await.json()["degraded"] == serde_json::json!([])
    })
    .await;
    assert_eq!(gateway.state(&whole).await["state"], "succeeded");
}
