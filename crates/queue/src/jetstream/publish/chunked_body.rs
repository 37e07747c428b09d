//! Bodies larger than a message: stored in chunks, and removed with their call.
//!
//! The object store of NATS is not used, since it keeps a marker for each object that ever existed.

use std::collections::BTreeSet;
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::MutexGuard;
use std::time::Duration;

use async_nats::HeaderMap;
use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, TryStreamExt, stream};

use crate::jetstream::Shared;
use crate::jetstream::api::JetStreamApi;
use crate::jetstream::error::NatsError;
use crate::jetstream::wire::message::{ChunkedBody, Message};
use crate::jetstream::wire::subjects::{
    BODIES, CALLS, DEAD_LETTERS, Subjects, decode_token, encode_token,
};
use crate::now;
use gateway_base::sync::lock_unpoisoned;

/// Maximum number of concurrent chunk requests.
const MAX_CONCURRENT_CHUNKS: usize = 4;

/// Maximum size of a body or a response.
pub(in crate::jetstream) const MAX_BODY_BYTES: usize = crate::MAX_ASYNC_BODY_BYTES;

/// A stored body: the id of its call as a token, and the name of the body.
pub(in crate::jetstream) type StoredBody = (String, String);

/// Size of a chunk in bytes.
fn chunk_size(api: &JetStreamApi) -> usize {
    api.client.max_payload().saturating_sub(4096).clamp(1024, 1 << 20)
}

/// Stores `body` in chunks, under a name that starts with the call's id.
pub(in crate::jetstream) async fn store(
    api: &JetStreamApi,
    subjects: &Subjects,
    id: &str,
    body: &Bytes,
) -> Result<ChunkedBody, NatsError> {
    let name = format!("{}.{}", encode_token(id), uuid::Uuid::new_v4().simple());
    let size = chunk_size(api);
    let count = body.len().div_ceil(size);
    stream::iter(0..count)
        .map(|number| {
            let chunk = body.slice(number * size..body.len().min((number + 1) * size));
            api.publish(subjects.chunk(BODIES, &name, number), HeaderMap::new(), chunk, None)
        })
        .buffer_unordered(MAX_CONCURRENT_CHUNKS)
        .try_for_each(|_| std::future::ready(Ok(())))
        .await?;
    Ok(ChunkedBody { name, count })
}

/// Loads a body. Returns `None` if a chunk is missing, or if the body exceeds the maximum size.
pub(in crate::jetstream) async fn load(
    api: &JetStreamApi,
    subjects: &Subjects,
    body: &ChunkedBody,
) -> Result<Option<Bytes>, NatsError> {
    let chunks = (0..body.count).map(|number| subjects.chunk(BODIES, &body.name, number));
    let found = stream::iter(chunks)
        .map(|subject| async move { api.get_last(&subjects.bodies, &subject).await })
        .buffered(MAX_CONCURRENT_CHUNKS);
    let (mut found, mut data) = (std::pin::pin!(found), BytesMut::new());
    // The number of chunks comes from the message, which another program may have written.
    while let Some(chunk) = found.try_next().await? {
        let Some(chunk) = chunk.filter(|chunk| data.len() + chunk.payload.len() <= MAX_BODY_BYTES)
        else {
            return Ok(None);
        };
        data.extend_from_slice(&chunk.payload);
    }
    Ok(Some(data.freeze()))
}

/// Removes all chunks of a body.
pub(in crate::jetstream) async fn remove(
    api: &JetStreamApi,
    subjects: &Subjects,
    body: &ChunkedBody,
) -> Result<(), NatsError> {
    // A name is used only once, so all chunks with it belong to this body.
    api.purge(&subjects.bodies, &subjects.chunk(BODIES, &body.name, "*"), u64::MAX - 1).await
}

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

    /// The last body that an unfinished collection has checked.
    pub(in crate::jetstream) fn gc_cursor(&self) -> MutexGuard<'_, Option<StoredBody>> {
        lock_unpoisoned(&self.gc_cursor)
    }
}
