//! The open connections of one thread.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::Waker;

use crate::deadlines::{ConnectionDeadlines, Signal};
use gateway_base::sync::lock_unpoisoned;

/// The connections of one thread. The lock is a leaf; those of [`ConnectionRegistry`] and [`HeadBudget`] may be held.
///
/// [`ConnectionRegistry`]: super::registry::ConnectionRegistry
/// [`HeadBudget`]: super::head_budget::HeadBudget
#[derive(Debug, Default)]
pub(super) struct Shard(Mutex<Connections>);

#[derive(Debug, Default)]
pub(super) struct Connections {
    next: u64,
    pub(super) open: HashMap<u64, Entry>,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) deadlines: Arc<ConnectionDeadlines>,
    /// Wakes the task of the connection; set by its first poll.
    waker: Option<Waker>,
    /// Size of its incomplete head as charged to the head budget.
    pub(super) head_bytes: usize,
    /// The head has been refused.
    pub(super) head_refused: bool,
}

impl Entry {
    /// Sets `signal`, and wakes the task of the connection.
    pub(super) fn signal(&self, signal: Signal) {
        self.deadlines.signal(signal);
        if let Some(waker) = &self.waker {
            waker.wake_by_ref();
        }
    }
}

impl Shard {
    pub(super) fn connections(&self) -> MutexGuard<'_, Connections> {
        lock_unpoisoned(&self.0)
    }

    /// Adds a connection that has been accepted.
    pub(super) fn insert(self: &Arc<Self>, deadlines: &Arc<ConnectionDeadlines>) -> ConnectionKey {
        let mut connections = self.connections();
        let key = connections.next;
        connections.next += 1;
        let entry = Entry {
            deadlines: Arc::clone(deadlines),
            waker: None,
            head_bytes: 0,
            head_refused: false,
        };
        connections.open.insert(key, entry);
        ConnectionKey { shard: Arc::clone(self), key }
    }
}

/// The identity of an open connection.
#[derive(Debug)]
pub(super) struct ConnectionKey {
    pub(super) shard: Arc<Shard>,
    pub(super) key: u64,
}

impl ConnectionKey {
    /// Sets the waker that signals to the connection wake.
    pub(super) fn set_waker(&self, waker: &Waker) {
        if let Some(entry) = self.shard.connections().open.get_mut(&self.key) {
            entry.waker = Some(waker.clone());
        }
    }
}
