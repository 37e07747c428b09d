//! What goes on beside the calls to a queue.

use tokio::runtime::Handle as Runtime;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::shutdown::supervise;

/// The tasks, and the one signal that ends them.
pub(super) struct Tasks {
    tracker: TaskTracker,
    pub(super) stopping: CancellationToken,
    runtime: Runtime,
}

impl Tasks {
    pub(super) fn new() -> Self {
        Self {
            tracker: TaskTracker::new(),
            stopping: CancellationToken::new(),
            runtime: Runtime::current(),
        }
    }

    /// Runs `task` until it ends or the queue is stopped.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let stopping = self.stopping.clone();
        let task = async move {
            tokio::select! {
                () = stopping.cancelled() => {}
                () = task => {}
            }
        };
        self.tracker.spawn_on(task, &self.runtime);
    }

    /// Runs what others rely on until it ends or the queue is stopped: if it breaks, it is begun anew, since nobody
    /// else would notice that it is gone.
    pub(super) fn supervise<F>(&self, name: &'static str, task: impl Fn() -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.spawn(supervise(name, self.stopping.clone(), task));
    }

    /// The same for what has something to do when the queue is stopped, and ends by itself then.
    pub(super) fn supervise_to_end<F>(
        &self,
        name: &'static str,
        task: impl Fn() -> F + Send + 'static,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        self.spawn_to_completion(supervise(name, self.stopping.clone(), task));
    }

    /// Runs `task`, which ends soon by itself. Who stops the queue waits for it.
    pub(super) fn spawn_to_completion(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tracker.spawn_on(task, &self.runtime);
    }

    /// Asks all to end.
    pub(super) fn stop(&self) {
        self.stopping.cancel();
        self.tracker.close();
    }

    /// Waits until all have ended.
    pub(super) async fn wait(&self) {
        self.tracker.wait().await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_task_that_breaks_is_begun_anew_and_ends_with_the_queue() {
        let tasks = Tasks::new();
        let begun = Arc::new(AtomicUsize::new(0));
        let counts = Arc::clone(&begun);
        tasks.supervise("test", move || {
            let number = counts.fetch_add(1, SeqCst);
            async move { assert_eq!(number, 2, "it breaks") }
        });
        tasks.tracker.close();
        tasks.wait().await;
        assert_eq!(begun.load(SeqCst), 3);
        tasks.supervise("test", || async { panic!("it breaks") });
        tasks.supervise_to_end("test", || async { panic!("it breaks") });
        tokio::task::yield_now().await;
        tasks.stop();
        tasks.wait().await;
    }
}
