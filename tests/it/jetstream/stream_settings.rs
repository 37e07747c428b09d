//! Streams whose settings differ from those of the queue: updated, left alone, or refused.

use std::time::Duration;

use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy};
use gateway_queue::embedded::Limits;
use gateway_queue::jetstream::{JetStream, Options};
use gateway_queue::{Error, JobQueue as _};

use crate::jetstream::processes::on_jetstream;
use crate::support::eventually;
use crate::support::gateway::Gateway;
use crate::support::jetstream_queue::{
    LIMITS, TestQueue, call, foreign_client, options, stream, succeeded,
};
use crate::support::nats::Nats;
use crate::support::queue::replying_with;

const CALLS: &str = "gateway-faas-request-calls";
const RESULTS: &str = "gateway-faas-request-notes";

async fn config(nats: &Nats, name: &str) -> Config {
    stream(nats, name).await.cached_info().config.clone()
}

async fn create(nats: &Nats, config: Config) {
    let create = async || foreign_client(nats).await.create_stream(config.clone()).await.is_ok();
    eventually("the stream is created", create).await;
}

/// Why the queue refuses the streams.
async fn refusal(options: Options) -> Option<String> {
    let queue = JetStream::open(options).await.unwrap();
    queue.check_streams().await.err().map(|error| error.to_string())
}

#[tokio::test]
async fn settings_of_existing_streams_are_updated() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    let expected = config(&nats, CALLS).await;
    queue.publish(call("a")).await;
    queue.crash(Vec::new()).await;
    let older = Config {
        max_messages: 7,
        max_age: Duration::from_secs(86_400),
        discard: DiscardPolicy::Old,
        duplicate_window: Duration::from_secs(5),
        max_bytes: 1 << 30,
        ..expected.clone()
    };
    foreign_client(&nats).await.update_stream(older).await.unwrap();
    let queue = TestQueue::connected(&nats).await;
    // A limit that the queue does not set is the operator's.
    assert_eq!(config(&nats, CALLS).await, Config { max_bytes: 1 << 30, ..expected });
    queue.settle(queue.receive().await, succeeded()).await;
}

#[tokio::test]
async fn the_time_for_which_results_are_kept_is_only_extended() {
    let nats = Nats::start();
    let ttl = |hours: u64| {
        let limits = Limits { result_ttl: hours * 3_600_000, ..LIMITS };
        Options { limits, ..options(&nats) }
    };
    for (hours, kept) in [(2, 2), (4, 4), (1, 4)] {
        assert_eq!(refusal(ttl(hours)).await, None);
        assert_eq!(config(&nats, RESULTS).await.max_age, Duration::from_secs(kept * 3600));
    }
}

#[tokio::test]
async fn a_stream_with_another_retention_is_refused_until_it_is_removed() {
    let nats = Nats::start();
    let other = Config {
        name: CALLS.to_owned(),
        subjects: vec!["faas.faas-request.>".to_owned()],
        retention: RetentionPolicy::Limits,
        ..Config::default()
    };
    create(&nats, other).await;
    let reason = refusal(options(&nats)).await.unwrap();
    assert!(
        [CALLS, "retention", "faas_nats_channel"].iter().all(|part| reason.contains(part)),
        "{reason}"
    );
    let queue = TestQueue::open(options(&nats)).await;
    assert_eq!(queue.inner.publish(call("a"), None).await, Err(Error::Unreachable));
    assert!(!queue.inner.is_reachable());
    foreign_client(&nats).await.delete_stream(CALLS).await.unwrap();
    eventually("the queue works", async || queue.inner.publish(call("a"), None).await.is_ok())
        .await;
}

#[tokio::test]
async fn a_stream_that_has_the_subjects_of_the_queue_is_named_as_the_reason() {
    let nats = Nats::start();
    let subjects = vec!["faas.>".to_owned()];
    create(&nats, Config { name: "OTHER".to_owned(), subjects, ..Config::default() }).await;
    let reason = refusal(options(&nats)).await.unwrap();
    assert!(
        reason.contains("faas.faas-request.>") && reason.contains("another stream"),
        "{reason}"
    );
}

#[tokio::test]
async fn a_gateway_does_not_start_with_another_storage_than_its_streams() {
    let nats = Nats::start();
    TestQueue::connected(&nats).await.crash(Vec::new()).await;
    let provider = replying_with(&[200], "done");
    let gateway = on_jetstream(&nats, Gateway::builder()).provider(&provider);
    let ended = gateway.var("nats_storage", "memory").run_to_exit(&[]).await;
    let log = String::from_utf8_lossy(&ended.stderr);
    assert!(!ended.status.success(), "{log}");
    assert!(log.contains(CALLS) && log.contains("set nats_storage to file"), "{log}");
}

#[tokio::test]
async fn a_queue_that_may_not_update_streams_uses_them_as_they_are() {
    let (_directory, nats, queue, _other) = TestQueue::restricted("$JS.API.STREAM.UPDATE.>").await;
    queue.crash(Vec::new()).await;
    let changed = Config { max_messages: 7, ..config(&nats, CALLS).await };
    foreign_client(&nats).await.update_stream(changed).await.unwrap();
    let queue = TestQueue::of_user("restricted", options(&nats)).await;
    queue.publish(call("a")).await;
    assert_eq!(config(&nats, CALLS).await.max_messages, 7);
}
