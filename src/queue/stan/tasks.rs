//! What goes on beside the calls to a queue.

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::runtime::Handle as Runtime;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How long the tasks may take to end.
const STOP: Duration = Duration::from_secs(2);
/// Before a task that broke is begun anew.
const PAUSE: Duration = Duration::from_secs(1);

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

    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.tracker.spawn_on(task, &self.runtime);
    }

    /// Spawns what is to go on for as long as the queue does: if it breaks, it is begun anew, since nobody else would
    /// notice that it is gone.
    pub(super) fn keep_up<F>(&self, name: &'static str, task: impl Fn() -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let stopping = self.stopping.clone();
        self.spawn(async move {
            while AssertUnwindSafe(task()).catch_unwind().await.is_err() {
                tracing::error!(task = name, "A task of the queue broke, and is begun anew");
                let pause = tokio::time::timeout(PAUSE, stopping.cancelled());
                if pause.await.is_ok() {
                    return;
                }
            }
        });
    }

    /// Asks all to end, and waits until they have.
    pub(super) async fn stop(&self) {
        self.stopping.cancel();
        self.tracker.close();
        let _ = tokio::time::timeout(STOP, self.tracker.wait()).await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_task_that_breaks_is_begun_anew() {
        let tasks = Tasks::new();
        let begun = Arc::new(AtomicUsize::new(0));
        let counts = Arc::clone(&begun);
        tasks.keep_up("test", move || {
            let number = counts.fetch_add(1, SeqCst);
            async move { assert_eq!(number, 2, "it breaks") }
        });
        tasks.tracker.close();
        tasks.tracker.wait().await;
        assert_eq!(begun.load(SeqCst), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_always_breaks_ends_with_the_queue() {
        let tasks = Tasks::new();
        tasks.keep_up("test", || async { panic!("it breaks") });
        tokio::task::yield_now().await;
        tasks.stop().await;
        assert!(tasks.tracker.is_empty());
    }
}
