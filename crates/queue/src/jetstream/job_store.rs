//! Queries and changes of stored calls.
use futures_util::future::BoxFuture;

use crate::jetstream::{JetStream, QUERY_TIMEOUT, with_timeout};
use crate::status::{CallRecord, StoredResponse};
use crate::{CallPage, ChangeOutcome, Error, Filter, JobStore, QueueDepth};
use gateway_base::function::Function;

impl JobStore for JetStream {
    fn status<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<Option<CallRecord>, Error>> {
        let record = async { Ok(self.shared.ready().await?.status(id).await?) };
        Box::pin(with_timeout(QUERY_TIMEOUT, record))
    }

    fn result<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<Option<StoredResponse>, Error>> {
        let response = async { Ok(self.shared.ready().await?.result(id).await?) };
        Box::pin(with_timeout(QUERY_TIMEOUT, response))
    }

    /// If the future is dropped after the cancel marker was written, other cancellations of the call report for a while
    /// that it is running. If it is dropped after the tombstone or the outcome was written, the call is never executed.
    fn cancel<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<ChangeOutcome, Error>> {
        Box::pin(async { Ok(self.shared.ready().await?.cancel(id).await?) })
    }

    /// If the future is dropped, the call may be enqueued while lists still contain its dead letter.
    fn redrive<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<ChangeOutcome, Error>> {
        Box::pin(async { Ok(self.shared.ready().await?.redrive(id).await?) })
    }

    fn list<'a>(
        &'a self,
        filter: &'a Filter,
        after: Option<&'a str>,
        limit: usize,
    ) -> BoxFuture<'a, Result<CallPage, Error>> {
        Box::pin(async move { Ok(self.shared.ready().await?.list(filter, after, limit).await?) })
    }

    fn purge<'a>(&'a self, filter: &'a Filter) -> BoxFuture<'a, Result<u64, Error>> {
        Box::pin(async { Ok(self.shared.ready().await?.purge(filter).await?) })
    }

    fn depths(&self) -> BoxFuture<'_, Result<Vec<(Function, QueueDepth)>, Error>> {
        Box::pin(async { Ok(self.shared.ready().await?.counts().await?) })
    }
}
