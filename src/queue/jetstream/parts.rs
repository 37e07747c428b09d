//! Bodies that are larger than a message may be: they are stored in parts, and removed with their call.
//!
//! The server's own object store would leave a mark for each object that ever was.

use std::collections::BTreeSet;
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::{MutexGuard, PoisonError};
use std::time::Duration;

use async_nats::HeaderMap;
use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, TryStreamExt, stream};

use crate::queue::jetstream::Shared;
use crate::queue::jetstream::message::{Message, Parts};
use crate::queue::jetstream::server::{Fault, Server};
use crate::queue::jetstream::subject::{BODIES, CALLS, DEAD, Names, text, token};
use crate::queue::now;

/// So many parts are on their way at a time.
const TOGETHER: usize = 4;

/// No body is larger, and no answer.
pub(super) const LARGEST: usize = crate::config::MAX_ASYNC_BODY_BYTES;

/// A stored body: its call's id, as a token, and its own name.
pub(super) type Body = (String, String);

/// How large a part is.
fn part(server: &Server) -> usize {
    server.client.max_payload().saturating_sub(4096).clamp(1024, 1 << 20)
}

/// Stores `body` in parts, under a name that starts with the call's.
pub(super) async fn store(
    server: &Server,
    names: &Names,
    id: &str,
    body: &Bytes,
) -> Result<Parts, Fault> {
    let name = format!("{}.{}", token(id), uuid::Uuid::new_v4().simple());
    let size = part(server);
    let count = body.len().div_ceil(size);
    stream::iter(0..count)
        .map(|number| {
            let piece = body.slice(number * size..body.len().min((number + 1) * size));
            server.put(names.part(BODIES, &name, number), HeaderMap::new(), piece, None)
        })
        .buffer_unordered(TOGETHER)
        .try_for_each(|_| std::future::ready(Ok(())))
        .await?;
    Ok(Parts { name, count })
}

/// The body that was stored so; `None` if a part is missing, or it is larger than any may be.
pub(super) async fn load(
    server: &Server,
    names: &Names,
    parts: &Parts,
) -> Result<Option<Bytes>, Fault> {
    let subjects = (0..parts.count).map(|number| names.part(BODIES, &parts.name, number));
    let found = stream::iter(subjects)
        .map(|subject| async move { server.last(&names.bodies, &subject).await })
        .buffered(TOGETHER);
    let (mut found, mut body) = (std::pin::pin!(found), BytesMut::new());
    // How many there are is what the message says, which may be a stranger's.
    while let Some(part) = found.try_next().await? {
        let Some(part) = part.filter(|part| body.len() + part.payload.len() <= LARGEST) else {
            return Ok(None);
        };
        body.extend_from_slice(&part.payload);
    }
    Ok(Some(body.freeze()))
}

/// Removes what was stored so.
pub(super) async fn remove(server: &Server, names: &Names, parts: &Parts) -> Result<(), Fault> {
    // A name is used once: all that has it is of one body.
    server.purge(&names.bodies, &names.part(BODIES, &parts.name, "*"), u64::MAX - 1).await
}

impl Shared {
    /// Removes bodies older than `age` that no call has any more; how many there were.
    pub(super) async fn tidy(&self, age: Duration) -> Result<u64, Fault> {
        let (server, names) = (&self.server, &self.names);
        let subjects = server.subjects(&names.bodies, &names.all(BODIES), usize::MAX).await?;
        // `root.queue.id.name.number`
        let stored: BTreeSet<_> = subjects
            .iter()
            .filter_map(|subject| {
                let (front, _) = subject.rsplit_once('.')?;
                let mut tokens = front.rsplit('.');
                let (name, id) = (tokens.next()?, tokens.next()?);
                Some((id.to_owned(), format!("{id}.{name}")))
            })
            .collect();
        let mut removed = 0;
        // Whoever calls this may be cut off, and then goes on where it was.
        let from = self.tidied_to().clone().map_or(Unbounded, Excluded);
        for body in stored.range((from, Unbounded)) {
            *self.tidied_to() = Some(body.clone());
            let (id, parts) = (&body.0, Parts { name: body.1.clone(), count: 0 });
            let last = server.last(&names.bodies, &names.part(BODIES, &parts.name, "*")).await?;
            let Some(last) = last else { continue };
            let born = u128::try_from(last.time.unix_timestamp_nanos()).unwrap_or(0) / 1_000_000;
            if u128::from(now()).saturating_sub(born) < age.as_millis() {
                continue;
            }
            let Some(id) = text(id) else { continue };
            if !self.has_body(&id, &parts.name).await? {
                remove(server, names, &parts).await?;
                removed += 1;
            }
        }
        *self.tidied_to() = None;
        Ok(removed)
    }

    /// Whether a call with that id, of whatever function, has the body called `name`.
    async fn has_body(&self, id: &str, name: &str) -> Result<bool, Fault> {
        let (calls, dead) = ((&self.names.calls, CALLS), (&self.names.dead, DEAD));
        // Once more, as it may have come back to where was looked first.
        for (stream, root) in [calls, dead, calls] {
            let by_id = self.names.by_id(root, id);
            for subject in self.server.subjects(stream, &by_id, usize::MAX).await? {
                let Some(found) = self.server.last(stream, &subject).await? else { continue };
                let parts = Message::stored(found.headers, found.payload).parts();
                if parts.is_some_and(|parts| parts.name == name) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// The body that was looked at last, while there are others behind it.
    pub(super) fn tidied_to(&self) -> MutexGuard<'_, Option<Body>> {
        self.tidied_to.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
