//! A call that was taken, until it is settled or dropped.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::queue::Error;
use crate::queue::call::{Call, Millis};
use crate::queue::stan::ledger::Key;
use crate::queue::stan::message::{self, Progress};
use crate::queue::stan::nats::Fault;
use crate::queue::stan::take::Arrived;
use crate::queue::stan::{Shared, told};
use crate::queue::status::Settlement;

/// What is known of a call that was taken.
pub(in crate::queue) struct Lease {
    shared: Arc<Shared>,
    key: Key,
    call: Call,
    attempts: u32,
    settled: AtomicBool,
}

impl Lease {
    pub(super) fn new(shared: Arc<Shared>, key: Key, call: Call, attempts: u32) -> Self {
        Self { shared, key, call, attempts, settled: AtomicBool::new(false) }
    }

    /// What comes of the call is stored before its message is acknowledged: at worst it is made twice.
    pub(super) async fn settle(&self, settlement: &Settlement) -> Result<(), Error> {
        if self.settled.load(Relaxed) {
            return Err(Error::Gone);
        }
        match settlement {
            Settlement::Finished { .. } => {}
            Settlement::Retry { at, .. } => {
                let progress = Progress { not_before: Some(*at), ..self.made() };
                match self.store(&self.shared.later, &progress).await {
                    // With what is noted of it, it is larger than it was: it stays where it is, and waits here.
                    Err(Fault::TooLarge) => {
                        self.wait_here(*at);
                        return Ok(());
                    }
                    stored => stored.map_err(told)?,
                }
            }
            Settlement::Dead { status, reason, .. } => {
                let why = status.map(|status| format!("status {status}"));
                self.bury(reason.clone().or(why).unwrap_or_default()).await?;
            }
        }
        self.settled.store(true, Relaxed);
        self.shared.acknowledge(self.key).await;
        Ok(())
    }

    fn made(&self) -> Progress {
        Progress { attempts: self.attempts + 1, ..Progress::default() }
    }

    /// Keeps the call where nobody takes it. While the server is away that can be tried again; if it refuses, the log has
    /// the last word of the call.
    async fn bury(&self, reason: String) -> Result<(), Error> {
        let (id, function, dead) = (&self.call.id, &self.call.function, &self.shared.dead);
        let progress = Progress { reason: Some(reason.clone()), ..self.made() };
        match self.store(dead, &progress).await {
            Ok(()) => tracing::error!(
                call_id = id, %function, reason,
                "A queued call failed for good, and was put into the channel {dead}"
            ),
            Err(fault @ (Fault::Away | Fault::Nobody)) => return Err(told(fault)),
            Err(fault) => tracing::error!(
                call_id = id, %function, reason, %fault,
                "A queued call failed for good, and cannot be put into the channel {dead}: it is lost"
            ),
        }
        Ok(())
    }

    fn wait_here(&self, at: Millis) {
        self.settled.store(true, Relaxed);
        let waits = Arrived { call: self.call.clone(), attempts: self.attempts + 1 };
        self.shared.wait(self.key, at, waits);
    }

    async fn store(&self, channel: &str, progress: &Progress) -> Result<(), Fault> {
        self.shared.worker.publish(channel, message::encode(&self.call, progress)).await
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
