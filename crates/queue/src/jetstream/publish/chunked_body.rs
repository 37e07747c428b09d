//! Bodies larger than a message: stored in chunks, and removed with their call.
//!
//! The object store of NATS is not used, since it keeps a marker for each object that ever existed.
use async_nats::HeaderMap;
use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, TryStreamExt, stream};

use crate::jetstream::Shared;
use crate::jetstream::api::JetStreamApi;
use crate::jetstream::error::NatsError;
use crate::jetstream::wire::message::ChunkedBody;
use crate::jetstream::wire::subjects::{BODIES, Subjects};
use crate::jetstream::wire::tokens::encode_token;

/// Maximum number of concurrent chunk requests.
const MAX_CONCURRENT_CHUNKS: usize = 4;

/// Maximum size of a body.
const MAX_BODY_BYTES: usize = crate::MAX_ASYNC_BODY_BYTES;

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

impl Shared {}

impl Shared {
    /// Removes a body that no call refers to. If that fails, garbage collection removes it later.
    pub(in crate::jetstream) async fn remove_body(&self, body: Option<&ChunkedBody>) {
        if let Some(body) = body
            && let Err(error) = remove(&self.api, &self.subjects, body).await
        {
            let body = &body.name;
            tracing::warn!(%error, body, "Cannot remove the body of a queued call");
        }
    }
}
