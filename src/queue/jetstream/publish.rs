//! How a call is taken in: once, whoever tries again.

use async_nats::HeaderMap;
use bytes::Bytes;

use crate::queue::call::Call;
use crate::queue::jetstream::message::{Message, Parts};
use crate::queue::jetstream::server::Fault;
use crate::queue::jetstream::subject::{CALLS, token};
use crate::queue::jetstream::{JetStream, Shared, parts};
use crate::queue::{Error, Published};

impl Shared {
    pub(super) async fn publish(&self, call: &Call) -> Result<Published, Error> {
        self.ready().await?;
        let (id, key) = (&call.id, call.options.idempotency_key.as_deref());
        if let Some(key) = key
            && let Some(id) = Box::pin(self.keyed(key)).await?
        {
            return Ok(Published { id, repeated: true });
        }
        if call.options.chosen_id
            && let Some(first) = Box::pin(self.status(id)).await?
        {
            let digest = call.options.digest.as_deref();
            if first.is_repeated_by(&call.function.to_string(), digest) {
                return Ok(Published { id: id.clone(), repeated: true });
            }
            let renamed = call.clone().renamed(JetStream::fresh_id(&call.function));
            return Box::pin(self.publish(&renamed)).await;
        }
        // First the consumer: without one, nobody would look for the call.
        self.consumer(&call.function).await?;
        let mut message = Message::new(call);
        if !self.server.fits(message.head(), call.body.len()) {
            let parts = parts::store(&self.server, &self.names, id, &call.body);
            let parts = Box::pin(parts).await?;
            message = message.with_parts(&parts);
        }
        let first = match self.store(call, &message).await {
            Ok(first) => first,
            // The message may be there all the same: then its parts are needed.
            Err(Fault::Away) => return Err(Error::Away),
            Err(fault) => {
                Box::pin(self.forget_parts(message.parts().as_ref())).await;
                return Err(match fault {
                    Fault::TooLarge => Error::TooLarge(call.body.len()),
                    fault => fault.into(),
                });
            }
        };
        if first.is_some() {
            Box::pin(self.forget_parts(message.parts().as_ref())).await;
        }
        let repeated = first.is_some();
        let published = Published { id: first.unwrap_or_else(|| id.clone()), repeated };
        if let Some(key) = key {
            Box::pin(self.remember(key, &published.id)).await?;
        }
        Ok(published)
    }

    /// Stores the call's message, unless there is one; then the id of that call.
    async fn store(&self, call: &Call, message: &Message) -> Result<Option<String>, Fault> {
        let key = call.options.idempotency_key.as_deref();
        let subject = self.names.call(CALLS, &call.function, &call.id);
        // What the server knows a repeated message by takes up room there: an id that was made here comes but once.
        let mut headers = match key {
            Some(key) => message.named(&format!("key-{}", token(key))),
            None if call.options.chosen_id => {
                let digest = call.options.digest.as_deref().unwrap_or_default();
                message.named(&format!("id-{}-{digest}", token(&call.id)))
            }
            None => message.fresh(),
        };
        loop {
            let body = message.body.clone();
            match self.server.put(subject.clone(), headers, body, Some(0)).await {
                Ok(stored) if stored.duplicate => {
                    let first = Box::pin(self.first(stored.sequence, key, &call.id)).await?;
                    if first.is_some() {
                        return Ok(first);
                    }
                    // All trace of that call was removed: this one is the first again.
                    headers = message.fresh();
                }
                Ok(_) => return Ok(None),
                Err(fault) if fault.is_conflict() => return Ok(Some(call.id.clone())),
                Err(fault) => return Err(fault),
            }
        }
    }

    /// The id of the call that the message `sequence` is or was; `None` if nothing is known of it any more.
    async fn first(
        &self,
        sequence: u64,
        key: Option<&str>,
        id: &str,
    ) -> Result<Option<String>, Fault> {
        if let Some(found) = self.server.at(&self.names.calls, sequence).await?
            && let Ok(call) = Message::stored(found.headers, found.payload).call()
        {
            return Ok(Some(call.id));
        }
        match key {
            Some(key) => self.keyed(key).await,
            None => Ok(self.status(id).await?.map(|_| id.to_owned())),
        }
    }

    /// The id that `key` stands for.
    async fn keyed(&self, key: &str) -> Result<Option<String>, Fault> {
        let found = self.server.last(&self.names.keys, &self.names.key(key)).await?;
        Ok(found.and_then(|found| String::from_utf8(found.payload.into()).ok()))
    }

    /// Notes which call `key` stands for, unless that is known.
    pub(super) async fn remember(&self, key: &str, id: &str) -> Result<(), Fault> {
        let id = Bytes::copy_from_slice(id.as_bytes());
        match self.server.put(self.names.key(key), HeaderMap::new(), id, Some(0)).await {
            Err(fault) if !fault.is_conflict() => Err(fault),
            _ => Ok(()),
        }
    }

    /// Removes a body that no call has any more. If that fails, it takes up room until somebody tidies up.
    pub(super) async fn forget_parts(&self, parts: Option<&Parts>) {
        if let Some(parts) = parts
            && let Err(error) = parts::remove(&self.server, &self.names, parts).await
        {
            let body = &parts.name;
            tracing::warn!(%error, body, "The body of a queued call cannot be removed");
        }
    }
}
