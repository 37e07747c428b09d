//! Configurations of the streams. No I/O.
use std::time::Duration;

use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType};

use crate::jetstream::Options;
use crate::jetstream::wire::claims::CANCEL_MARKER_TTL;
use crate::jetstream::wire::subjects::{
    BATCHES, BODIES, CALLS, CLAIMS, DEAD_LETTERS, FINAL_RECORDS, IDEMPOTENCY, RESPONSES, Subjects,
};

/// Time during which the server detects duplicate publishes. Later ones are detected by stored data.
const MAX_DUPLICATE_WINDOW: Duration = Duration::from_secs(120);

/// Minimum `max_age` that the server accepts.
const MIN_MAX_AGE: Duration = Duration::from_millis(100);

/// Returns the configuration of all streams.
pub(super) fn stream_configs(subjects: &Subjects, options: &Options) -> Vec<Config> {
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
    let results = kept(options.limits.result_ttl).max(options.lease * 2 + CANCEL_MARKER_TTL);
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
        stream(&subjects.claims, &[CLAIMS], options.lease * 2 + CANCEL_MARKER_TTL),
        stream(&subjects.bodies, &[BODIES], Duration::ZERO),
        stream(&subjects.batches, &[BATCHES], Duration::ZERO),
    ]
}

#[cfg(test)]
pub(in crate::jetstream) fn options(in_memory: bool) -> Options {
    Options {
        servers: Vec::new(),
        auth: crate::jetstream::Auth::Anonymous,
        tls: false,
        root_ca: None,
        name: String::new(),
        queue: "q".to_owned(),
        replicas: 2,
        in_memory,
        lease: Duration::from_secs(30),
        limits: crate::embedded::Limits { max_pending: 1, result_ttl: 600_000, idempotency_ttl: 1 },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_streams_have_the_configured_storage() {
        for (in_memory, storage) in [(false, StorageType::File), (true, StorageType::Memory)] {
            let streams = stream_configs(&Subjects::new("q"), &options(in_memory));
            assert!(streams.iter().all(|stream| stream.storage == storage), "{in_memory}");
        }
    }
}
