//! Limits of the server, of an account and of a stream: which error a publish has.

use async_nats::jetstream::stream::Config;
use bytes::Bytes;
use gateway_queue::call::QueuedCall;
use gateway_queue::jetstream::{Auth, Options};
use gateway_queue::{Error, JobQueue as _, JobStore as _};

use crate::support::eventually;
use crate::support::jetstream_queue::{
    TestQueue, call, foreign_client, options, retry, stream, succeeded, unix_millis,
};
use crate::support::nats::Nats;

/// Changes the stream of calls while the queue is in use.
async fn change_calls(nats: &Nats, change: impl FnOnce(&mut Config)) {
    let calls = stream(nats, "gateway-faas-request-calls").await;
    let mut config = calls.cached_info().config.clone();
    change(&mut config);
    foreign_client(nats).await.update_stream(config).await.unwrap();
}

#[tokio::test]
async fn a_stream_with_its_maximum_number_of_messages_is_full() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    queue.publish(call("a")).await;
    change_calls(&nats, |config| config.max_messages = 1).await;
    assert_eq!(queue.inner.publish(call("b"), None).await, Err(Error::Full));
    // A retry replaces the message of the call, so it needs no space.
    queue.settle(queue.receive().await, retry(unix_millis())).await;
    queue.settle(queue.receive().await, succeeded()).await;
    queue.wait_until_empty().await;
    queue.publish(call("b")).await;
}

#[tokio::test]
async fn a_stream_with_its_maximum_number_of_bytes_has_no_space() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    queue.publish(call("a")).await;
    change_calls(&nats, |config| config.max_bytes = 1000).await;
    let large = QueuedCall { body: Bytes::from(vec![0; 2000]), ..call("b") };
    assert_eq!(queue.inner.publish(large, None).await, Err(Error::NoSpace));
}

#[tokio::test]
async fn a_message_above_the_maximum_of_the_stream_is_too_large() {
    let nats = Nats::start();
    let queue = TestQueue::connected(&nats).await;
    change_calls(&nats, |config| config.max_message_size = 1000).await;
    let large = QueuedCall { body: Bytes::from(vec![0; 2000]), ..call("a") };
    assert_eq!(queue.inner.publish(large, None).await, Err(Error::TooLarge(2000)));
    queue.publish(call("b")).await;
}

#[tokio::test]
async fn an_account_without_storage_has_no_space() {
    let directory = tempfile::TempDir::new().unwrap();
    let path = directory.path().join("nats.conf");
    let limits = "jetstream: { max_file: 5000, max_mem: 5000 }";
    let account = format!("{{ {limits}, users: [ {{ user: a, password: p }} ] }}");
    std::fs::write(&path, format!("accounts: {{ A: {account} }}")).unwrap();
    let nats = Nats::start_with(&["-c", path.to_str().unwrap()]);
    let auth = Auth::Password { user: "a".to_owned(), password: "p".to_owned() };
    let queue = TestQueue::open(Options { auth, ..options(&nats) }).await;
    eventually("the server responds", async || queue.inner.status("x").await.is_ok()).await;
    queue.publish(call("a")).await;
    let mut refused = None;
    for id in ["b", "c", "d", "e"] {
        let large = QueuedCall { body: Bytes::from(vec![0; 2000]), ..call(id) };
        refused = queue.inner.publish(large, None).await.err();
        if refused.is_some() {
            break;
        }
    }
    assert_eq!(refused, Some(Error::NoSpace));
}
