//! Background tasks of a queue.

use tokio::runtime::Handle as Runtime;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use gateway_base::shutdown::supervise;

/// The tasks, and the signal that stops them.
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

    /// Runs `task` until it ends or the queue is stopped, and restarts it after a panic: other parts of the queue
    /// depend on it.
    pub(super) fn supervise<F>(&self, name: &'static str, task: impl Fn() -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.spawn(supervise(name, self.stopping.clone(), task));
    }

    /// As [`Self::supervise`], for a task that has work to do when the queue is stopped. It must end by itself then.
    pub(super) fn supervise_to_end<F>(
        &self,
        name: &'static str,
        task: impl Fn() -> F + Send + 'static,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        self.spawn_to_completion(supervise(name, self.stopping.clone(), task));
    }

    /// Runs `task` to its end, also while the queue is stopped. It must be short.
    pub(super) fn spawn_to_completion(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tracker.spawn_on(task, &self.runtime);
    }

    /// Signals all tasks to stop.
    pub(super) fn stop(&self) {
        self.stopping.cancel();
        self.tracker.close();
    }

    /// Waits until all tasks have ended.
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
    async fn a_panicking_task_is_restarted_and_ends_with_the_queue() {
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
