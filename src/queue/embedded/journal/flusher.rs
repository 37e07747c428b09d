//! Writes the queue's file to the disk while commits go on.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// A thread that does so when it is asked to.
#[derive(Debug)]
pub(super) struct Flusher {
    /// `None` once the thread is to end.
    asks: Option<SyncSender<()>>,
    failed: Arc<AtomicBool>,
    /// Locked by the thread while it writes the file to the disk.
    syncing: Arc<Mutex<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Flusher {
    pub(super) fn start(file: &File) -> io::Result<Self> {
        let (file, failed) = (file.try_clone()?, Arc::<AtomicBool>::default());
        let (asks, asked) = sync_channel(1);
        let fails = Arc::clone(&failed);
        let syncing = Arc::<Mutex<()>>::default();
        let syncs = Arc::clone(&syncing);
        let flush = move || {
            while asked.recv().is_ok() {
                let _syncing = syncs.lock().unwrap_or_else(PoisonError::into_inner);
                // The system reports a page that it could not write once, and this was the report.
                if let Err(error) = file.sync_data() {
                    tracing::error!(%error, "The queue's file cannot be written to the disk");
                    fails.store(true, Relaxed);
                }
            }
        };
        let thread = std::thread::Builder::new().name("queue-flush".to_owned()).spawn(flush)?;
        Ok(Self { asks: Some(asks), failed, syncing, thread: Some(thread) })
    }

    /// Asks for it, and does not wait.
    pub(super) fn flush(&self) {
        if let Some(asks) = &self.asks {
            // If it has been asked for before, that is enough.
            let _ = asks.try_send(());
        }
    }

    /// Waits for a sync that is in progress: its error may be one that no other sync of the file returns.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub(super) fn finish(&self) -> io::Result<()> {
        drop(self.syncing.lock().unwrap_or_else(PoisonError::into_inner));
        self.check()
    }

    /// # Errors
    /// When something could not be written. What the journal has is needed then.
    pub(super) fn check(&self) -> io::Result<()> {
        match self.failed.load(Relaxed) {
            true => Err(io::Error::other("the file could not be written to the disk")),
            false => Ok(()),
        }
    }
}

impl Drop for Flusher {
    /// Waits for the thread: it has the file open, and so locked.
    fn drop(&mut self) {
        self.asks = None;
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has been heard of.
            let _ = thread.join();
        }
    }
}
