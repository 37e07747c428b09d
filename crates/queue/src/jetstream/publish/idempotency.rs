//! Entries of idempotency keys.
use async_nats::HeaderMap;
use bytes::Bytes;

use crate::jetstream::Shared;
use crate::jetstream::error::NatsError;
use crate::jetstream::wire::subjects::{consumer_name, function_of_consumer};
use gateway_base::function::Function;

/// Entry of an idempotency key.
#[derive(Debug, Default)]
pub(super) struct IdempotencyEntry {
    /// Id of the call; `None` if that was purged.
    pub(super) id: Option<String>,
    /// Sequence of the entry; 0 if there is none.
    pub(super) revision: u64,
}

/// Function of the call, as the name of its consumer.
const FUNCTION_HEADER: &str = "Gateway-Function";

impl Shared {
    /// Loads the entry of an idempotency key.
    pub(super) async fn lookup_idempotency(
        &self,
        key: &str,
    ) -> Result<IdempotencyEntry, NatsError> {
        let found = self
            .api
            .get_last(&self.subjects.idempotency, &self.subjects.idempotency_key(key))
            .await?;
        let Some(found) = found else { return Ok(IdempotencyEntry::default()) };
        let revision = found.sequence;
        let Ok(id) = String::from_utf8(found.payload.into()) else {
            return Ok(IdempotencyEntry { id: None, revision });
        };
        let function =
            found.headers.get(FUNCTION_HEADER).and_then(|name| function_of_consumer(name.as_str()));
        let call = match function {
            Some(function) => self.find_in(Some(&function), &id).await?,
            // Older gateways have not stored the function.
            None => self.find(&id).await?,
        };
        Ok(IdempotencyEntry { id: call.map(|_| id), revision })
    }

    /// Stores the entry of an idempotency key, unless one exists.
    pub(in crate::jetstream) async fn store_idempotency(
        &self,
        key: &str,
        function: &Function,
        id: &str,
    ) -> Result<(), NatsError> {
        self.store_idempotency_over(key, function, id, 0).await
    }

    /// Stores the entry of an idempotency key if the last one has this revision.
    pub(super) async fn store_idempotency_over(
        &self,
        key: &str,
        function: &Function,
        id: &str,
        revision: u64,
    ) -> Result<(), NatsError> {
        let mut headers = HeaderMap::new();
        headers.insert(FUNCTION_HEADER, consumer_name(function).as_str());
        let id = Bytes::copy_from_slice(id.as_bytes());
        match self
            .api
            .publish(self.subjects.idempotency_key(key), headers, id, Some(revision))
            .await
        {
            Err(error) if !error.is_conflict() => Err(error),
            _ => Ok(()),
        }
    }
}
