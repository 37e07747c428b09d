//! Answers, handed out on the thread that waits for them: to wake a task of another thread is a system call, and one
//! wakes all for whom there is an answer at the same time.

use tokio::sync::{mpsc, oneshot};

use crate::queue::Error;

/// An answer, about to be given.
type Completion = Box<dyn FnOnce() + Send>;

/// So many deliveries wait for a thread that is busy.
const WAITING: usize = 16;

/// Where a thread gets its answers.
#[derive(Clone)]
pub(super) struct ReplyChannel(mpsc::Sender<Vec<Completion>>);

impl ReplyChannel {
    /// One on the current runtime, where it stays open as long as somebody may have an answer for it.
    #[expect(clippy::disallowed_methods, reason = "it ends with its runtime, and holds nothing")]
    pub(super) fn open() -> Self {
        let (parcels, mut delivered) = mpsc::channel::<Vec<Completion>>(WAITING);
        tokio::spawn(async move {
            while let Some(parcels) = delivered.recv().await {
                parcels.into_iter().for_each(|parcel| parcel());
            }
        });
        Self(parcels)
    }
}

/// Whom to answer, and where.
pub(super) struct Reply<T> {
    to: oneshot::Sender<Result<T, Error>>,
    desk: Option<ReplyChannel>,
}

impl<T: Send + 'static> Reply<T> {
    pub(super) fn new(to: oneshot::Sender<Result<T, Error>>, desk: Option<ReplyChannel>) -> Self {
        Self { to, desk }
    }

    /// Whether nobody waits any more.
    pub(super) fn is_closed(&self) -> bool {
        self.to.is_closed()
    }

    /// Gives the answer at once.
    pub(super) fn send(self, answer: Result<T, Error>) {
        // Whoever does not wait any more need not hear of it.
        let _ = self.to.send(answer);
    }
}

/// Answers that are given together.
#[derive(Default)]
pub(super) struct ReplyBatch {
    by_desk: Vec<(ReplyChannel, Vec<Completion>)>,
}

impl ReplyBatch {
    pub(super) fn push<T: Send + 'static>(&mut self, reply: Reply<T>, answer: Result<T, Error>) {
        let Some(desk) = reply.desk.clone() else { return reply.send(answer) };
        let parcel: Completion = Box::new(move || reply.send(answer));
        match self.by_desk.iter_mut().find(|(known, _)| known.0.same_channel(&desk.0)) {
            Some((_, parcels)) => parcels.push(parcel),
            None => self.by_desk.push((desk, vec![parcel])),
        }
    }

    pub(super) fn send(self) {
        for (desk, parcels) in self.by_desk {
            // A thread that has not come to its last answers has them given from here.
            if let Err(full) = desk.0.try_send(parcels) {
                full.into_inner().into_iter().for_each(|parcel| parcel());
            }
        }
    }
}
