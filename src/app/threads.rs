//! The process's main threads, and how their end is noticed.

use std::thread::JoinHandle;

use anyhow::Context;
use tokio::sync::mpsc;

/// A thread's name and main function.
pub(super) type ThreadMain = (String, Box<dyn FnOnce() + Send>);

/// The running threads.
pub(super) struct Threads {
    handles: Vec<JoinHandle<()>>,
    /// Receives a message from a thread that panics. Closed when the last thread has ended.
    exits: mpsc::Receiver<()>,
}

/// Held by a thread while it runs; reports a panic when it is dropped.
struct ThreadGuard(mpsc::Sender<()>);

impl Drop for ThreadGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // If the channel is full, another thread has reported a panic.
            let _ = self.0.try_send(());
        }
    }
}

impl Threads {
    /// Starts a thread for each of `mains`.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub(super) fn start(mains: impl IntoIterator<Item = ThreadMain>) -> anyhow::Result<Self> {
        let (guard, exits) = mpsc::channel(1);
        let start = |(name, work): ThreadMain| {
            let guard = ThreadGuard(guard.clone());
            std::thread::Builder::new().name(name).spawn(move || {
                work();
                drop(guard);
            })
        };
        let handles = mains.into_iter().map(start).collect::<Result<_, _>>();
        Ok(Self { handles: handles.context("cannot start a thread")?, exits })
    }

    /// Runs `work` as a task of the current runtime instead of a thread, with the same supervision.
    #[expect(clippy::disallowed_methods, reason = "the caller waits for it as for a thread")]
    pub(super) fn from_task(work: impl Future<Output = ()> + Send + 'static) -> Self {
        let (guard, exits) = mpsc::channel(1);
        let guard = ThreadGuard(guard);
        tokio::spawn(async move {
            work.await;
            drop(guard);
        });
        Self { handles: Vec::new(), exits }
    }

    /// Waits until a thread panics or all threads have ended, and returns a description. Neither happens before a
    /// shutdown unless something has failed.
    pub(super) async fn wait_for_failure(&mut self) -> &'static str {
        match self.exits.recv().await {
            Some(()) => "a main thread panicked",
            None => "all main threads have ended",
        }
    }

    /// Waits until every thread has ended.
    pub(super) async fn wait_for_all(&mut self) {
        while self.exits.recv().await.is_some() {}
    }

    /// Joins the threads. All must have ended.
    pub(super) fn join(self) {
        for thread in self.handles {
            if thread.join().is_err() {
                tracing::error!("A main thread panicked");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mains(mains: [fn(); 2]) -> Threads {
        let named = |work: fn()| -> ThreadMain { ("test".to_owned(), Box::new(work)) };
        Threads::start(mains.map(named)).unwrap()
    }

    #[tokio::test]
    async fn a_panicking_thread_is_noticed_while_others_run() {
        let runs_forever = || loop {
            std::thread::park();
        };
        let mut threads = mains([runs_forever, || panic!("expected by the test")]);
        assert_eq!(threads.wait_for_failure().await, "a main thread panicked");
    }

    #[tokio::test]
    async fn all_threads_have_ended_when_the_last_one_ends() {
        let mut threads = mains([|| (), || ()]);
        threads.wait_for_all().await;
        assert_eq!(threads.wait_for_failure().await, "all main threads have ended");
        threads.join();
    }
}
