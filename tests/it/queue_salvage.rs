//! `gateway queue check` and `gateway queue salvage` on files that are not damaged, and on disks that fail.

use std::io::Read;

use tempfile::TempDir;

use crate::queue_corruption::{count, file, queue_with, run, silent, text};
use crate::support::disk::Disk;
use crate::support::gateway::command_on;
use crate::support::queue::queueing;
use crate::support::{eventually, within};

#[tokio::test]
async fn a_copy_that_does_not_reach_the_disk_is_an_error() {
    let Some(disk) = Disk::ext4_on_tmpfs() else { return };
    // Fewer bytes than make the copy reach the disk before it is closed.
    let (directory, _) = queue_with(5, 3).await;
    // Its journal can be written, and nothing else.
    disk.write("copy.journal", &vec![0; 32 << 20]);
    disk.starve();
    let copy = disk.path().join("copy.redb");
    let mut command = command_on(&disk);
    command.args(["queue", "salvage"]).arg(file(&directory)).arg(&copy).kill_on_drop(true);
    let salvaged = within("a copy", command.output()).await.unwrap();
    let text = text(&salvaged);
    assert_eq!(salvaged.status.code(), Some(1), "{text}");
    assert!(text.contains(copy.to_str().unwrap()) && text.contains("incomplete"), "{text}");
    assert!(!text.contains("copied to"), "{text}");
}

/// The page with the header of a queue's file.
const HEADER: usize = 4096;

/// Whether `after` is one change later than `before`: of the two changes that a header names, the former is the last one
/// of `before`.
fn is_next(before: &[u8], after: &[u8]) -> bool {
    let slot = |file: &[u8], other: u8| match (file[9] & 1) ^ other {
        0 => file[64..192].to_vec(),
        _ => file[192..320].to_vec(),
    };
    slot(before, 0) == slot(after, 1)
}

#[tokio::test]
async fn a_change_that_was_cut_off_is_no_damage() {
    // There is no room for a journal.
    let Some(disk) = Disk::tmpfs(24) else { return };
    let (provider, state) = (silent(), disk.path().join("queue"));
    let gateway = queueing(&provider, &state).on(&disk).start().await;
    gateway.logs("There is no room for the queue's journal").await;
    let read = || {
        let mut bytes = Vec::new();
        disk.open("queue/queue.redb").read_to_end(&mut bytes).unwrap();
        bytes
    };
    let (mut queued, mut before, mut after) = (0, Vec::new(), Vec::new());
    eventually("a call is the only change", async || {
        before = read();
        gateway.queued("echo", &["X-Delay-Seconds: 600"], "kept").await;
        queued += 1;
        after = read();
        queued > 3 && is_next(&before, &after)
    })
    .await;
    gateway.kill().await;
    // The power fails when of the last change only the header is on the disk.
    let mut cut_off = before;
    cut_off.resize(after.len(), 0);
    cut_off[..HEADER].copy_from_slice(&after[..HEADER]);
    let directory = TempDir::new().unwrap();
    std::fs::write(file(&directory), cut_off).unwrap();
    let checked = run(&["queue", "check", file(&directory).to_str().unwrap()]).await;
    assert_eq!(checked.status.code(), Some(0), "{}", text(&checked));
    assert_eq!(count(&checked, "calls: "), queued - 1, "{}", text(&checked));
    assert!(text(&checked).contains("the last change did not reach the disk"));
    // The queue opens it in the same way.
    let gateway = queueing(&provider, directory.path()).start().await;
    let queues = gateway.get("/system/queues").await.json();
    assert_eq!(queues[0]["delayed"].as_u64().unwrap(), queued as u64 - 1, "{queues}");
    assert_eq!(gateway.terminate().await.code(), Some(0));
}
