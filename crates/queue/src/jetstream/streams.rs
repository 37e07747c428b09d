//! The streams of a queue. Missing ones are created. Settings of existing ones are updated where NATS allows it and
//! nothing stored is removed by it; a stream that cannot be used is refused.

use std::cmp::Ordering;
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::context::{CreateStreamErrorKind, GetStreamErrorKind};
use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType};
use serde::{Deserialize, Serialize};

use crate::jetstream::Options;
use crate::jetstream::api::JetStreamApi;
use crate::jetstream::consume::claims;
use crate::jetstream::error::NatsError;
use crate::jetstream::wire::message::json;
use crate::jetstream::wire::subjects::{
    BATCHES, BODIES, CALLS, CLAIMS, DEAD_LETTERS, FINAL_RECORDS, IDEMPOTENCY, RESPONSES, Subjects,
};

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

/// Ensures that all streams exist and are usable. Returns the sequence of the last call that was stored before the
/// server was started.
///
/// # Errors
/// [`NatsError::Incompatible`] when a stream cannot be used: the operator must act. Other errors pass.
pub(super) async fn ensure_streams(
    api: &JetStreamApi,
    subjects: &Subjects,
    options: &Options,
) -> Result<u64, NatsError> {
    let mut last = 0;
    for config in stream_configs(subjects, options) {
        match api.context.get_stream(&config.name).await {
            Ok(stream) => {
                let info = stream.cached_info();
                if config.name == subjects.calls {
                    last = info.state.last_sequence;
                }
                migrate(api, &config, &info.config).await?;
            }
            Err(error) => match error.kind() {
                GetStreamErrorKind::JetStream(error)
                    if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
                {
                    create_stream(api, config).await?;
                }
                GetStreamErrorKind::JetStream(error) if error.code() != 503 => {
                    return Err(NatsError::Rejected(error.error_code().0, error.to_string()));
                }
                _ => return Err(NatsError::Unavailable),
            },
        }
    }
    last_before_restart(api, subjects, last).await
}

/// Updates the settings of an existing stream.
///
/// # Errors
/// [`NatsError::Incompatible`] when the stream has settings that the queue cannot work with and that NATS never
/// changes.
async fn migrate(api: &JetStreamApi, expected: &Config, found: &Config) -> Result<(), NatsError> {
    let stream = &expected.name;
    let Drift { updated, changes, by_hand } =
        compare(expected, found).map_err(|reason| NatsError::Incompatible(reason.into()))?;
    if !by_hand.is_empty() {
        let settings = by_hand.join(", ");
        tracing::warn!(
            stream,
            settings,
            "A stream of the queue differs from the settings. Change it with `nats stream edit`, or the setting"
        );
    }
    if changes.is_empty() {
        return Ok(());
    }
    let settings = changes.join(", ");
    match api.context.update_stream(updated).await {
        Ok(_) => tracing::info!(stream, settings, "Settings of a stream updated"),
        // The queue works with the existing settings, and the user may not be permitted to change them.
        Err(error) => tracing::warn!(
            stream, settings, %error,
            "The settings of a stream cannot be updated. Change them with `nats stream edit`"
        ),
    }
    Ok(())
}

/// Differences between a stream and its expected configuration.
#[derive(Debug)]
struct Drift {
    /// The configuration of the stream with the changes that are made. Other settings are left to operators.
    updated: Config,
    /// Descriptions of these changes.
    changes: Vec<String>,
    /// Descriptions of differences that only an operator may change.
    by_hand: Vec<String>,
}

/// Compares a stream with its expected configuration. Limits are only raised: another process may have another
/// setting, and the lower one must not remove what the other keeps.
///
/// # Errors
/// When the stream cannot be used: the setting and the remedy.
fn compare(expected: &Config, found: &Config) -> Result<Drift, String> {
    check_usable(expected, found)?;
    let mut drift = Drift { updated: found.clone(), changes: Vec::new(), by_hand: Vec::new() };
    let Drift { updated, changes, by_hand } = &mut drift;
    if found.subjects != expected.subjects {
        changes.push(format!("subjects {:?} to {:?}", found.subjects, expected.subjects));
        updated.subjects.clone_from(&expected.subjects);
    }
    // 0 and -1 mean no limit.
    let limit = |limit: i64| u64::try_from(limit).ok().filter(|limit| *limit > 0);
    let room = |number: i64| limit(number).unwrap_or(u64::MAX);
    let max_messages = format!("max_msgs {} to {}", found.max_messages, expected.max_messages);
    match room(found.max_messages).cmp(&room(expected.max_messages)) {
        Ordering::Less => {
            changes.push(max_messages);
            updated.max_messages = expected.max_messages;
        }
        // Calls that are split out of batches need this room.
        Ordering::Greater => by_hand.push(max_messages),
        Ordering::Equal => {}
    }
    if limit(found.max_messages_per_subject) != limit(expected.max_messages_per_subject) {
        let (from, to) = (found.max_messages_per_subject, expected.max_messages_per_subject);
        changes.push(format!("max_msgs_per_subject {from} to {to}"));
        updated.max_messages_per_subject = to;
    }
    // 0 means forever.
    let age = |age: Duration| if age.is_zero() { Duration::MAX } else { age };
    let max_age = format!("max_age {:?} to {:?}", found.max_age, expected.max_age);
    match age(found.max_age).cmp(&age(expected.max_age)) {
        Ordering::Less => {
            changes.push(max_age);
            updated.max_age = expected.max_age;
        }
        // Results would be removed.
        Ordering::Greater => by_hand.push(max_age),
        Ordering::Equal => {}
    }
    if found.discard != expected.discard {
        changes.push(format!("discard {:?} to {:?}", found.discard, expected.discard));
        updated.discard = expected.discard;
    }
    if !expected.duplicate_window.is_zero() && found.duplicate_window != expected.duplicate_window {
        let (from, to) = (found.duplicate_window, expected.duplicate_window);
        changes.push(format!("duplicate_window {from:?} to {to:?}"));
        updated.duplicate_window = to;
    }
    if !updated.max_age.is_zero() {
        // The server accepts no larger window.
        updated.duplicate_window = updated.duplicate_window.min(updated.max_age);
    }
    let replicas = format!("num_replicas {} to {}", found.num_replicas, expected.num_replicas);
    match found.num_replicas.cmp(&expected.num_replicas) {
        Ordering::Less => {
            changes.push(replicas);
            updated.num_replicas = expected.num_replicas;
        }
        // Copies would be removed.
        Ordering::Greater => by_hand.push(replicas),
        Ordering::Equal => {}
    }
    Ok(drift)
}

/// Checks the settings that NATS never changes.
fn check_usable(expected: &Config, found: &Config) -> Result<(), String> {
    let name = &expected.name;
    if found.retention != expected.retention {
        return Err(format!(
            "the stream {name} has retention {:?}, but the queue needs {:?}, and NATS cannot change it: set \
             faas_nats_channel to another name, or remove the stream with `nats stream rm {name}`",
            found.retention, expected.retention
        ));
    }
    if found.storage != expected.storage {
        let storage = |storage| if storage == StorageType::Memory { "memory" } else { "file" };
        let (found, expected) = (storage(found.storage), storage(expected.storage));
        return Err(format!(
            "the stream {name} has storage {found}, but nats_storage is {expected}, and NATS cannot change it: set \
             nats_storage to {found}, or set faas_nats_channel to another name, or remove the streams of the queue \
             once it is empty, beginning with `nats stream rm {name}`"
        ));
    }
    if found.sealed {
        return Err(format!(
            "the stream {name} is sealed: it stores no more messages, and NATS cannot change that: set \
             faas_nats_channel to another name, or remove the stream with `nats stream rm {name}`"
        ));
    }
    if found.mirror.is_some() {
        return Err(format!(
            "the stream {name} is a mirror, which stores no messages of clients: set faas_nats_channel to another \
             name, or remove the stream with `nats stream rm {name}`"
        ));
    }
    Ok(())
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
    let (name, subjects) = (config.name.clone(), config.subjects.join(", "));
    match api.context.create_stream(config).await {
        Ok(_) => {
            tracing::info!(stream = name, "Stream created");
            Ok(())
        }
        Err(error) => match error.kind() {
            CreateStreamErrorKind::JetStream(error)
                if error.error_code() == ErrorCode::STREAM_SUBJECT_OVERLAP =>
            {
                let reason = format!(
                    "the stream {name} cannot be created, since another stream has its subjects ({subjects}): set \
                     faas_nats_channel to another name, or remove the other stream"
                );
                Err(NatsError::Incompatible(reason.into()))
            }
            CreateStreamErrorKind::JetStream(error) if error.code() != 503 => {
                Err(NatsError::Rejected(error.error_code().0, error.to_string()))
            }
            _ => Err(NatsError::Unavailable),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::embedded::Limits;
    use crate::jetstream::Auth;

    fn options(in_memory: bool) -> Options {
        Options {
            servers: Vec::new(),
            auth: Auth::Anonymous,
            tls: false,
            root_ca: None,
            name: String::new(),
            queue: "q".to_owned(),
            replicas: 2,
            in_memory,
            lease: Duration::from_secs(30),
            limits: Limits { max_pending: 1, result_ttl: 600_000, idempotency_ttl: 1 },
        }
    }

    fn expected() -> Vec<Config> {
        stream_configs(&Subjects::new("q"), &options(false))
    }

    #[test]
    fn an_unchanged_stream_is_not_updated() {
        for config in expected() {
            // The server adds limits of its own.
            let found = Config { max_bytes: 1 << 30, max_message_size: 1 << 20, ..config.clone() };
            let Drift { updated, changes, by_hand } = compare(&config, &found).unwrap();
            assert!(changes.is_empty() && by_hand.is_empty(), "{changes:?} {by_hand:?}");
            assert_eq!((updated.max_bytes, updated.max_message_size), (1 << 30, 1 << 20));
        }
    }

    #[test]
    fn settings_that_nats_can_change_are_updated() {
        for config in expected() {
            let found = Config {
                subjects: vec!["other.>".to_owned()],
                max_messages: 7,
                max_messages_per_subject: -1,
                max_age: Duration::from_secs(5),
                num_replicas: 1,
                duplicate_window: Duration::from_secs(3600),
                max_bytes: 1 << 30,
                discard: DiscardPolicy::New,
                ..config.clone()
            };
            let Drift { updated, changes, .. } = compare(&config, &found).unwrap();
            assert!(changes.len() >= 5, "{changes:?}");
            assert_eq!(compare(&config, &updated).unwrap().changes, Vec::<String>::new());
            assert_eq!(updated.max_bytes, 1 << 30, "a quota of the operator is kept");
            assert!(updated.max_age.is_zero() || updated.duplicate_window <= updated.max_age);
        }
    }

    #[test]
    fn limits_are_not_lowered() {
        for config in expected() {
            let found = Config {
                num_replicas: 3,
                max_age: config.max_age * 2,
                max_messages: config.max_messages * 2,
                ..config.clone()
            };
            let Drift { updated, changes, by_hand } = compare(&config, &found).unwrap();
            assert_eq!((updated.num_replicas, updated.max_age), (3, found.max_age));
            assert_eq!(updated.max_messages, found.max_messages);
            assert!(changes.is_empty() && !by_hand.is_empty(), "{changes:?} {by_hand:?}");
        }
    }

    #[test]
    fn a_stream_that_cannot_be_used_is_refused_with_the_setting_and_the_remedy() {
        let config = expected().remove(0);
        let name = &config.name;
        for (found, setting, remedy) in [
            (
                Config { retention: RetentionPolicy::Limits, ..config.clone() },
                "retention",
                "faas_nats_channel",
            ),
            (
                Config { storage: StorageType::Memory, ..config.clone() },
                "storage",
                "set nats_storage to memory",
            ),
            (Config { sealed: true, ..config.clone() }, "sealed", "nats stream rm"),
        ] {
            let reason = compare(&config, &found).unwrap_err();
            assert!(
                [name, setting, remedy].iter().all(|part| reason.contains(*part)),
                "{setting}: {reason}"
            );
        }
    }

    #[test]
    fn all_streams_have_the_configured_storage() {
        for (in_memory, storage) in [(false, StorageType::File), (true, StorageType::Memory)] {
            let streams = stream_configs(&Subjects::new("q"), &options(in_memory));
            assert!(streams.iter().all(|stream| stream.storage == storage), "{in_memory}");
        }
    }
}
