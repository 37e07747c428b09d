//! Shutdown: the signals that request it, its phases, and the background tasks that it waits for.
//! Connections are not tasks of this module: `serve` owns and drains them.

mod signals;

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::error::Elapsed;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::signals::{Event, OnHangup, Signals};

/// Delay before a task that panicked is restarted.
const RESTART_DELAY: Duration = Duration::from_secs(1);

/// The phases of a shutdown, and a counter of requests to reload files. Clones share their state.
#[derive(Clone, Default)]
pub struct ShutdownPhases {
    reloads: watch::Sender<u64>,
    announced: Arc<AtomicBool>,
    /// Cancelled when draining begins: no new connections are accepted, and open ones close after their current
    /// exchange.
    pub draining: CancellationToken,
    /// Cancelled when `shutdown_grace` has passed: exchanges that still run are aborted.
    pub forced: CancellationToken,
}

impl ShutdownPhases {
    /// Announces the shutdown: `/_/ready` answers 503 and responses say `Connection: close`, but requests are still
    /// accepted.
    pub fn announce(&self) {
        self.announced.store(true, Ordering::Relaxed);
    }

    /// Requests that files such as credentials be read again.
    pub fn reload(&self) {
        self.reloads.send_modify(|count| *count += 1);
    }

    /// A receiver that changes with each call of [`Self::reload`].
    pub fn reloads(&self) -> watch::Receiver<u64> {
        self.reloads.subscribe()
    }

    /// Returns whether the shutdown has been announced.
    pub fn is_announced(&self) -> bool {
        self.announced.load(Ordering::Relaxed)
    }
}

/// The process's background tasks, and the token that stops them.
#[derive(Clone, Default)]
pub struct Tasks {
    tracker: TaskTracker,
    stopping: CancellationToken,
}

impl Tasks {
    /// Spawns `task` on the current runtime and passes it the token that it must watch.
    pub fn spawn<F>(&self, task: impl FnOnce(CancellationToken) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.tracker.spawn(task(self.stopping.child_token()));
    }

    /// Like [`Self::spawn`], but on `runtime`: for callers whose own runtime may end before the task does.
    pub fn spawn_on<F>(&self, runtime: &Handle, task: impl FnOnce(CancellationToken) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.tracker.spawn_on(task(self.stopping.child_token()), runtime);
    }

    /// Requests that all tasks stop, and waits for them.
    ///
    /// # Errors
    /// When tasks still run after `grace`. They are not aborted; the caller logs this and goes on.
    pub async fn stop(&self, grace: Duration) -> Result<(), Elapsed> {
        self.stopping.cancel();
        self.tracker.close();
        timeout(grace, self.tracker.wait()).await
    }
}

/// Runs `task` until it returns, and restarts it when it panics, unless `stopping` is cancelled. For tasks that others
/// depend on, whose end would go unnoticed.
pub async fn supervise<F: Future<Output = ()>>(
    name: &'static str,
    stopping: CancellationToken,
    task: impl Fn() -> F,
) {
    while AssertUnwindSafe(task()).catch_unwind().await.is_err() {
        tracing::error!(task = name, "A background task panicked and is restarted");
        let pause = timeout(RESTART_DELAY, stopping.cancelled());
        if pause.await.is_ok() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn waits_for_a_task_that_ends() {
        let tasks = Tasks::default();
        tasks.spawn(|stopping| async move { stopping.cancelled().await });
        assert!(tasks.stop(Duration::from_secs(10)).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn gives_up_on_a_stuck_task() {
        let tasks = Tasks::default();
        tasks.spawn(|_stopping| std::future::pending());
        assert!(tasks.stop(Duration::from_secs(10)).await.is_err());
    }
}
