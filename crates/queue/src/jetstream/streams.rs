//! The streams of a queue. Missing ones are created; existing ones are never changed.

use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::context::GetStreamErrorKind;
use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType};
use serde::{Deserialize, Serialize};

use crate::jetstream::api::JetStreamApi;
use crate::jetstream::error::NatsError;
use crate::jetstream::message::json;
use crate::jetstream::subject::{
    BATCHES, BODIES, CALLS, CLAIMS, DEAD_LETTERS, FINAL_RECORDS, IDEMPOTENCY, RESPONSES, Subjects,
};
use crate::jetstream::{Options, claims};

/// Time during which the server detects duplicate publishes. Later ones are detected by stored data.
const MAX_DUPLICATE_WINDOW: Duration = Duration::from_secs(120);
/// Minimum `max_age` that the server accepts.
const MIN_MAX_AGE: Duration = Duration::from_millis(100);

/// Returns the configuration of all streams.
fn stream_configs(subjects: &Subjects, options: &Options) -> Vec<Config> {
    let stream = |name: &str, roots: &[&str], max_age: Duration| Config {
        name: name.to_owned(),
        subjects: roots.iter().map(|root| subjects.all(root)).collect(),
        retention: RetentionPolicy::Limits,
        storage: if options.in_memory { StorageType::Memory } else { StorageType::File },
        num_replicas: options.replicas.max(1),
        max_messages: -1,
        max_bytes: -1,
        max_messages_per_subject: 1,
        max_age,
        ..Config::default()
    };
    let kept = |millis| Duration::from_millis(millis).max(MIN_MAX_AGE);
    // A finished call may be redelivered, and is recognized by its final state. So that must outlive the lease and a
    // cancellation.
    let results =
        kept(options.limits.result_ttl).max(options.lease * 2 + claims::CANCEL_MARKER_TTL);
    let keys = kept(options.limits.idempotency_ttl);
    let calls = Config {
        retention: RetentionPolicy::WorkQueue,
        discard: DiscardPolicy::New,
        // More than the limit of calls: each call of a batch may get its own message.
        max_messages: i64::try_from(options.limits.max_pending * 2 + 1024).unwrap_or(i64::MAX),
        duplicate_window: keys.min(MAX_DUPLICATE_WINDOW),
        ..stream(&subjects.calls, &[CALLS], Duration::ZERO)
    };
    vec![
        calls,
        stream(&subjects.dead_letters, &[DEAD_LETTERS], Duration::ZERO),
        stream(&subjects.results, &[FINAL_RECORDS, RESPONSES], results),
        stream(&subjects.idempotency, &[IDEMPOTENCY], keys),
        // The list of a receiver that died expires when others may have received its calls. A cancel marker must
        // outlive the time for which a receiver can hold a call without a claim.
        stream(&subjects.claims, &[CLAIMS], options.lease * 2 + claims::CANCEL_MARKER_TTL),
        stream(&subjects.bodies, &[BODIES], Duration::ZERO),
        stream(&subjects.batches, &[BATCHES], Duration::ZERO),
    ]
}

/// Identifies one run of the server, as the first client has seen it.
#[derive(Serialize, Deserialize)]
struct RestartMarker {
    /// Server id; it changes with each start.
    server: String,
    /// Sequence of the last call at that time.
    last: u64,
}

/// Ensures that all streams exist. Returns the sequence of the last call that was stored before the server was started.
pub(super) async fn ensure_streams(
    api: &JetStreamApi,
    subjects: &Subjects,
    options: &Options,
) -> Result<u64, NatsError> {
    let mut last = 0;
    for config in stream_configs(subjects, options) {
        let found = match api.context.get_stream(&config.name).await {
            Ok(stream) => {
                let info = stream.cached_info();
                if config.name == subjects.calls {
                    last = info.state.last_sequence;
                }
                info.config.clone()
            }
            Err(error) => match error.kind() {
                GetStreamErrorKind::JetStream(error) if error.code() == 404 => {
                    create_stream(api, config).await?;
                    continue;
                }
                GetStreamErrorKind::JetStream(error) if error.code() != 503 => {
                    return Err(NatsError::Rejected(error.error_code().0, error.to_string()));
                }
                _ => return Err(NatsError::Unavailable),
            },
        };
        let differing = config_drift(&config, &found);
        if !differing.is_empty() {
            tracing::warn!(
                stream = config.name,
                settings = differing.join(", "),
                "The settings of a stream differ from the configuration and are not changed"
            );
        }
    }
    last_before_restart(api, subjects, last).await
}

/// Returns the sequence of the last call before the start of the server: a killed server may have lost the removal of
/// those. The first client that connects stores it, so that others need not suspect later calls. In a cluster, another
/// server than the connected one may have been restarted; so all calls up to `last` are suspected there.
async fn last_before_restart(
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

async fn create_stream(api: &JetStreamApi, config: Config) -> Result<(), NatsError> {
    use async_nats::jetstream::context::CreateStreamErrorKind;
    let name = config.name.clone();
    match api.context.create_stream(config).await {
        Ok(_) => {
            tracing::info!(stream = name, "Stream created");
            Ok(())
        }
        Err(error) => match error.kind() {
            CreateStreamErrorKind::JetStream(error) if error.code() != 503 => {
                Err(NatsError::Rejected(error.error_code().0, error.to_string()))
            }
            _ => Err(NatsError::Unavailable),
        },
    }
}

/// Returns the names of relevant settings that differ.
fn config_drift(expected: &Config, found: &Config) -> Vec<&'static str> {
    let limit = |number: i64| if number <= 0 { -1 } else { number };
    let checks = [
        ("subjects", expected.subjects == found.subjects),
        ("retention", expected.retention == found.retention),
        ("storage", expected.storage == found.storage),
        ("replicas", expected.num_replicas == found.num_replicas),
        ("max_msgs", limit(expected.max_messages) == limit(found.max_messages)),
        (
            "max_msgs_per_subject",
            limit(expected.max_messages_per_subject) == limit(found.max_messages_per_subject),
        ),
        ("max_age", expected.max_age == found.max_age),
        ("discard", expected.discard == found.discard),
    ];
    checks.into_iter().filter_map(|(name, same)| (!same).then_some(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::embedded::Limits;
    use crate::jetstream::Auth;

    #[test]
    fn all_streams_have_the_configured_storage() {
        for (in_memory, storage) in [(false, StorageType::File), (true, StorageType::Memory)] {
            let limits = Limits { max_pending: 1, result_ttl: 1, idempotency_ttl: 1 };
            let options = Options {
                servers: Vec::new(),
                auth: Auth::Anonymous,
                tls: false,
                root_ca: None,
                name: String::new(),
                queue: "q".to_owned(),
                replicas: 1,
                in_memory,
                lease: Duration::from_secs(30),
                limits,
            };
            let streams = stream_configs(&Subjects::new("q"), &options);
            assert!(streams.iter().all(|stream| stream.storage == storage), "{in_memory}");
        }
    }
}
