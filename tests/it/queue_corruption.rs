//! A queue's file with flipped bits: it is named with a remedy, never a panic or a hang, and what can be read is copied.

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
use crate::support::queue::{answering, patient, queueing, responding};

const BLOCK: usize = 4096;
/// No look at a file of a few MB takes longer.
const LONG: Duration = Duration::from_secs(60);

/// A function that answers nobody, so that its calls stay in the file.
pub(crate) fn silent() -> Provider {
    let silent = |call| async move {
        let _held = call;
        std::future::pending().await
    };
    patient().answering(silent).start()
}

/// A directory with the file of a queue: `small` calls of some bytes and `large` ones of many wait, and some are over.
/// With their ids.
pub(crate) async fn queue_with(small: usize, large: usize) -> (TempDir, BTreeSet<String>) {
    let directory = TempDir::new().unwrap();
    let quick = answering(&[200], "made");
    let gateway = queueing(&quick, directory.path()).start().await;
    for number in 0..20 {
        let id = gateway.queued("echo", &[], &format!("over {number}")).await;
        gateway.becomes(&id, "succeeded").await;
    }
    assert_eq!(gateway.terminate().await.code(), Some(0));
    let silent = silent();
    let gateway = queueing(&silent, directory.path()).var("shutdown_grace", "0s").start().await;
    let mut ids = BTreeSet::new();
    for number in 0..small {
        ids.insert(gateway.queued("echo", &[], &format!("small {number}")).await);
    }
    let body = "x".repeat(50_000);
    for _ in 0..large {
        ids.insert(gateway.queued("echo", &[], &body).await);
    }
    assert_eq!(gateway.terminate().await.code(), Some(0));
    (directory, ids)
}

pub(crate) fn file(directory: &TempDir) -> PathBuf {
    directory.path().join("queue.redb")
}

/// A copy of `from` with `flips` applied.
fn copy_with(from: &[u8], flips: &[usize]) -> TempDir {
    let directory = TempDir::new().unwrap();
    let mut bytes = from.to_vec();
    for position in flips {
        bytes[*position] ^= 1 << (position % 8);
    }
    std::fs::write(file(&directory), bytes).unwrap();
    directory
}

pub(crate) async fn run(arguments: &[&str]) -> Output {
    let output = command().args(arguments).kill_on_drop(true).output();
    tokio::time::timeout(LONG, output).await.expect("it ends").unwrap()
}

pub(crate) fn text(output: &Output) -> String {
    let of = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    of(&output.stdout) + &of(&output.stderr)
}

/// The first number on the line that begins with `name`.
pub(crate) fn count(output: &Output, name: &str) -> usize {
    let text = text(output);
    let line = text.lines().find_map(|line| line.strip_prefix(name)).expect("a line for it");
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// Positions in blocks of `bytes` that are in use, chosen in the same way each time.
fn positions(bytes: &[u8], count: usize) -> Vec<usize> {
    let used: Vec<usize> = (0..bytes.len() / BLOCK)
        .filter(|block| bytes[block * BLOCK..][..BLOCK].iter().any(|byte| *byte != 0))
        .collect();
    let mut seed = 7_u64;
    let mut roll = move |sides: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % sides
    };
    // Half of them near the beginning of a page, where it says how it is to be read.
    (0..count)
        .map(|number| {
            let within = if number % 2 == 0 { roll(64) } else { roll(BLOCK) };
            used[roll(used.len())] * BLOCK + within
        })
        .collect()
}

#[tokio::test]
async fn a_sound_file_is_called_sound_and_copied_whole() {
    let (directory, ids) = queue_with(300, 5).await;
    let path = file(&directory);
    let checked = run(&["queue", "check", path.to_str().unwrap()]).await;
    assert_eq!(checked.status.code(), Some(0), "{}", text(&checked));
    assert_eq!(count(&checked, "calls: "), ids.len(), "{}", text(&checked));
    assert_eq!(count(&checked, "results: "), 20);
    let out = TempDir::new().unwrap();
    let copy = file(&out);
    let arguments = ["queue", "salvage", path.to_str().unwrap(), copy.to_str().unwrap()];
    let salvaged = run(&arguments).await;
    assert_eq!(salvaged.status.code(), Some(0), "{}", text(&salvaged));
    // What is there already is not overwritten.
    assert_eq!(run(&arguments).await.status.code(), Some(1));
    executes_all(&out, &ids).await;
}

/// A gateway on the queue in `directory` executes the calls with `ids`.
async fn executes_all(directory: &TempDir, ids: &BTreeSet<String>) {
    let quick = answering(&[200], "made");
    let gateway = queueing(&quick, directory.path()).start().await;
    for id in ids {
        gateway.becomes(id, "succeeded").await;
    }
    assert_eq!(gateway.terminate().await.code(), Some(0));
}

#[tokio::test]
async fn wherever_a_bit_is_flipped_the_file_is_named_and_the_rest_is_copied() {
    const FLIPS: usize = 40;
    let (directory, ids) = queue_with(600, 20).await;
    let sound = std::fs::read(file(&directory)).unwrap();
    let (mut found, mut copied) = (0, 0);
    for (number, position) in positions(&sound, FLIPS).into_iter().enumerate() {
        let damaged = copy_with(&sound, &[position]);
        let path = file(&damaged);
        let name = path.to_str().unwrap();
        let checked = run(&["queue", "check", name]).await;
        let is_sound = checked.status.code() == Some(0);
        if !is_sound {
            found += 1;
            assert_eq!(checked.status.code(), Some(1), "at {position}: {}", text(&checked));
            assert!(text(&checked).contains(name), "{}", text(&checked));
        }
        let out = TempDir::new().unwrap();
        let copy = file(&out);
        let salvaged = run(&["queue", "salvage", name, copy.to_str().unwrap()]).await;
        if salvaged.status.code() == Some(0) {
            let calls = count(&salvaged, "calls: ");
            assert!(calls <= ids.len(), "{calls} at {position}");
            copied += usize::from(calls * 2 >= ids.len());
            // The copy is sound.
            let again = run(&["queue", "check", copy.to_str().unwrap()]).await;
            assert_eq!(again.status.code(), Some(0), "at {position}: {}", text(&again));
            assert_eq!(count(&again, "calls: "), calls);
        } else {
            assert_eq!(salvaged.status.code(), Some(1), "at {position}: {}", text(&salvaged));
        }
        if number % 4 == 0 && !is_sound {
            refuses_to_start(damaged.path(), name).await;
        }
    }
    assert!(found > FLIPS / 2, "{found} found");
    assert!(copied > FLIPS * 3 / 4, "{copied} copied for the most part");
}

/// A gateway that is started on a damaged file ends, and says what to do.
async fn refuses_to_start(state: &Path, name: &str) {
    let provider = silent();
    let started = queueing(&provider, state).output(&["serve"]).await;
    assert_eq!(started.status.code(), Some(1), "{}", text(&started));
    let text = text(&started);
    assert!(text.contains(name) && text.contains("gateway queue salvage"), "{text}");
    assert!(!text.contains("panicked"), "{text}");
}

/// Flips a bit wherever `needle` is in the file at `path`, and says how often.
async fn flip_all(path: &Path, needle: &str) -> usize {
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
async fn a_damaged_call_is_set_aside_and_the_others_are_executed() {
    let directory = TempDir::new().unwrap();
    let (open, executed) = (watch::Sender::new(false), watch::Sender::new(Vec::new()));
    let (gate, bodies) = (open.subscribe(), executed.clone());
    let provider = patient()
        .answering(move |mut call| {
            let (mut gate, bodies) = (gate.clone(), bodies.clone());
            async move {
                let body = call.body().await.ok()?;
                gate.wait_for(|open| *open).await.ok()?;
                bodies.send_modify(|bodies| bodies.push(body[..8].to_vec()));
                call.answer_with(200, b"made").await;
                Some(call.wire)
            }
        })
        .start();
    let gateway = queueing(&provider, directory.path()).var("max_inflight", "1").start().await;
    // The file's cache holds the last few MB, and one call is being executed.
    let filler = "f".repeat(1 << 20);
    let first = gateway.queued("echo", &[], &format!("running {filler}")).await;
    let damaged = gateway.queued("echo", &[], &format!("damaged!{filler}")).await;
    let mut others = vec![first];
    for _ in 0..30 {
        others.push(gateway.queued("echo", &[], &format!("others..{filler}")).await);
    }
    assert!(flip_all(&file(&directory), "damaged!").await >= 1);
    open.send_replace(true);
    for id in &others {
        gateway.becomes(id, "succeeded").await;
    }
    gateway.logs("A queued call is damaged and set aside").await;
    let told = gateway.log().iter().any(|line| line.contains(&damaged));
    assert!(told, "{:?}", gateway.log());
    assert_eq!(executed.borrow().len(), others.len());
    eventually("readiness names it", async || {
        gateway.get("/_/ready").await.json()["degraded"]
            == serde_json::json!(["queue: damaged calls set aside"])
    })
    .await;
    let next = gateway.queued("echo", &[], "next....").await;
    gateway.becomes(&next, "succeeded").await;
    // It can be cancelled, is not complained of any more, and the others are counted rightly.
    open.send_replace(false);
    assert_eq!(gateway.cancel(&damaged).await.status(), 204);
    assert_eq!(gateway.state(&damaged).await["state"], "cancelled");
    for _ in 0..2 {
        gateway.queued("echo", &[], "counted.").await;
    }
    eventually("one runs, and one waits", async || {
        let queue = &gateway.get("/system/queues").await.json()[0];
        (&queue["running"], &queue["pending"]) == (&1.into(), &1.into())
    })
    .await;
    eventually("readiness is content", async || {
        gateway.get("/_/ready").await.json()["degraded"] == serde_json::json!([])
    })
    .await;
    open.send_replace(true);
}

/// Overwrites each block of the file but the first with noise.
fn ruin(path: &Path) {
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    let length = file.metadata().unwrap().len();
    for block in 1..length / BLOCK as u64 {
        file.write_all_at(&[0xa5; BLOCK], block * BLOCK as u64).unwrap();
    }
}

#[tokio::test]
async fn a_file_that_is_damaged_while_it_is_used_stops_the_queue_and_nothing_else() {
    let directory = TempDir::new().unwrap();
    let provider = answering(&[200], "made");
    let gateway = queueing(&provider, directory.path()).start().await;
    let filler = "f".repeat(1 << 20);
    for _ in 0..20 {
        gateway.queued("echo", &["X-Delay-Seconds: 600"], &filler).await;
    }
    ruin(&file(&directory));
    eventually("the queue is unavailable", async || {
        gateway.get("/system/calls").await;
        gateway.queue("echo", &[], "x").await.status() == 503
    })
    .await;
    eventually("readiness names it", async || names_the_damage(&gateway).await).await;
    gateway.logs("gateway queue salvage").await;
    assert_eq!(gateway.post("/function/echo", "").await.status(), 200);
    assert_eq!(gateway.terminate().await.code(), Some(0));
}

async fn names_the_damage(gateway: &Gateway) -> bool {
    let ready = gateway.get("/_/ready").await;
    let degraded = ready.json()["degraded"].to_string();
    ready.status() == 200 && degraded.contains("queue: file damaged")
}

#[tokio::test]
async fn damaged_calls_in_rows_can_be_cancelled() {
    let directory = TempDir::new().unwrap();
    let open = watch::Sender::new(false);
    let provider = responding(*b"made", &open);
    let gateway = queueing(&provider, directory.path()).var("max_inflight", "1").start().await;
    let first = gateway.queued("echo", &[], "first").await;
    // Small calls that come at the same time are one row.
    let (in_body, in_head, whole) = tokio::join!(
        gateway.queued("echo", &[], "damaged!"),
        gateway.queued("echo", &["X-Marker: head"], "x"),
        gateway.queued("echo", &[], "whole"),
    );
    assert!(flip_all(&file(&directory), "damaged!").await >= 1);
    // A quotation mark: what is left cannot be parsed.
    assert!(flip_all(&file(&directory), "\"x-marker\"").await >= 1);
    // The file's cache holds the last few MB, and what is read often for longer.
    let filler = "f".repeat(1 << 20);
    eventually("the file is read again", async || {
        for _ in 0..20 {
            gateway.queued("echo", &["X-Delay-Seconds: 600"], &filler).await;
        }
        gateway.get(&format!("/async-function/{in_head}")).await.status() == 404
    })
    .await;
    open.send_replace(true);
    for id in [&first, &whole] {
        gateway.becomes(id, "succeeded").await;
    }
    eventually("both are set aside", async || {
        let set_aside = "A queued call is damaged and set aside";
        gateway.log().iter().filter(|line| line.contains(set_aside)).count() == 2
    })
    .await;
    assert_eq!(gateway.state(&in_body).await["state"], "queued");
    assert_eq!(gateway.cancel(&in_body).await.status(), 204);
    assert_eq!(gateway.state(&in_body).await["state"], "cancelled");
    // Only its number is known: whether its id opens it is not. Operators can remove it.
    assert_eq!(gateway.cancel(&in_head).await.status(), 404);
    let path = format!("/system/calls/{in_head}");
    assert_eq!(gateway.ask("DELETE", &path, &[]).await.status(), 204);
    assert_eq!(gateway.ask("DELETE", &path, &[]).await.status(), 404);
    eventually("readiness is content", async || {
        gateway.get("/_/ready").await.json()["degraded"] == serde_json::json!([])
    })
    .await;
    assert_eq!(gateway.state(&whole).await["state"], "succeeded");
}
