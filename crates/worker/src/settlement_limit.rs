//! Limit on the number of executed calls that await their settlement.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

use tokio::sync::Notify;

use gateway_base::function::Function;
use gateway_base::sync::lock_unpoisoned;
use gateway_queue::fair_share::may_start;

/// Limits unsettled calls in total and gives each function a fair share, so that calls of one function that cannot be
/// settled do not block others.
pub(super) struct SettlementLimiter {
    capacity: usize,
    /// A leaf.
    usage: Mutex<Usage>,
    /// A permit has been released.
    released: Notify,
}

#[derive(Default)]
struct Usage {
    total: usize,
    by_function: HashMap<Function, usize>,
}

/// Permit for one unsettled call. Dropping it releases it.
pub(super) struct SettlementPermit<'a> {
    limiter: &'a SettlementLimiter,
    function: &'a Function,
}

impl SettlementLimiter {
    pub(super) fn new(capacity: usize) -> Self {
        Self { capacity, usage: Mutex::default(), released: Notify::new() }
    }

    /// Waits for a permit. Cancel-safe.
    pub(super) async fn acquire<'a>(&'a self, function: &'a Function) -> SettlementPermit<'a> {
        loop {
            // Registered before the check, so that no release in between is missed.
            let mut released = std::pin::pin!(self.released.notified());
            released.as_mut().enable();
            if self.lock_usage().try_acquire(function, self.capacity) {
                return SettlementPermit { limiter: self, function };
            }
            released.await;
        }
    }

    fn lock_usage(&self) -> MutexGuard<'_, Usage> {
        lock_unpoisoned(&self.usage)
    }
}

impl Usage {
    fn try_acquire(&mut self, function: &Function, capacity: usize) -> bool {
        let of_function = self.by_function.get(function).copied().unwrap_or_default();
        let may = may_start(of_function, self.total, capacity);
        if may {
            self.total += 1;
            *self.by_function.entry(function.clone()).or_default() += 1;
        }
        may
    }

    fn release(&mut self, function: &Function) {
        self.total -= 1;
        if let Some(of_function) = self.by_function.get_mut(function) {
            *of_function -= 1;
            if *of_function == 0 {
                self.by_function.remove(function);
            }
        }
    }
}

impl Drop for SettlementPermit<'_> {
    fn drop(&mut self) {
        self.limiter.lock_usage().release(self.function);
        self.limiter.released.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn function(name: &str) -> Function {
        Function { name: name.to_owned(), namespace: "fn".to_owned() }
    }

    async fn in_time(limiter: &SettlementLimiter, function: &'static Function) -> bool {
        let permit =
            tokio::time::timeout(Duration::from_millis(20), limiter.acquire(function)).await;
        permit.map(std::mem::forget).is_ok()
    }

    #[tokio::test]
    async fn a_function_is_limited_to_its_share_and_a_waiter_gets_a_released_permit() {
        let [stuck, other]: [&'static Function; 2] =
            ["stuck", "other"].map(|name| &*Box::leak(Box::new(function(name))));
        let limiter = SettlementLimiter::new(8);
        let first = limiter.acquire(stuck).await;
        let mut taken = 1;
        while in_time(&limiter, stuck).await {
            taken += 1;
        }
        assert!((4..8).contains(&taken), "{taken}");
        // However many calls of one function there are, another function gets a permit.
        assert!(in_time(&limiter, other).await);
        let waiter = limiter.acquire(stuck);
        tokio::pin!(waiter);
        assert!(tokio::time::timeout(Duration::from_millis(20), &mut waiter).await.is_err());
        limiter.lock_usage().release(other);
        drop(first);
        let got = tokio::time::timeout(Duration::from_secs(5), waiter).await;
        assert!(got.is_ok(), "a waiter gets the released permit");
        drop(got);
        assert_eq!(limiter.lock_usage().total, taken - 1);
    }
}
