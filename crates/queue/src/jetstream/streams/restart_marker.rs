//! The restart marker: up to which call a killed server may have lost the removal of messages.
use async_nats::HeaderMap;
use serde::{Deserialize, Serialize};

use crate::jetstream::api::JetStreamApi;
use crate::jetstream::error::NatsError;
use crate::jetstream::wire::json;
use crate::jetstream::wire::subjects::Subjects;

/// Identifies one run of the server, as the first client has seen it.
#[derive(Serialize, Deserialize)]
struct RestartMarker {
    /// Server id; it changes with each start.
    server: String,
    /// Sequence of the last call at that time.
    last: u64,
}

/// Returns the sequence of the last call before the start of the server: a killed server may have lost the removal of
/// those. The first client that connects stores it, so that others need not suspect later calls. In a cluster, another
/// server than the connected one may have been restarted; so all calls up to `last` are suspected there.
pub(super) async fn last_before_restart(
    api: &JetStreamApi,
    subjects: &Subjects,
    last: u64,
) -> Result<u64, NatsError> {
    let info = api.client.server_info();
    if info.cluster.is_some() {
        return Ok(last);
    }
    let subject = subjects.restart_marker();
    let found = api.get_last(&subjects.dead_letters, &subject).await?;
    let marker = found
        .as_ref()
        .and_then(|found| serde_json::from_slice::<RestartMarker>(&found.payload).ok());
    if let Some(marker) = marker.filter(|marker| marker.server == info.server_id) {
        return Ok(marker.last);
    }
    let marker = json(&RestartMarker { server: info.server_id, last });
    let before = found.map_or(0, |found| found.sequence);
    match api.publish(subject, HeaderMap::new(), marker.into(), Some(before)).await {
        // Another client was faster; its value differs only by calls since then.
        Err(error) if !error.is_conflict() => Err(error),
        _ => Ok(last),
    }
}
