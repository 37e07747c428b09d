//! Compares existing streams with their expected configurations. No I/O.
use std::cmp::Ordering;
use std::time::Duration;

use async_nats::jetstream::stream::{Config, StorageType};

/// Differences between a stream and its expected configuration.
#[derive(Debug)]
pub(super) struct Drift {
    /// The configuration of the stream with the changes that are made. Other settings are left to operators.
    pub(super) updated: Config,
    /// Descriptions of these changes.
    pub(super) changes: Vec<String>,
    /// Descriptions of differences that only an operator may change.
    pub(super) by_hand: Vec<String>,
}

/// Compares a stream with its expected configuration. Limits are only raised: another process may have another
/// setting, and the lower one must not remove what the other keeps.
///
/// # Errors
/// When the stream cannot be used: the setting and the remedy.
pub(super) fn compare(expected: &Config, found: &Config) -> Result<Drift, String> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use async_nats::jetstream::stream::{DiscardPolicy, RetentionPolicy};

    use crate::jetstream::streams::configs::{options, stream_configs};
    use crate::jetstream::wire::subjects::Subjects;

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
}
