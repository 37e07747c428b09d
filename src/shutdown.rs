//! How the process ends: the signals that ask for it, the stages it goes through, and the background tasks that
//! are waited for.
//! Connections are not tasks of this room; `serve` owns and drains them.

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

/// Before a task that broke is begun anew.
const PAUSE: Duration = Duration::from_secs(1);

/// The stages of a stop, each visible to everyone who holds a clone; and how often files were to be read again.
#[derive(Clone, Default)]
pub struct Stages {
    reloads: watch::Sender<u64>,
    leaving: Arc<AtomicBool>,
    /// No more connections are accepted; open ones end with the call they carry.
    pub closing: CancellationToken,
    /// The grace is over: what still runs is cut.
    pub cut: CancellationToken,
}

impl Stages {
    /// Announces the stop: `/_/ready` turns, answers say `Connection: close`; calls are still taken.
    pub fn leave(&self) {
        self.leaving.store(true, Ordering::Relaxed);
    }

    /// Has files be read again that are read while the process runs.
    pub fn reload(&self) {
        self.reloads.send_modify(|count| *count += 1);
    }

    /// Changes whenever files are to be read again.
    pub fn reloads(&self) -> watch::Receiver<u64> {
        self.reloads.subscribe()
    }

    /// Whether a stop has been announced.
    pub fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Relaxed)
    }
}

/// The process's background tasks and the one signal that ends them.
#[derive(Clone, Default)]
pub struct Tasks {
    tracker: TaskTracker,
    stopping: CancellationToken,
}

impl Tasks {
    /// Spawns `task` on the runtime of the caller, handing it the token it must watch.
    pub fn spawn<F>(&self, task: impl FnOnce(CancellationToken) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.tracker.spawn(task(self.stopping.child_token()));
    }

    /// Spawns `task` as `spawn` does, but on `runtime`: for callers whose own may end before the task does.
    pub fn spawn_on<F>(&self, runtime: &Handle, task: impl FnOnce(CancellationToken) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.tracker.spawn_on(task(self.stopping.child_token()), runtime);
    }

    /// Asks every task to stop; `Err` if some are still running after `grace`.
    pub async fn stop(&self, grace: Duration) -> Result<(), Elapsed> {
        self.stopping.cancel();
        self.tracker.close();
        timeout(grace, self.tracker.wait()).await
    }
}

/// Runs what others rely on until it ends. If it breaks, it is begun anew unless `stopping`, since nobody else would
/// notice that it is gone.
pub async fn keep_up<F: Future<Output = ()>>(
    name: &'static str,
    stopping: CancellationToken,
    task: impl Fn() -> F,
) {
    while AssertUnwindSafe(task()).catch_unwind().await.is_err() {
        tracing::error!(task = name, "A background task broke, and is begun anew");
        let pause = timeout(PAUSE, stopping.cancelled());
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
