//! Garbage collection of bodies that no call refers to.
use std::collections::BTreeSet;
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::MutexGuard;
use std::time::Duration;

use crate::jetstream::Shared;
use crate::jetstream::error::NatsError;
use crate::jetstream::publish::chunked_body::remove;
use crate::jetstream::wire::message::{ChunkedBody, Message};
use crate::jetstream::wire::subjects::{BODIES, CALLS, DEAD_LETTERS};
use crate::jetstream::wire::tokens::decode_token;
use crate::now;
use gateway_base::sync::lock_unpoisoned;

/// A stored body: the id of its call as a token, and the name of the body.
pub(in crate::jetstream) type StoredBody = (String, String);

impl Shared {
    /// Removes bodies older than `age` that no call refers to. Returns the number of removed bodies.
    pub(in crate::jetstream) async fn collect_bodies(
        &self,
        age: Duration,
    ) -> Result<u64, NatsError> {
        let (api, subjects) = (&self.api, &self.subjects);
        let found = api.subjects(&subjects.bodies, &subjects.all(BODIES), usize::MAX).await?;
        // Subjects are `root.queue.id.name.number`.
        let stored: BTreeSet<_> = found
            .iter()
            .filter_map(|subject| {
                let (front, _) = subject.rsplit_once('.')?;
                let mut tokens = front.rsplit('.');
                let (name, id) = (tokens.next()?, tokens.next()?);
                Some((id.to_owned(), format!("{id}.{name}")))
            })
            .collect();
        let mut removed = 0;
        // A run that is interrupted continues at the cursor.
        let from = self.gc_cursor().clone().map_or(Unbounded, Excluded);
        for stored_body in stored.range((from, Unbounded)) {
            *self.gc_cursor() = Some(stored_body.clone());
            let (id, name) = stored_body;
            let body = ChunkedBody { name: name.clone(), count: 0 };
            let last =
                api.get_last(&subjects.bodies, &subjects.chunk(BODIES, &body.name, "*")).await?;
            let Some(last) = last else { continue };
            let born = u128::try_from(last.time.unix_timestamp_nanos()).unwrap_or(0) / 1_000_000;
            if u128::from(now()).saturating_sub(born) < age.as_millis() {
                continue;
            }
            let Some(id) = decode_token(id) else { continue };
            if !self.has_body(&id, &body.name).await? {
                remove(api, subjects, &body).await?;
                removed += 1;
            }
        }
        *self.gc_cursor() = None;
        Ok(removed)
    }

    /// Returns whether a call with that id, of any function, refers to the body `name`.
    async fn has_body(&self, id: &str, name: &str) -> Result<bool, NatsError> {
        let (calls, dead_letters) =
            ((&self.subjects.calls, CALLS), (&self.subjects.dead_letters, DEAD_LETTERS));
        // `calls` is read twice: the call may return there from the dead letters in between.
        for (stream, root) in [calls, dead_letters, calls] {
            let by_id = self.subjects.by_id(root, id);
            for subject in self.api.subjects(stream, &by_id, usize::MAX).await? {
                let Some(found) = self.api.get_last(stream, &subject).await? else { continue };
                let body = Message::from_stored(found.headers, found.payload).chunked_body();
                if body.is_some_and(|body| body.name == name) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    pub(in crate::jetstream) fn gc_cursor(&self) -> MutexGuard<'_, Option<StoredBody>> {
        lock_unpoisoned(&self.gc_cursor)
    }
}
