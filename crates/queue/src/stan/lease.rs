//! A received call, until it is settled or dropped.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use crate::call::{QueuedCall, UnixMillis};
use crate::stan::channels::Channel;
use crate::stan::execution_log::Step;
use crate::stan::inflight::MessageKey;
use crate::stan::message::{self, Progress};
use crate::stan::nats::NatsError;
use crate::stan::pending::ReceivedCall;
use crate::stan::{Shared, dedup, queue_error};
use crate::status::{CallState, Settlement};
use crate::{Error, Settle, now};

/// A received call and its message. Dropping it unsettled releases the message, which the server redelivers.
pub(crate) struct Lease {
    shared: Arc<Shared>,
    key: MessageKey,
    call: QueuedCall,
    progress: Progress,
    settled: AtomicBool,
    /// The step that this message has claimed.
    claimed_step: OnceLock<Step>,
}

impl Lease {
    pub(super) fn new(
        shared: Arc<Shared>,
        key: MessageKey,
        call: QueuedCall,
        progress: Progress,
    ) -> Self {
        Self {
            shared,
            key,
            call,
            progress,
            settled: AtomicBool::new(false),
            claimed_step: OnceLock::new(),
        }
    }

    /// Returns whether the call is to be executed. It is not if another message of the same step was executed or is
    /// executing.
    ///
    /// # Errors
    /// When this cannot be determined. The caller drops the lease, and the server redelivers the message.
    async fn claim_step(&self) -> Result<bool, Error> {
        let (call, key) = (&self.call, self.key);
        let step = dedup::next_step(&self.shared, call, &self.progress);
        let is_first = dedup::claim(&self.shared, key, step).await;
        let is_first = is_first.map_err(|error| queue_error(error, call))?;
        if is_first {
            let _ = self.claimed_step.set(step);
        } else {
            tracing::info!(
                call_id = call.id, function = %call.function, sequence = key.sequence,
                "NATS Streaming has stored a call twice; this duplicate is not executed"
            );
            self.settled.store(true, Relaxed);
            self.shared.acknowledge(key).await;
        }
        Ok(is_first)
    }

    /// Settles the call. A retry or dead letter is stored before the message is acknowledged: a crash in between
    /// executes the call twice at worst.
    ///
    /// # Errors
    /// `Gone` when it is settled already. After other errors nothing is acknowledged, and the caller tries again
    /// later.
    async fn store_settlement(&self, settlement: &Settlement) -> Result<(), Error> {
        if self.settled.load(Relaxed) {
            return Err(Error::Gone);
        }
        match settlement {
            // The outcome cannot be queried, so a failure is logged.
            Settlement::Finished { state: CallState::Failed, status: None, reason, .. } => {
                tracing::warn!(
                    call_id = self.call.id, function = %self.call.function, reason,
                    "A queued call failed, and is not retried"
                )
            }
            Settlement::Finished { .. } => {}
            Settlement::Retry { at, .. } => {
                let progress = Progress { not_before: Some(*at), ..self.next_progress() };
                let channel = Channel::for_delay(at.saturating_sub(now()));
                match self.store(self.shared.channel(channel), &progress).await {
                    // Its metadata has made it too large, or the server has no channel for delayed calls. It stays in
                    // its channel and waits in memory.
                    Err(NatsError::TooLarge | NatsError::Rejected(_)) => {
                        self.requeue_locally(*at);
                        return Ok(());
                    }
                    stored => stored.map_err(|error| queue_error(error, &self.call))?,
                }
            }
            Settlement::DeadLetter { status, reason, .. } => {
                let status_text = status.map(|status| format!("status {status}"));
                if !self.dead_letter(reason.clone().or(status_text).unwrap_or_default()).await? {
                    self.settled.store(true, Relaxed);
                    self.shared.inflight().mark_stuck(self.key);
                    self.shared.ready.notify_one();
                    return Ok(());
                }
            }
        }
        if let Some(step) = self.claimed_step.get() {
            self.shared.dedup.mark_finished(*step);
        }
        self.settled.store(true, Relaxed);
        self.shared.acknowledge(self.key).await;
        Ok(())
    }

    /// Returns the progress after this attempt.
    fn next_progress(&self) -> Progress {
        Progress { attempts: self.progress.attempts.saturating_add(1), ..self.original_metadata() }
    }

    /// Returns the metadata with which the call was received, without its progress.
    fn original_metadata(&self) -> Progress {
        let Progress { moves, unknown_members, .. } = &self.progress;
        Progress { moves: *moves, unknown_members: unknown_members.clone(), ..Progress::default() }
    }

    /// Publishes the call to the dead-letter channel. Returns whether it is stored there. After an error the server
    /// may accept it later.
    async fn dead_letter(&self, reason: String) -> Result<bool, Error> {
        let (id, function, dead) = (&self.call.id, &self.call.function, &self.shared.dead_channel);
        let progress = Progress { reason: Some(reason.clone()), ..self.next_progress() };
        let stored = match self.store(dead, &progress).await {
            // With what is noted of it, it is larger than it was.
            Err(NatsError::TooLarge) => self.store(dead, &self.original_metadata()).await,
            stored => stored,
        };
        match stored {
            Ok(()) => tracing::error!(
                call_id = id, %function, reason,
                "A queued call failed for good, and was moved to the dead-letter channel {dead}"
            ),
            Err(NatsError::TooLarge) => tracing::error!(
                call_id = id, %function, reason,
                "A queued call failed for good, and is too large for the dead-letter channel {dead}: it stays in its \
                 channel, and is executed again after this worker has stopped"
            ),
            Err(error) => return Err(queue_error(error, &self.call)),
        }
        Ok(stored.is_ok())
    }

    /// Keeps the call in memory until `at`.
    fn requeue_locally(&self, at: UnixMillis) {
        self.settled.store(true, Relaxed);
        let pending = ReceivedCall { call: self.call.clone(), progress: self.next_progress() };
        self.shared.enqueue(self.key, at, pending);
    }

    async fn store(&self, channel: &str, progress: &Progress) -> Result<(), NatsError> {
        self.shared
            .worker
            .publish_in_background(channel, message::encode(&self.call, progress))
            .await
    }
}

// The futures are boxed: they are larger than those of the other backends, which are part of the future of each call.
impl Settle for Lease {
    /// If the future is dropped, the claim may be written to the log. It names the message and not the worker, so the
    /// worker that receives the message next may execute it.
    async fn claim(&self) -> Result<bool, Error> {
        Box::pin(self.claim_step()).await
    }

    /// Does nothing: the server limits unacknowledged messages itself.
    fn release_slot(&self) {}

    /// If the future is dropped, a retry or dead letter may be stored in its channel while the message is not
    /// acknowledged. The drop of the lease then releases the message, and the server redelivers it: the attempt is
    /// executed again. A retry that is stored twice is executed once, because both messages claim the same step.
    async fn settle(&self, _call: &QueuedCall, settlement: &Settlement) -> Result<(), Error> {
        Box::pin(self.store_settlement(settlement)).await
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.settled.load(Relaxed) {
            self.shared.inflight().release(self.key);
            self.shared.ready.notify_one();
        }
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Lease").field(&self.key.sequence).finish()
    }
}
