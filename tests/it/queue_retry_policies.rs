//! How a function wants to be retried is heeded when its provider cannot be asked, too.

use std::time::{Duration, Instant};

use bytes::Bytes;
use gateway::config::base_url::BaseUrl;
use gateway::function::Function;
use gateway::proxy::client::{Client, Origin, Tls};
use gateway::queue::call::{CallOptions, QueuedCall};
use gateway::worker::retry::RetryPolicy;
use gateway::worker::retry_policies::{CacheTiming, RetryPolicyCache};
use http::HeaderMap;

use crate::support::provider::{self, Provider};
use crate::support::queue::{function, patient, queueing};
use crate::support::within;

/// A provider whose functions must not be called twice.
fn once() -> provider::Builder {
    Provider::builder().api(|head, _| {
        let (status, text) = function(head)?;
        Some((status, text.replace("\"3\"", "\"1\"")))
    })
}

#[tokio::test]
async fn a_function_that_must_not_be_called_twice_is_not_though_its_provider_dies_meanwhile() {
    let (state, mut provider) = (tempfile::tempdir().unwrap(), once().start());
    let gateway = queueing(&provider, state.path());
    let gateway = gateway.var("log_level", "info,gateway::worker=debug").start().await;
    let id = gateway.queued("echo", &[], "").await;
    let mut call = provider.call().await;
    call.body().await.unwrap();
    gateway.logs("The retry policy of a function was fetched").await;
    drop((call, provider));
    let told = gateway.becomes(&id, "failed").await;
    assert_eq!((&told["attempts"], &told["dead"]), (&1.into(), &true.into()), "{told}");
}

#[tokio::test]
async fn a_provider_that_comes_back_is_asked_before_a_call_is_made_again() {
    let (state, provider) = (tempfile::tempdir().unwrap(), Provider::by_hand());
    let (address, away) = (provider.address, queueing(&provider, state.path()));
    drop(provider);
    let gateway = away.start().await;
    let id = gateway.queued("echo", &[], "").await;
    gateway.logs("The retry policy of a queued call is not known yet").await;
    let provider = once().at(address).start();
    let told = gateway.becomes(&id, "failed").await;
    assert_eq!((&told["attempts"], &told["dead"]), (&1.into(), &true.into()), "{told}");
    assert_eq!(provider.calls(), 0);
}

const QUICK: CacheTiming = CacheTiming {
    ttl: Duration::ZERO,
    query_timeout: Duration::from_secs(10),
    retry_interval: Duration::from_millis(10),
    give_up_after: Duration::from_millis(300),
};

fn retry_policies(url: &str, timing: CacheTiming) -> RetryPolicyCache {
    let url = BaseUrl::parse(url).unwrap();
    let client =
        Client::new(gateway::config::PoolLimits { total: 10, per_host: 10 }, Tls::default());
    let provider = gateway::provider::Provider {
        client,
        origin: Origin::new(url),
        credentials: None,
        timeout: Duration::from_secs(60),
    };
    RetryPolicyCache::with_timing(provider, timing)
}

fn call() -> QueuedCall {
    QueuedCall {
        id: "id".to_owned(),
        function: Function { name: "echo".to_owned(), namespace: "fn".to_owned() },
        target: String::new(),
        headers: HeaderMap::new(),
        body: Bytes::new(),
        options: CallOptions::default(),
    }
}

#[tokio::test]
async fn what_was_heard_last_holds_while_the_provider_is_away() {
    let provider = patient().start();
    let retry_policies = retry_policies(&provider.url(), QUICK);
    let known = retry_policies.get(&call()).await;
    assert_eq!(known.attempts, 3);
    drop(provider);
    for _ in 0..3 {
        assert_eq!(retry_policies.get(&call()).await, known);
    }
}

#[tokio::test]
async fn a_provider_that_never_said_anything_is_waited_for_no_longer_than_that() {
    let provider = Provider::by_hand();
    let retry_policies = retry_policies(&provider.url(), QUICK);
    drop(provider);
    let began = Instant::now();
    let policy = within("a policy", retry_policies.get(&call())).await;
    assert_eq!(policy, RetryPolicy::default());
    assert!(began.elapsed() >= QUICK.give_up_after, "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_provider_that_does_not_answer_is_not_waited_for_either() {
    // Connections to it are made, and never accepted.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let timing = CacheTiming { query_timeout: Duration::from_millis(50), ..QUICK };
    let retry_policies =
        retry_policies(&format!("http://{}", silent.local_addr().unwrap()), timing);
    assert_eq!(within("a policy", retry_policies.get(&call())).await, RetryPolicy::default());
}

#[tokio::test]
async fn one_question_at_a_time_is_asked_for_a_function() {
    let provider = patient().start();
    let retry_policies =
        retry_policies(&provider.url(), CacheTiming { ttl: Duration::from_secs(60), ..QUICK });
    let call = call();
    let heard = futures_util::future::join_all((0..50).map(|_| retry_policies.get(&call))).await;
    assert!(heard.iter().all(|policy| policy.attempts == 3));
    assert_eq!(provider.asked().len(), 1);
}
