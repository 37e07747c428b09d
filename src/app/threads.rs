//! Threads that carry calls, and their end.

use std::thread::JoinHandle;

use anyhow::Context;
use tokio::sync::mpsc;

/// What a thread does, and its name.
pub(super) type Work = (String, Box<dyn FnOnce() + Send>);

/// Running threads.
pub(super) struct Threads {
    handles: Vec<JoinHandle<()>>,
    /// Closed when the last thread has ended; one that panics says so before.
    ended: mpsc::Receiver<()>,
}

/// Held by a thread as long as it runs.
struct Alive(mpsc::Sender<()>);

impl Drop for Alive {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // If there is no room for it, another has said so.
            let _ = self.0.try_send(());
        }
    }
}

impl Threads {
    /// Starts a thread for each of `works`.
    pub(super) fn start(works: impl IntoIterator<Item = Work>) -> anyhow::Result<Self> {
        let (alive, ended) = mpsc::channel(1);
        let start = |(name, work): Work| {
            let alive = Alive(alive.clone());
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
        let alive = Alive(alive);
        tokio::spawn(async move {
            work.await;
            drop(alive);
        });
        Self { handles: Vec::new(), ended }
    }

    /// Waits for what happens when something is very wrong: a thread has panicked, or all have ended. What they did is
    /// done by nobody.
    pub(super) async fn unexpected_end(&mut self) -> &'static str {
        match self.ended.recv().await {
            Some(()) => "a thread that carries calls panicked",
            None => "no thread carries calls any more",
        }
    }

    /// Waits until every thread has ended.
    pub(super) async fn ended(&mut self) {
        while self.ended.recv().await.is_some() {}
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

#[cfg(test)]
mod tests {
    use super::*;

    fn works(works: [fn(); 2]) -> Threads {
        let named = |work: fn()| -> Work { ("test".to_owned(), Box::new(work)) };
        Threads::start(works.map(named)).unwrap()
    }

    #[tokio::test]
    async fn a_thread_that_panics_is_noticed_while_others_go_on() {
        let goes_on = || loop {
            std::thread::park();
        };
        let mut threads = works([goes_on, || panic!("as a test wants it")]);
        assert_eq!(threads.unexpected_end().await, "a thread that carries calls panicked");
    }

    #[tokio::test]
    async fn all_have_ended_when_the_last_has() {
        let mut threads = works([|| (), || ()]);
        threads.ended().await;
        assert_eq!(threads.unexpected_end().await, "no thread carries calls any more");
        threads.join();
    }
}
