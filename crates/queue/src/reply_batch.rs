//! Replies to callers on other threads, delivered in batches: to wake a task of another thread is a system call, and
//! one wake-up serves all replies of a batch.

use tokio::sync::{mpsc, oneshot};

use crate::Error;

/// Sends one reply.
type Completion = Box<dyn FnOnce() + Send>;

/// Maximum number of batches that wait for a busy thread.
const MAX_WAITING_BATCHES: usize = 16;

/// Delivers batches of replies to one thread.
#[derive(Clone)]
pub(super) struct ReplyChannel(mpsc::Sender<Vec<Completion>>);

impl ReplyChannel {
    /// Opens a channel on the current runtime. It stays open until the last sender is gone.
    #[expect(clippy::disallowed_methods, reason = "it ends with its runtime, and holds nothing")]
    pub(super) fn open() -> Self {
        let (completions, mut batches) = mpsc::channel::<Vec<Completion>>(MAX_WAITING_BATCHES);
        tokio::spawn(async move {
            while let Some(completions) = batches.recv().await {
                completions.into_iter().for_each(|completion| completion());
            }
        });
        Self(completions)
    }
}

/// The recipient of one reply.
pub(super) struct Reply<T> {
    sender: oneshot::Sender<Result<T, Error>>,
    channel: Option<ReplyChannel>,
}

impl<T: Send + 'static> Reply<T> {
    pub(super) fn new(
        sender: oneshot::Sender<Result<T, Error>>,
        channel: Option<ReplyChannel>,
    ) -> Self {
        Self { sender, channel }
    }

    /// Returns whether the recipient has gone.
    pub(super) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Sends the result immediately, not in a batch.
    pub(super) fn send(self, result: Result<T, Error>) {
        // The recipient may have gone.
        let _ = self.sender.send(result);
    }
}

/// Replies that are sent together.
#[derive(Default)]
pub(super) struct ReplyBatch {
    by_channel: Vec<(ReplyChannel, Vec<Completion>)>,
}

impl ReplyBatch {
    pub(super) fn push<T: Send + 'static>(&mut self, reply: Reply<T>, result: Result<T, Error>) {
        let Some(channel) = reply.channel.clone() else { return reply.send(result) };
        let completion: Completion = Box::new(move || reply.send(result));
        match self.by_channel.iter_mut().find(|(open, _)| open.0.same_channel(&channel.0)) {
            Some((_, completions)) => completions.push(completion),
            None => self.by_channel.push((channel, vec![completion])),
        }
    }

    pub(super) fn send(self) {
        for (channel, completions) in self.by_channel {
            // If the channel is full, the replies are sent from here.
            if let Err(full) = channel.0.try_send(completions) {
                full.into_inner().into_iter().for_each(|completion| completion());
            }
        }
    }
}
