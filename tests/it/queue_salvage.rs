//! `gateway queue check` and `gateway queue salvage` on intact files, and on failing disks.

use std::io::Read;

use tempfile::TempDir;

use crate::queue_corruption::{
    output_text, queue_file, queue_with_calls, reported_count, run, unresponsive_provider,
};
use crate::support::disk::Disk;
use crate::support::gateway::command_on_disk;
use crate::support::queue::with_embedded_queue;
use crate::support::{eventually, within};

#[tokio::test]
async fn a_salvaged_copy_that_cannot_be_synced_is_an_error() {
    let Some(disk) = Disk::ext4_on_tmpfs() else { return };
    // Fewer bytes than would be written to the disk before the copy is closed.
    let (directory, _) = queue_with_calls(5, 3).await;
    // Its write-ahead log can be written, and nothing else.
    disk.write("copy.journal", &vec![0; 32 << 20]);
    disk.fill_backing_store();
    let copy = disk.path().join("copy.redb");
    let mut command = command_on_disk(&disk);
    command.args(["queue", "salvage"]).arg(queue_file(&directory)).arg(&copy).kill_on_drop(true);
    let salvaged = within("a copy", command.output()).await.unwrap();
    let text = output_text(&salvaged);
    assert_eq!(salvaged.status.code(), Some(1), "{text}");
    assert!(text.contains(copy.to_str().unwrap()) && text.contains("incomplete"), "{text}");
    assert!(!text.contains("copied to"), "{text}");
}

/// The page with the header of a queue file.
const HEADER: usize = 4096;

/// Returns whether `after` is one transaction later than `before`: of the two transactions that a header names, the
/// former is the last one of `before`.
fn is_next(before: &[u8], after: &[u8]) -> bool {
    let slot = |file: &[u8], other: u8| match (file[9] & 1) ^ other {
        0 => file[64..192].to_vec(),
        _ => file[192..320].to_vec(),
    };
    slot(before, 0) == slot(after, 1)
}

#[tokio::test]
async fn an_interrupted_write_is_no_damage() {
    // Too small for a write-ahead log.
    let Some(disk) = Disk::tmpfs(24) else { return };
    let (provider, state) = (unresponsive_provider(), disk.path().join("queue"));
    let gateway = with_embedded_queue(&provider, &state).on_disk(&disk).start().await;
    gateway.wait_for_log("There is no room for the queue's journal").await;
    let read = || {
        let mut bytes = Vec::new();
        disk.open("queue/queue.redb").read_to_end(&mut bytes).unwrap();
        bytes
    };
    let (mut queued, mut before, mut after) = (0, Vec::new(), Vec::new());
    eventually("a call is the only change", async || {
        before = read();
        gateway.enqueue("echo", &["X-Delay-Seconds: 600"], "kept").await;
        queued += 1;
        after = read();
        queued > 3 && is_next(&before, &after)
    })
    .await;
    gateway.kill().await;
    // A power failure when only the header of the last transaction is on the disk.
    let mut cut_off = before;
    cut_off.resize(after.len(), 0);
    cut_off[..HEADER].copy_from_slice(&after[..HEADER]);
    let directory = TempDir::new().unwrap();
    std::fs::write(queue_file(&directory), cut_off).unwrap();
    let checked = run(&["queue", "check", queue_file(&directory).to_str().unwrap()]).await;
    assert_eq!(checked.status.code(), Some(0), "{}", output_text(&checked));
    assert_eq!(reported_count(&checked, "calls: "), queued - 1, "{}", output_text(&checked));
    assert!(output_text(&checked).contains("the last change did not reach the disk"));
    // The queue opens it in the same way.
    let gateway = with_embedded_queue(&provider, directory.path()).start().await;
    let queues = gateway.get("/system/queues").await.json();
    assert_eq!(queues[0]["delayed"].as_u64().unwrap(), queued as u64 - 1, "{queues}");
    assert_eq!(gateway.terminate().await.code(), Some(0));
}
