//! Which messages with several calls somebody has taken a call out of before they were given to anybody. Who takes one
//! out says so; so a taker need not ask for each message whether all of it is to be made.

use std::collections::HashSet;
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;

use crate::queue::jetstream::Shared;
use crate::queue::jetstream::ids::Key;
use crate::queue::jetstream::server::Fault;
use crate::queue::jetstream::subject::{self, OPEN};

/// It is said within this time.
const AT_ONCE: Duration = Duration::from_secs(1);
/// Of more it is asked for each message.
const MOST: usize = 100_000;

/// What is known of that.
#[derive(Default)]
pub(super) struct Taken {
    /// The connection over which all of it was read, and is heard since; 0 for none.
    connection: u64,
    keys: HashSet<Key>,
}

impl Taken {
    /// Whether a record of the calls under `key` may be there, as far as one hears over `connection`.
    pub(super) fn may_have(&self, key: Key, connection: Option<u64>) -> bool {
        connection != Some(self.connection) || self.keys.contains(&key)
    }

    /// Somebody says that a call is taken out of those under `key`.
    pub(super) fn hears(&mut self, key: Key) {
        if self.keys.len() < MOST {
            self.keys.insert(key);
        } else {
            *self = Self::default();
        }
    }

    /// The message is gone.
    pub(super) fn forget(&mut self, key: Key) {
        self.keys.remove(&key);
    }
}

impl Shared {
    pub(super) fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads what was said before one heard it over `connection`.
    pub(super) async fn read_taken(&self, connection: u64) -> Result<(), Fault> {
        let (server, names) = (&self.server, &self.names);
        let open = server.subjects(&names.open, &names.of(OPEN, None), MOST).await?;
        let mut taken = self.taken();
        taken.keys.extend(open.iter().filter_map(|subject| subject::key(subject)));
        taken.connection = if taken.keys.len() < MOST { connection } else { 0 };
        Ok(())
    }

    /// Says that a call is about to be taken out of those under `key`. Who does not hear it in time sees the mark on it.
    pub(super) async fn say_taken(&self, key: Key) -> Result<(), Fault> {
        let said = self.server.client.publish(self.names.taken(), Bytes::from(key.token()));
        let said = tokio::time::timeout(AT_ONCE, said).await;
        said.ok().and_then(Result::ok).ok_or(Fault::Away)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::jetstream::ids::Keys;

    #[test]
    fn what_is_not_heard_is_asked_for() {
        let keys = Keys::new();
        let (one, two) = (keys.next(2, 1), keys.next(2, 2));
        let mut taken = Taken::default();
        assert!(taken.may_have(one, Some(1)), "nothing was read yet");
        taken.connection = 1;
        assert!(!taken.may_have(one, Some(1)));
        taken.hears(one);
        assert!(taken.may_have(one, Some(1)) && !taken.may_have(two, Some(1)));
        assert!(taken.may_have(two, Some(2)) && taken.may_have(two, None), "another connection");
        taken.forget(one);
        assert!(!taken.may_have(one, Some(1)));
        (0..=MOST).for_each(|at| taken.hears(keys.next(1, at as u64)));
        assert!(taken.may_have(two, Some(1)), "there are too many to know");
    }
}
