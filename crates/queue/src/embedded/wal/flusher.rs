//! Syncs the queue's file in the background.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use gateway_base::sync::lock_unpoisoned;

/// A thread that syncs the file on request.
#[derive(Debug)]
pub(super) struct Flusher {
    /// `None` when the thread is to end.
    requests: Option<SyncSender<()>>,
    failed: Arc<AtomicBool>,
    /// Locked by the thread during a sync. A leaf; `wal` may be held, to wait for a sync in progress.
    syncing: Arc<Mutex<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Flusher {
    pub(super) fn start(file: &File) -> io::Result<Self> {
        let (file, failed) = (file.try_clone()?, Arc::<AtomicBool>::default());
        let (requests, asked) = sync_channel(1);
        let fails = Arc::clone(&failed);
        let syncing = Arc::<Mutex<()>>::default();
        let syncs = Arc::clone(&syncing);
        let flush = move || {
            while asked.recv().is_ok() {
                let _syncing = lock_unpoisoned(&syncs);
                // The kernel reports a failed page write only once, so the error must be remembered.
                if let Err(error) = file.sync_data() {
                    tracing::error!(%error, "The queue's file cannot be synced to the disk");
                    fails.store(true, Relaxed);
                }
            }
        };
        let thread = std::thread::Builder::new().name("queue-flush".to_owned()).spawn(flush)?;
        Ok(Self { requests: Some(requests), failed, syncing, thread: Some(thread) })
    }

    /// Requests a sync and does not wait for it.
    pub(super) fn flush(&self) {
        if let Some(requests) = &self.requests {
            // One pending request is enough.
            let _ = requests.try_send(());
        }
    }

    /// Waits for a sync in progress: its error may be reported to no other sync.
    ///
    /// # Errors
    ///
    /// As [`Self::check`].
    pub(super) fn wait_for_sync(&self) -> io::Result<()> {
        drop(lock_unpoisoned(&self.syncing));
        self.check()
    }

    /// Returns the result of earlier syncs.
    ///
    /// # Errors
    ///
    /// When a sync failed. The log must be kept then.
    pub(super) fn check(&self) -> io::Result<()> {
        match self.failed.load(Relaxed) {
            true => Err(io::Error::other("the file could not be synced to the disk")),
            false => Ok(()),
        }
    }
}

impl Drop for Flusher {
    /// Waits for the thread: it holds the file open, and thereby its lock.
    fn drop(&mut self) {
        self.requests = None;
        if let Some(thread) = self.thread.take() {
            // A panic has been logged.
            let _ = thread.join();
        }
    }
}
