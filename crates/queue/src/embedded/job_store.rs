//! Queries and changes of stored calls.

use std::sync::Arc;

use futures_util::future::BoxFuture;

use crate::embedded::queries::following;
use crate::embedded::schedule::CallSeq;
use crate::embedded::writer::WriteOp;
use crate::embedded::{Embedded, SCAN_BATCH_SIZE};
use crate::status::{CallRecord, StoredResponse};
use crate::{CallPage, ChangeOutcome, Error, Filter, JobStore, Order, QueueDepth};
use gateway_base::function::Function;

impl JobStore for Embedded {
    fn status<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<Option<CallRecord>, Error>> {
        let (shared, id) = (Arc::clone(&self.shared), id.to_owned());
        Box::pin(shared.read_blocking(move |shared| shared.status(&id)))
    }

    fn result<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<Option<StoredResponse>, Error>> {
        let (shared, id) = (Arc::clone(&self.shared), id.to_owned());
        Box::pin(shared.read_blocking(move |shared| {
            shared.read_snapshot(|snapshot| {
                let Some(number) = snapshot.number_of(&id)? else { return Ok(None) };
                Ok(snapshot.finished(number)?.and_then(|(_, response)| response))
            })
        }))
    }

    fn cancel<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<ChangeOutcome, Error>> {
        Box::pin(self.submit(|reply| WriteOp::Cancel(id.to_owned(), reply)))
    }

    fn redrive<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<ChangeOutcome, Error>> {
        Box::pin(self.submit(|reply| WriteOp::Redrive(id.to_owned(), reply)))
    }

    fn list<'a>(
        &'a self,
        filter: &'a Filter,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<CallPage, Error>> {
        let (shared, filter) = (Arc::clone(&self.shared), filter.clone());
        let after = after.map(str::to_owned);
        Box::pin(shared.read_blocking(move |shared| {
            let first = match (&after, filter.order) {
                // An unknown id has no successor.
                (Some(id), order) => shared
                    .read_snapshot(|snapshot| snapshot.number_of(id))?
                    .and_then(|last| following(order, last)),
                (None, Order::OldestFirst) => Some(0),
                (None, Order::NewestFirst) => Some(CallSeq::MAX),
            };
            let found = shared.find(&filter, first, limit)?;
            let calls = found.into_iter().map(|(_, status)| status).collect();
            Ok(CallPage { calls, complete: true })
        }))
    }

    fn purge<'a>(&'a self, filter: &'a Filter) -> BoxFuture<'a, Result<u64, Error>> {
        Box::pin(async move {
            let (mut purged, mut first) = (0, Some(0));
            loop {
                let shared = Arc::clone(&self.shared);
                let filter = Filter { order: Order::OldestFirst, ..filter.clone() };
                let found = shared
                    .read_blocking(move |shared| shared.find(&filter, first, SCAN_BATCH_SIZE))
                    .await?;
                let Some((last, _)) = found.last() else { return Ok(purged) };
                first = last.checked_add(1);
                let ids = found.into_iter().map(|(_, status)| status.id).collect();
                purged += self.submit(|reply| WriteOp::Purge(ids, reply)).await?;
            }
        })
    }

    fn depths(&self) -> BoxFuture<'_, Result<Vec<(Function, QueueDepth)>, Error>> {
        let shared = Arc::clone(&self.shared);
        Box::pin(shared.read_blocking(|shared| shared.depths()))
    }
}
