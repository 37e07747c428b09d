//! The streams of a queue: made when they are missing, never changed.

use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::context::GetStreamErrorKind;
use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType};
use serde::{Deserialize, Serialize};

use crate::queue::jetstream::message::json;
use crate::queue::jetstream::server::{Fault, Server};
use crate::queue::jetstream::subject::{
    ANSWERS, BODIES, CALLS, CLAIMS, DEAD, ENDS, KEYS, Names, OPEN,
};
use crate::queue::jetstream::{Options, roll};

/// For so long the server knows a repeated publish by itself; later it is known by what is stored.
const REPEATS: Duration = Duration::from_secs(120);
/// The server takes no shorter age.
const SHORTEST: Duration = Duration::from_millis(100);

/// All streams of the queue.
fn wanted(names: &Names, options: &Options) -> Vec<Config> {
    let stream = |name: &str, roots: &[&str], max_age: Duration| Config {
        name: name.to_owned(),
        subjects: roots.iter().map(|root| names.all(root)).collect(),
        retention: RetentionPolicy::Limits,
        storage: if options.in_memory { StorageType::Memory } else { StorageType::File },
        num_replicas: options.replicas.max(1),
        max_messages: -1,
        max_bytes: -1,
        max_messages_per_subject: 1,
        max_age,
        ..Config::default()
    };
    let kept = |millis| Duration::from_millis(millis).max(SHORTEST);
    // Somebody may be given a message again whose call is over, and sees that by its final state: it is there for longer
    // than that may take, even if nobody else sees it by then.
    let results = kept(options.limits.result_ttl).max(options.lease * 2 + roll::HEEDED);
    let keys = kept(options.limits.idempotency_ttl);
    let calls = Config {
        retention: RetentionPolicy::WorkQueue,
        discard: DiscardPolicy::New,
        // More than there may be calls: each of those in a message with others may come to have its own.
        max_messages: i64::try_from(options.limits.max_pending * 2 + 1024).unwrap_or(i64::MAX),
        duplicate_window: keys.min(REPEATS),
        ..stream(&names.calls, &[CALLS], Duration::ZERO)
    };
    vec![
        calls,
        stream(&names.dead, &[DEAD], Duration::ZERO),
        stream(&names.notes, &[ENDS, ANSWERS], results),
        stream(&names.keys, &[KEYS], keys),
        // A taker that dies leaves its list: it goes when others may have taken its calls. A mark is heeded for as long
        // as somebody may have the call who has not looked at it.
        stream(&names.claims, &[CLAIMS], options.lease * 2 + roll::HEEDED),
        stream(&names.bodies, &[BODIES], Duration::ZERO),
        stream(&names.open, &[OPEN], Duration::ZERO),
    ]
}

/// The first that was seen of a server since it was started.
#[derive(Serialize, Deserialize)]
struct Seen {
    /// Another one each time it is started.
    server: String,
    /// The last call that was there then.
    last: u64,
}

/// Sees that all streams are there; the number of the last call that was stored before the server was started.
pub(super) async fn prepare(
    server: &Server,
    names: &Names,
    options: &Options,
) -> Result<u64, Fault> {
    let mut last = 0;
    for config in wanted(names, options) {
        let found = match server.context.get_stream(&config.name).await {
            Ok(stream) => {
                let info = stream.cached_info();
                if config.name == names.calls {
                    last = info.state.last_sequence;
                }
                info.config.clone()
            }
            Err(error) => match error.kind() {
                GetStreamErrorKind::JetStream(error) if error.code() == 404 => {
                    create(server, config).await?;
                    continue;
                }
                GetStreamErrorKind::JetStream(error) if error.code() != 503 => {
                    return Err(Fault::Refused(error.error_code().0, error.to_string()));
                }
                _ => return Err(Fault::Away),
            },
        };
        let differing = differing(&config, &found);
        if !differing.is_empty() {
            tracing::warn!(
                stream = config.name,
                settings = differing.join(", "),
                "A stream of the queue is not set up as it should be; it stays as it is"
            );
        }
    }
    before_start(server, names, last).await
}

/// Which calls the server had when it was started: if it was killed, it may have forgotten that some are over. Whoever
/// connects first notes that for all, so that others need not doubt what came later. In a cluster the one that is asked
/// need not be the one that was started, so there all calls that are there, up to `last`, are doubted.
async fn before_start(server: &Server, names: &Names, last: u64) -> Result<u64, Fault> {
    let info = server.client.server_info();
    if info.cluster.is_some() {
        return Ok(last);
    }
    let subject = names.seen();
    let found = server.last(&names.dead, &subject).await?;
    let seen = found.as_ref().and_then(|found| serde_json::from_slice::<Seen>(&found.payload).ok());
    if let Some(seen) = seen.filter(|seen| seen.server == info.server_id) {
        return Ok(seen.last);
    }
    let seen = json(&Seen { server: info.server_id, last });
    let before = found.map_or(0, |found| found.sequence);
    match server.put(subject, HeaderMap::new(), seen.into(), Some(before)).await {
        // Somebody else was faster; what is there now is a little more than there was then.
        Err(fault) if !fault.is_conflict() => Err(fault),
        _ => Ok(last),
    }
}

async fn create(server: &Server, config: Config) -> Result<(), Fault> {
    use async_nats::jetstream::context::CreateStreamErrorKind;
    let name = config.name.clone();
    match server.context.create_stream(config).await {
        Ok(_) => {
            tracing::info!(stream = name, "Stream made");
            Ok(())
        }
        Err(error) => match error.kind() {
            CreateStreamErrorKind::JetStream(error) if error.code() != 503 => {
                Err(Fault::Refused(error.error_code().0, error.to_string()))
            }
            _ => Err(Fault::Away),
        },
    }
}

/// Which settings that matter differ.
fn differing(wanted: &Config, found: &Config) -> Vec<&'static str> {
    let limit = |number: i64| if number <= 0 { -1 } else { number };
    let checks = [
        ("subjects", wanted.subjects == found.subjects),
        ("retention", wanted.retention == found.retention),
        ("storage", wanted.storage == found.storage),
        ("replicas", wanted.num_replicas == found.num_replicas),
        ("max_msgs", limit(wanted.max_messages) == limit(found.max_messages)),
        (
            "max_msgs_per_subject",
            limit(wanted.max_messages_per_subject) == limit(found.max_messages_per_subject),
        ),
        ("max_age", wanted.max_age == found.max_age),
        ("discard", wanted.discard == found.discard),
    ];
    checks.into_iter().filter_map(|(name, same)| (!same).then_some(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::embedded::Limits;
    use crate::queue::jetstream::Auth;

    #[test]
    fn all_streams_are_where_they_are_wanted() {
        for (in_memory, storage) in [(false, StorageType::File), (true, StorageType::Memory)] {
            let limits = Limits { max_pending: 1, result_ttl: 1, idempotency_ttl: 1 };
            let options = Options {
                servers: Vec::new(),
                auth: Auth::Nobody,
                tls: false,
                root_ca: None,
                name: String::new(),
                queue: "q".to_owned(),
                replicas: 1,
                in_memory,
                lease: Duration::from_secs(30),
                limits,
            };
            let streams = wanted(&Names::new("q"), &options);
            assert!(streams.iter().all(|stream| stream.storage == storage), "{in_memory}");
        }
    }
}
