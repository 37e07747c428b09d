//! Lookup and result of a single call.
//!
//! The message of a call decides: while it exists, the call is unfinished, unless a final state names its sequence.
use std::time::Duration;

use bytes::BytesMut;
use futures_util::{StreamExt, TryStreamExt, stream};

use crate::MAX_ASYNC_BODY_BYTES;
use crate::jetstream::Shared;
use crate::jetstream::batch::lookup::InBatch;
use crate::jetstream::decide::location::{Place, latest};
use crate::jetstream::error::NatsError;
use crate::jetstream::location::{CallLocation, DeadLetter, Finished, Pending};
use crate::jetstream::wire::final_record::{FinalRecord, parse_final_record, parse_response_head};
use crate::jetstream::wire::ids::{self, BatchKey};
use crate::jetstream::wire::subjects::{CALLS, DEAD_LETTERS, FINAL_RECORDS, RESPONSES};
use crate::jetstream::wire::tokens::encode_token;
use crate::status::{CallRecord, StoredResponse};
use gateway_base::function::Function;

/// Maximum number of functions that are queried for one call; for more, all subjects are searched.
const MAX_FUNCTIONS_QUERIED: usize = 32;
/// Maximum age of the list of functions.
const FUNCTION_LIST_TTL: Duration = Duration::from_secs(1);
/// Maximum time to wait for the search slot.
const SEARCH_SLOT_TIMEOUT: Duration = Duration::from_secs(1);
/// Up to this number of messages a search of all subjects is cheap.
const MAX_SEARCHED_MESSAGES: u64 = 10_000;

impl Shared {
    /// Finds the call with `id`.
    pub(super) async fn find(&self, id: &str) -> Result<Option<CallLocation>, NatsError> {
        let filter = ids::function_filter(id);
        let matches = |function: &Function| filter.as_ref().is_none_or(|matches| matches(function));
        let mut checked = Vec::new();
        // Another process may have created a consumer since the last listing.
        for age in [FUNCTION_LIST_TTL, Duration::ZERO] {
            let (functions, queried) = self.functions(age).await?;
            let unchecked: Vec<_> = functions
                .into_iter()
                .filter(|function| matches(function) && !checked.contains(function))
                .collect();
            if unchecked.len() > MAX_FUNCTIONS_QUERIED {
                return self.search(id).await;
            }
            let found = stream::iter(unchecked.clone())
                .map(|function| async move { self.find_in(Some(&function), id).await })
                .buffer_unordered(MAX_FUNCTIONS_QUERIED)
                .try_filter_map(|found| std::future::ready(Ok(found)));
            if let Some(found) = std::pin::pin!(found).try_next().await? {
                return Ok(Some(found));
            }
            if queried {
                break;
            }
            checked.extend(unchecked);
        }
        // The consumer may have been garbage collected. A small queue is searched completely.
        let is_small = self.api.message_count(&self.subjects.calls).await? <= MAX_SEARCHED_MESSAGES
            && self.api.message_count(&self.subjects.results).await? <= MAX_SEARCHED_MESSAGES;
        if is_small { self.search(id).await } else { Ok(None) }
    }

    /// Finds a call by its id alone.
    async fn search(&self, id: &str) -> Result<Option<CallLocation>, NatsError> {
        let slot = tokio::time::timeout(SEARCH_SLOT_TIMEOUT, self.search_slot.acquire()).await;
        let _slot = slot.map_err(|_| NatsError::Unavailable)?;
        self.find_in(None, id).await
    }

    /// Finds the call of `function` with `id`.
    pub(super) async fn find_in(
        &self,
        function: Option<&Function>,
        id: &str,
    ) -> Result<Option<CallLocation>, NatsError> {
        let Some(key) = BatchKey::from_id(id) else { return self.find_single(function, id).await };
        let moving = match Box::pin(self.find_in_batch(function, key, id)).await? {
            InBatch::Found(found) => return Ok(Some(found)),
            InBatch::Purged => return Ok(None),
            InBatch::Split(moving) => moving,
            InBatch::NotFound => None,
        };
        let single = self.find_single(function, id).await?;
        Ok(single.or(moving.map(CallLocation::Pending)))
    }

    /// Finds a call that has its own message. Locations are read in the reverse order of writing, so a call that moves
    /// is found at one of them. A killed server may have lost removals: the sequence numbers show which location is the
    /// latest.
    pub(super) async fn find_single(
        &self,
        function: Option<&Function>,
        id: &str,
    ) -> Result<Option<CallLocation>, NatsError> {
        let (api, subjects) = (&self.api, &self.subjects);
        let subject = |root| match function {
            Some(function) => subjects.call(root, function, id),
            None => subjects.by_id(root, id),
        };
        // A client may have chosen the same id for a call. It must not hide the dead letter.
        if let Some(subject) = subjects.letter(function, id)
            && let Some(found) = api.get_last(&subjects.dead_letters, &subject).await?
            && let Some(letter) = DeadLetter::new(found)
        {
            return Ok(Some(CallLocation::DeadLetter(letter)));
        }
        // A second pass, since the call may have returned to a location that was already read.
        for _ in 0..2 {
            let pending = api.get_last(&subjects.calls, &subject(CALLS)).await?;
            let mut pending = pending.and_then(Pending::new);
            if let Some(pending) = &mut pending {
                pending.claimed_at = self.running_calls().await?.get(&pending.call_ref()).copied();
            }
            let (dead, final_record) = (subject(DEAD_LETTERS), subject(FINAL_RECORDS));
            let (dead, final_record) = tokio::try_join!(
                api.get_last(&subjects.dead_letters, &dead),
                api.get_last(&subjects.results, &final_record)
            )?;
            let dead = dead.and_then(DeadLetter::new);
            let final_record = final_record
                .and_then(|found| Some((parse_final_record(&found.headers)?, found.payload)));
            let place = latest(
                pending.as_ref().map(|pending| pending.sequence),
                dead.as_ref().map(|dead| dead.previous_seq),
                final_record.as_ref().map(|(record, _)| record.sequence),
            );
            match place {
                Some(Place::DeadLetter) => return Ok(dead.map(CallLocation::DeadLetter)),
                Some(Place::FinalRecord) => {
                    let retained =
                        final_record.filter(|(record, _)| self.is_retained(&record.status));
                    return Ok(retained.map(|(final_record, body)| {
                        CallLocation::Finished(Finished { final_record, body, in_batch: None })
                    }));
                }
                Some(Place::Message) => return Ok(pending.map(CallLocation::Pending)),
                None => {}
            }
        }
        Ok(None)
    }

    pub(super) async fn status(&self, id: &str) -> Result<Option<CallRecord>, NatsError> {
        Ok(self.find(id).await?.and_then(|found| match found {
            CallLocation::Pending(pending) => pending.status(pending.claimed_at),
            CallLocation::DeadLetter(DeadLetter { status, .. })
            | CallLocation::Finished(Finished {
                final_record: FinalRecord { status, .. }, ..
            }) => Some(status),
        }))
    }

    pub(super) async fn result(&self, id: &str) -> Result<Option<StoredResponse>, NatsError> {
        let chunk = |number: usize| self.subjects.chunk(RESPONSES, &encode_token(id), number);
        let first = match self.find(id).await? {
            None | Some(CallLocation::Pending(_)) => return Ok(None),
            Some(CallLocation::Finished(Finished {
                final_record: FinalRecord { response: Some(head), .. },
                body,
                ..
            })) => {
                return Ok(Some(head.into_response(body)));
            }
            Some(_) => self.api.get_last(&self.subjects.results, &chunk(0)).await?,
        };
        let Some(first) = first else { return Ok(None) };
        let Some(head) = parse_response_head(&first.headers) else { return Ok(None) };
        if head.chunks <= 1 {
            return Ok(Some(head.into_response(first.payload)));
        }
        let mut body = BytesMut::from(&first.payload[..]);
        for number in 1..head.chunks {
            let next = self.api.get_last(&self.subjects.results, &chunk(number)).await?;
            let next = next.filter(|next| body.len() + next.payload.len() <= MAX_ASYNC_BODY_BYTES);
            let Some(next) = next else { return Ok(None) };
            body.extend_from_slice(&next.payload);
        }
        Ok(Some(head.into_response(body.freeze())))
    }
}
