//! Threads that carry calls, and their end.

use std::thread::JoinHandle;

use anyhow::Context;
use tokio::sync::mpsc;

/// What a thread does, and its name.
pub(super) type Work = (String, Box<dyn FnOnce() + Send>);

/// Running threads.
pub(super) struct Threads {
    handles: Vec<JoinHandle<()>>,
    /// Closed when the last thread has ended.
    ended: mpsc::Receiver<()>,
}

impl Threads {
    /// Starts a thread for each of `works`.
    pub(super) fn start(works: impl IntoIterator<Item = Work>) -> anyhow::Result<Self> {
        let (alive, ended) = mpsc::channel(1);
        let start = |(name, work): Work| {
            let alive = alive.clone();
            std::thread::Builder::new().name(name).spawn(move || {
                work();
                drop(alive);
            })
        };
        let handles = works.into_iter().map(start).collect::<Result<_, _>>();
        Ok(Self { handles: handles.context("cannot start a thread")?, ended })
    }

    /// The same for work that is done on the current thread and its runtime.
    #[expect(clippy::disallowed_methods, reason = "it is waited for as a thread is")]
    pub(super) fn of_task(work: impl Future<Output = ()> + Send + 'static) -> Self {
        let (alive, ended) = mpsc::channel(1);
        tokio::spawn(async move {
            work.await;
            drop(alive);
        });
        Self { handles: Vec::new(), ended }
    }

    /// Waits until every thread has ended, which happens at a stop only, or when something is very wrong.
    pub(super) async fn ended(&mut self) {
        self.ended.recv().await;
    }

    /// Takes the threads back; they must have ended.
    pub(super) fn join(self) {
        for thread in self.handles {
            if thread.join().is_err() {
                tracing::error!("A thread that carries calls panicked");
            }
        }
    }
}
