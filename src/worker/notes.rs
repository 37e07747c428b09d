//! Calls that were made, and of which it is being noted what became of them: how many may be so at a time.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::function::Function;
use crate::queue::fair_share::may_start;

/// Room for so many, of which each function has its share: what cannot be noted of one holds up no other.
pub(super) struct Notes {
    room: usize,
    taken: Mutex<Taken>,
    /// Some room is free again.
    freed: Notify,
}

#[derive(Default)]
struct Taken {
    all: usize,
    by_function: HashMap<Function, usize>,
}

/// Room that is taken until this is dropped.
pub(super) struct Noting<'a> {
    notes: &'a Notes,
    function: &'a Function,
}

impl Notes {
    pub(super) fn new(room: usize) -> Self {
        Self { room, taken: Mutex::default(), freed: Notify::new() }
    }

    /// Waits for room. Cancel-safe.
    pub(super) async fn room<'a>(&'a self, function: &'a Function) -> Noting<'a> {
        loop {
            // Made before the look, so that nothing is missed between the two.
            let mut freed = std::pin::pin!(self.freed.notified());
            freed.as_mut().enable();
            if self.taken().take(function, self.room) {
                return Noting { notes: self, function };
            }
            freed.await;
        }
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Taken {
    fn take(&mut self, function: &Function, room: usize) -> bool {
        let ours = self.by_function.get(function).copied().unwrap_or_default();
        let may = may_start(ours, self.all, room);
        if may {
            self.all += 1;
            *self.by_function.entry(function.clone()).or_default() += 1;
        }
        may
    }

    fn leave(&mut self, function: &Function) {
        self.all -= 1;
        if let Some(ours) = self.by_function.get_mut(function) {
            *ours -= 1;
            if *ours == 0 {
                self.by_function.remove(function);
            }
        }
    }
}

impl Drop for Noting<'_> {
    fn drop(&mut self) {
        self.notes.taken().leave(self.function);
        self.notes.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn function(name: &str) -> Function {
        Function { name: name.to_owned(), namespace: "fn".to_owned() }
    }

    async fn in_time(notes: &Notes, function: &'static Function) -> bool {
        let room = tokio::time::timeout(Duration::from_millis(20), notes.room(function)).await;
        room.map(std::mem::forget).is_ok()
    }

    #[tokio::test]
    async fn one_function_has_its_share_and_who_waits_gets_what_is_free() {
        let [stuck, other]: [&'static Function; 2] =
            ["stuck", "other"].map(|name| &*Box::leak(Box::new(function(name))));
        let notes = Notes::new(8);
        let first = notes.room(stuck).await;
        let mut taken = 1;
        while in_time(&notes, stuck).await {
            taken += 1;
        }
        assert!((4..8).contains(&taken), "{taken}");
        // However many there are, another function has one.
        assert!(in_time(&notes, other).await);
        let waits = notes.room(stuck);
        tokio::pin!(waits);
        assert!(tokio::time::timeout(Duration::from_millis(20), &mut waits).await.is_err());
        notes.taken().leave(other);
        drop(first);
        let got = tokio::time::timeout(Duration::from_secs(5), waits).await;
        assert!(got.is_ok(), "what is free is for who waits");
        drop(got);
        assert_eq!(notes.taken().all, taken - 1);
    }
}
