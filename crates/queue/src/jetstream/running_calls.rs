//! Reads which calls run, in any process.
use std::collections::HashMap;

use futures_util::{StreamExt, TryStreamExt, stream};

use crate::call::UnixMillis;
use crate::jetstream::Shared;
use crate::jetstream::error::NatsError;
use crate::jetstream::wire::call_ref::CallRef;
use crate::jetstream::wire::claims::RunningList;

/// Maximum number of concurrent requests to the server.
const MAX_CONCURRENT_QUERIES: usize = 32;

impl Shared {
    /// Returns all claimed calls of all receivers, and the times of their claims.
    pub(in crate::jetstream) async fn running_calls(
        &self,
    ) -> Result<HashMap<CallRef, UnixMillis>, NatsError> {
        Ok(self.running_lists().await?.iter().flat_map(RunningList::call_refs).collect())
    }

    /// Returns the running lists of all receivers.
    pub(in crate::jetstream) async fn running_lists(&self) -> Result<Vec<RunningList>, NatsError> {
        let (api, subjects) = (&self.api, &self.subjects);
        let lists = api.subjects(&subjects.claims, &subjects.running_list("*"), usize::MAX).await?;
        let lists: Vec<_> = stream::iter(lists)
            .map(|list| async move { api.get_last(&subjects.claims, &list).await })
            .buffer_unordered(MAX_CONCURRENT_QUERIES)
            .try_collect()
            .await?;
        let lists = lists.into_iter().flatten();
        Ok(lists.filter_map(|list| serde_json::from_slice(&list.payload).ok()).collect())
    }
}
