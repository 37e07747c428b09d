//! Publishes calls, and detects duplicates of clients that retry.
use crate::call::QueuedCall;
use crate::jetstream::Shared;
use crate::jetstream::error::NatsError;
use crate::jetstream::publish::chunked_body;
use crate::jetstream::publish::idempotency::IdempotencyEntry;
use crate::jetstream::wire::ids::new_call_id;
use crate::jetstream::wire::message::Message;
use crate::jetstream::wire::subjects::{CALLS, Subjects};
use crate::{Error, Published};

/// Maximum size of the headers. The server allows 64 KiB, and later updates of the call add to them.
const MAX_HEAD_BYTES: usize = 62 << 10;

impl Shared {
    /// Publishes `call`.
    ///
    /// If the future is dropped, what was written stays: chunks of the body without a call, the call, or the call
    /// without the entry of its idempotency key.
    ///
    /// # Errors
    /// [`Error::Full`] without capacity, [`Error::HeadTooLarge`] and [`Error::TooLarge`] for calls beyond the server's
    /// limits, [`Error::Unreachable`] when the server does not respond: then the call may be stored all the same, and a
    /// retry with the same id or key is safe.
    pub(in crate::jetstream) async fn publish(
        &self,
        call: &QueuedCall,
    ) -> Result<Published, Error> {
        self.ready().await?;
        let (id, key) = (&call.id, call.options.idempotency_key.as_deref());
        let entry = match key {
            Some(key) => Box::pin(self.lookup_idempotency(key)).await?,
            None => IdempotencyEntry::default(),
        };
        if let Some(id) = entry.id {
            return Ok(Published { id, duplicate: true });
        }
        if call.options.chosen_id {
            match Box::pin(self.is_duplicate(call)).await? {
                Some(true) => return Ok(Published { id: id.clone(), duplicate: true }),
                Some(false) => return self.publish_with_new_id(call).await,
                None => {}
            }
        }
        let _permit = self.reserve(1).await?;
        // The consumer must exist first: without it no worker would pull the call.
        self.ensure_consumer(&call.function).await?;
        let mut message = Message::new(call);
        if message.head_size() > MAX_HEAD_BYTES {
            return Err(Error::HeadTooLarge(MAX_HEAD_BYTES));
        }
        if !self.api.fits_in_payload(message.head_size(), call.body.len()) {
            let body = chunked_body::store(&self.api, &self.subjects, id, &call.body);
            let body = Box::pin(body).await?;
            message = message.with_chunked_body(&body);
        }
        let original_id = match self.store_call(call, &message, entry.revision).await {
            Ok(original_id) => original_id,
            // The message may be stored nevertheless, and need its chunks.
            Err(NatsError::Unavailable) => return Err(Error::Unreachable),
            Err(error) => {
                Box::pin(self.remove_body(message.chunked_body().as_ref())).await;
                return Err(match error {
                    NatsError::TooLarge => Error::TooLarge(call.body.len()),
                    error => error.into(),
                });
            }
        };
        if original_id.is_some() {
            Box::pin(self.remove_body(message.chunked_body().as_ref())).await;
            // A different call with the same id may have been published at the same moment.
            if original_id.as_ref() == Some(id)
                && Box::pin(self.is_duplicate(call)).await? == Some(false)
            {
                return self.publish_with_new_id(call).await;
            }
        }
        let duplicate = original_id.is_some();
        let published = Published { id: original_id.unwrap_or_else(|| id.clone()), duplicate };
        if let Some(key) = key {
            let stored =
                self.store_idempotency_over(key, &call.function, &published.id, entry.revision);
            Box::pin(stored).await?;
        }
        Ok(published)
    }

    /// Returns whether a call with the same id is a duplicate of this one, or `None` if there is no such call. Only the
    /// calls of its function are searched: two functions may have calls with the same chosen id.
    async fn is_duplicate(&self, call: &QueuedCall) -> Result<Option<bool>, NatsError> {
        let found = self.find_in(Some(&call.function), &call.id).await?;
        let (function, digest) = (call.function.to_string(), call.options.digest.as_deref());
        Ok(found.map(|original_id| {
            original_id
                .status()
                .is_some_and(|original_id| original_id.is_same_call(&function, digest))
        }))
    }

    /// Publishes a call whose id is already used by a different call, under a new id.
    async fn publish_with_new_id(&self, call: &QueuedCall) -> Result<Published, Error> {
        let renamed = call.clone().with_new_id(new_call_id(&call.function));
        Box::pin(self.publish(&renamed)).await
    }

    /// Publishes the message of a call. Returns the id of the existing call if there is one. `revision` is the revision
    /// of the idempotency entry.
    async fn store_call(
        &self,
        call: &QueuedCall,
        message: &Message,
        revision: u64,
    ) -> Result<Option<String>, NatsError> {
        let key = call.options.idempotency_key.as_deref();
        let subject = self.subjects.call(CALLS, &call.function, &call.id);
        // Duplicate detection costs the server memory; generated ids are unique and do without.
        let mut headers = match key {
            Some(key) => message.with_message_id(&Subjects::idempotent_message_id(key, revision)),
            None if call.options.chosen_id => {
                let digest = call.options.digest.as_deref().unwrap_or_default();
                message.with_message_id(&format!("id-{subject}-{digest}"))
            }
            None => message.original_headers(),
        };
        loop {
            let body = message.body.clone();
            match self.api.publish(subject.clone(), headers, body, Some(0)).await {
                Ok(stored) if stored.duplicate => {
                    let original_id =
                        Box::pin(self.original_id(stored.sequence, key, call)).await?;
                    if original_id.is_some() {
                        return Ok(original_id);
                    }
                    // The earlier call was removed completely, so this one counts as new.
                    headers = message.original_headers();
                }
                Ok(_) => return Ok(None),
                Err(error) if error.is_conflict() => return Ok(Some(call.id.clone())),
                Err(error) => return Err(error),
            }
        }
    }

    /// Returns the id of the call that has or had the message `sequence`, or `None` if nothing is stored of it.
    async fn original_id(
        &self,
        sequence: u64,
        key: Option<&str>,
        call: &QueuedCall,
    ) -> Result<Option<String>, NatsError> {
        if let Some(found) = self.api.get(&self.subjects.calls, sequence).await?
            && let Ok(call) = Message::from_stored(found.headers, found.payload).call()
        {
            return Ok(Some(call.id));
        }
        match key {
            Some(key) => Ok(self.lookup_idempotency(key).await?.id),
            None => {
                let found = self.find_in(Some(&call.function), &call.id).await?;
                Ok(found.map(|_| call.id.clone()))
            }
        }
    }
}
