//! A call that was taken, until it is settled or dropped.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use crate::queue::call::{QueuedCall, UnixMillis};
use crate::queue::stan::channels::Channel;
use crate::queue::stan::executed::Step;
use crate::queue::stan::ledger::Key;
use crate::queue::stan::message::{self, Progress};
use crate::queue::stan::nats::Fault;
use crate::queue::stan::take::Arrived;
use crate::queue::stan::{Shared, once, told};
use crate::queue::status::{CallState, Settlement};
use crate::queue::{Error, now};

/// What is known of a call that was taken.
pub(in crate::queue) struct Lease {
    shared: Arc<Shared>,
    key: Key,
    call: QueuedCall,
    progress: Progress,
    settled: AtomicBool,
    /// What this message was claimed for.
    claimed: OnceLock<Step>,
}

impl Lease {
    pub(super) fn new(shared: Arc<Shared>, key: Key, call: QueuedCall, progress: Progress) -> Self {
        Self {
            shared,
            key,
            call,
            progress,
            settled: AtomicBool::new(false),
            claimed: OnceLock::new(),
        }
    }

    /// Whether the call is to be executed: it is not when another message of it was, or is being.
    pub(super) async fn begin(&self) -> Result<bool, Error> {
        let (call, key) = (&self.call, self.key);
        let step = once::step(&self.shared, call, &self.progress);
        let is_first = once::claim(&self.shared, key, step).await;
        let is_first = is_first.map_err(|fault| told(fault, call))?;
        if is_first {
            let _ = self.claimed.set(step);
        } else {
            tracing::info!(
                call_id = call.id, function = %call.function, sequence = key.sequence,
                "NATS Streaming has a call twice, and it is executed once"
            );
            self.settled.store(true, Relaxed);
            self.shared.acknowledge(key).await;
        }
        Ok(is_first)
    }

    /// What comes of the call is stored before its message is acknowledged: at worst it is made twice.
    pub(super) async fn settle(&self, settlement: &Settlement) -> Result<(), Error> {
        if self.settled.load(Relaxed) {
            return Err(Error::Gone);
        }
        match settlement {
            // Nobody can ask what became of it.
            Settlement::Finished { state: CallState::Failed, status: None, reason, .. } => {
                tracing::warn!(
                    call_id = self.call.id, function = %self.call.function, reason,
                    "A queued call failed, and is not made again"
                )
            }
            Settlement::Finished { .. } => {}
            Settlement::Retry { at, .. } => {
                let progress = Progress { not_before: Some(*at), ..self.made() };
                let channel = Channel::later(at.saturating_sub(now()));
                match self.store(self.shared.channel(channel), &progress).await {
                    // With what is noted of it, it is larger than it was; or the server has no place for those that are
                    // made later. It stays where it is, and waits here.
                    Err(Fault::TooLarge | Fault::Refused(_)) => {
                        self.wait_here(*at);
                        return Ok(());
                    }
                    stored => stored.map_err(|fault| told(fault, &self.call))?,
                }
            }
            Settlement::DeadLetter { status, reason, .. } => {
                let why = status.map(|status| format!("status {status}"));
                if !self.bury(reason.clone().or(why).unwrap_or_default()).await? {
                    self.settled.store(true, Relaxed);
                    self.shared.ledger().keep(self.key);
                    self.shared.ready.notify_one();
                    return Ok(());
                }
            }
        }
        if let Some(step) = self.claimed.get() {
            self.shared.once.is_over(*step);
        }
        self.settled.store(true, Relaxed);
        self.shared.acknowledge(self.key).await;
        Ok(())
    }

    fn made(&self) -> Progress {
        Progress { attempts: self.progress.attempts.saturating_add(1), ..self.untold() }
    }

    /// What the call came with.
    fn untold(&self) -> Progress {
        let Progress { moves, others, .. } = &self.progress;
        Progress { moves: *moves, others: others.clone(), ..Progress::default() }
    }

    /// Keeps the call where nobody takes it; whether it is there. What the server refuses now it may take in a moment.
    async fn bury(&self, reason: String) -> Result<bool, Error> {
        let (id, function, dead) = (&self.call.id, &self.call.function, &self.shared.dead);
        let progress = Progress { reason: Some(reason.clone()), ..self.made() };
        let stored = match self.store(dead, &progress).await {
            // With what is noted of it, it is larger than it was.
            Err(Fault::TooLarge) => self.store(dead, &self.untold()).await,
            stored => stored,
        };
        match stored {
            Ok(()) => tracing::error!(
                call_id = id, %function, reason,
                "A queued call failed for good, and was put into the channel {dead}"
            ),
            Err(Fault::TooLarge) => tracing::error!(
                call_id = id, %function, reason,
                "A queued call failed for good, and is too large for the channel {dead}: it stays where it is, and is made \
                 again once this worker is gone"
            ),
            Err(fault) => return Err(told(fault, &self.call)),
        }
        Ok(stored.is_ok())
    }

    fn wait_here(&self, at: UnixMillis) {
        self.settled.store(true, Relaxed);
        let waits = Arrived { call: self.call.clone(), progress: self.made() };
        self.shared.wait(self.key, at, waits);
    }

    async fn store(&self, channel: &str, progress: &Progress) -> Result<(), Fault> {
        self.shared.worker.publish_patiently(channel, message::encode(&self.call, progress)).await
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if !self.settled.load(Relaxed) {
            self.shared.ledger().forget(self.key);
            self.shared.ready.notify_one();
        }
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Lease").field(&self.key.sequence).finish()
    }
}
