//! How a call is taken in: once, whoever tries again.

use async_nats::HeaderMap;
use bytes::Bytes;

use crate::function::Function;
use crate::queue::call::QueuedCall;
use crate::queue::jetstream::message::{Message, Parts};
use crate::queue::jetstream::server::Fault;
use crate::queue::jetstream::subject::{CALLS, Names, consumed, consumer};
use crate::queue::jetstream::{JetStream, Shared, parts};
use crate::queue::{Error, Published};

/// The server takes 64 KiB of headers, and what is noted of a call later goes there as well.
const MAX_HEAD: usize = 62 << 10;

/// What is noted of a key.
#[derive(Debug, Default)]
struct Keyed {
    /// The call that it stands for. One that was purged is none.
    id: Option<String>,
    /// The number of the note; none is 0.
    note: u64,
}

/// Whose call a key stands for, as its consumer is named.
const FUNCTION: &str = "Gateway-Function";

impl Shared {
    /// Takes `call` in.
    pub(super) async fn publish(&self, call: &QueuedCall) -> Result<Published, Error> {
        self.ready().await?;
        let (id, key) = (&call.id, call.options.idempotency_key.as_deref());
        let keyed = match key {
            Some(key) => Box::pin(self.keyed(key)).await?,
            None => Keyed::default(),
        };
        if let Some(id) = keyed.id {
            return Ok(Published { id, duplicate: true });
        }
        if call.options.chosen_id {
            match Box::pin(self.repeats(call)).await? {
                Some(true) => return Ok(Published { id: id.clone(), duplicate: true }),
                Some(false) => return self.publish_renamed(call).await,
                None => {}
            }
        }
        let _taken = self.make_room(1).await?;
        // First the consumer: without one, nobody would look for the call.
        self.consumer(&call.function).await?;
        let mut message = Message::new(call);
        if message.head() > MAX_HEAD {
            return Err(Error::HeadTooLarge(MAX_HEAD));
        }
        if !self.server.fits(message.head(), call.body.len()) {
            let parts = parts::store(&self.server, &self.names, id, &call.body);
            let parts = Box::pin(parts).await?;
            message = message.with_parts(&parts);
        }
        let first = match self.store(call, &message, keyed.note).await {
            Ok(first) => first,
            // The message may be there all the same: then its parts are needed.
            Err(Fault::Away) => return Err(Error::Unreachable),
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
            // Another call under the same id may have come at the same moment.
            if first.as_ref() == Some(id) && Box::pin(self.repeats(call)).await? == Some(false) {
                return self.publish_renamed(call).await;
            }
        }
        let repeated = first.is_some();
        let published = Published { id: first.unwrap_or_else(|| id.clone()), duplicate: repeated };
        if let Some(key) = key {
            let remembered = self.remember_over(key, &call.function, &published.id, keyed.note);
            Box::pin(remembered).await?;
        }
        Ok(published)
    }

    /// Whether the call under the same id is this one once more; `None` if there is no such call. It is looked for where
    /// it would be: an id that was chosen says nothing of its function, and two functions may have one under the same.
    async fn repeats(&self, call: &QueuedCall) -> Result<Option<bool>, Fault> {
        let found = self.find_in(Some(&call.function), &call.id).await?;
        let (function, digest) = (call.function.to_string(), call.options.digest.as_deref());
        Ok(found
            .map(|first| first.status().is_some_and(|first| first.is_same_call(&function, digest))))
    }

    /// Takes another call under a known id in, under one of its own.
    async fn publish_renamed(&self, call: &QueuedCall) -> Result<Published, Error> {
        let renamed = call.clone().with_new_id(JetStream::new_call_id(&call.function));
        Box::pin(self.publish(&renamed)).await
    }

    /// Stores the call's message, unless there is one; then the id of that call. `note` is what was noted of its key.
    async fn store(
        &self,
        call: &QueuedCall,
        message: &Message,
        note: u64,
    ) -> Result<Option<String>, Fault> {
        let key = call.options.idempotency_key.as_deref();
        let subject = self.names.call(CALLS, &call.function, &call.id);
        // What the server knows a repeated message by takes up room there: an id that was made here comes but once.
        let mut headers = match key {
            Some(key) => message.named(&Names::message_of_key(key, note)),
            None if call.options.chosen_id => {
                let digest = call.options.digest.as_deref().unwrap_or_default();
                message.named(&format!("id-{subject}-{digest}"))
            }
            None => message.fresh(),
        };
        loop {
            let body = message.body.clone();
            match self.server.put(subject.clone(), headers, body, Some(0)).await {
                Ok(stored) if stored.duplicate => {
                    let first = Box::pin(self.first(stored.sequence, key, call)).await?;
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
        call: &QueuedCall,
    ) -> Result<Option<String>, Fault> {
        if let Some(found) = self.server.at(&self.names.calls, sequence).await?
            && let Ok(call) = Message::stored(found.headers, found.payload).call()
        {
            return Ok(Some(call.id));
        }
        match key {
            Some(key) => Ok(self.keyed(key).await?.id),
            None => {
                let found = self.find_in(Some(&call.function), &call.id).await?;
                Ok(found.map(|_| call.id.clone()))
            }
        }
    }

    /// What is noted of `key`.
    async fn keyed(&self, key: &str) -> Result<Keyed, Fault> {
        let found = self.server.last(&self.names.keys, &self.names.key(key)).await?;
        let Some(found) = found else { return Ok(Keyed::default()) };
        let note = found.sequence;
        let Ok(id) = String::from_utf8(found.payload.into()) else {
            return Ok(Keyed { id: None, note });
        };
        let function = found.headers.get(FUNCTION).and_then(|it| consumed(it.as_str()));
        let call = match function {
            Some(function) => self.find_in(Some(&function), &id).await?,
            // An older gateway has not said whose call it is.
            None => self.find(&id).await?,
        };
        Ok(Keyed { id: call.map(|_| id), note })
    }

    /// Notes which call `key` stands for, unless that is known.
    pub(super) async fn remember(
        &self,
        key: &str,
        function: &Function,
        id: &str,
    ) -> Result<(), Fault> {
        self.remember_over(key, function, id, 0).await
    }

    /// The same, where the last that was noted of it is the `note`.
    async fn remember_over(
        &self,
        key: &str,
        function: &Function,
        id: &str,
        note: u64,
    ) -> Result<(), Fault> {
        let mut headers = HeaderMap::new();
        headers.insert(FUNCTION, consumer(function).as_str());
        let id = Bytes::copy_from_slice(id.as_bytes());
        match self.server.put(self.names.key(key), headers, id, Some(note)).await {
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
