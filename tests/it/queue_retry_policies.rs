//! Retry policies of functions hold while the provider cannot be queried.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use gateway_base::base_url::BaseUrl;
use gateway_base::function::Function;
use gateway_http::client::{Client, Origin, Tls};
use gateway_proxy::functions::policy::retry::RetryPolicy;
use gateway_queue::call::{CallOptions, QueuedCall};
use gateway_worker::retry_policies::{QueryTiming, RetryPolicies};
use http::HeaderMap;

use crate::support::provider::{self, Provider};
use crate::support::queue::{fast_retry, function_status, with_embedded_queue};
use crate::support::within;

/// A provider whose functions allow a single attempt.
fn single_attempt_provider() -> provider::Builder {
    Provider::builder().api(|head, _| {
        let (status, text) = function_status(head)?;
        Some((status, text.replace("\"3\"", "\"1\"")))
    })
}

#[tokio::test]
async fn a_single_attempt_policy_holds_when_the_provider_dies() {
    let (state, mut provider) = (tempfile::tempdir().unwrap(), single_attempt_provider().start());
    let gateway = with_embedded_queue(&provider, state.path());
    let gateway = gateway.var("log_level", "info,gateway_worker=debug").start().await;
    let id = gateway.enqueue("echo", &[], "").await;
    let mut call = provider.next_call().await;
    call.read_body().await.unwrap();
    gateway.wait_for_log("The retry policy of a function was fetched").await;
    drop((call, provider));
    let call_status = gateway.wait_for_state(&id, "failed").await;
    assert_eq!(
        (&call_status["attempts"], &call_status["dead"]),
        (&1.into(), &true.into()),
        "{call_status}"
    );
}

#[tokio::test]
async fn the_retry_policy_is_queried_before_a_retry() {
    let (state, provider) = (tempfile::tempdir().unwrap(), Provider::manual());
    let (address, builder) = (provider.address, with_embedded_queue(&provider, state.path()));
    drop(provider);
    let gateway = builder.start().await;
    let id = gateway.enqueue("echo", &[], "").await;
    gateway.wait_for_log("The retry policy of a queued call is not known yet").await;
    let provider = single_attempt_provider().listen_on(address).start();
    let call_status = gateway.wait_for_state(&id, "failed").await;
    assert_eq!(
        (&call_status["attempts"], &call_status["dead"]),
        (&1.into(), &true.into()),
        "{call_status}"
    );
    assert_eq!(provider.call_count(), 0);
}

const SHORT_TIMING: QueryTiming = QueryTiming {
    timeout: Duration::from_secs(10),
    retry_interval: Duration::from_millis(10),
    give_up_after: Duration::from_millis(300),
};

fn retry_policies(url: &str, timing: QueryTiming) -> RetryPolicies {
    let url = BaseUrl::parse(url).unwrap();
    let client =
        Client::new(gateway_http::client::PoolLimits { total: 10, per_host: 10 }, Tls::default());
    let provider = gateway_provider::Provider {
        client,
        origin: Origin::new(url),
        credentials: None,
        timeout: Duration::from_secs(60),
    };
    RetryPolicies::with_timing(Arc::default(), provider, timing)
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
async fn the_last_known_policy_holds_while_the_provider_is_unavailable() {
    let provider = fast_retry().start();
    let retry_policies = retry_policies(&provider.url(), SHORT_TIMING);
    let known = retry_policies.get(&call()).await;
    assert_eq!(known.attempts, 3);
    drop(provider);
    for _ in 0..3 {
        assert_eq!(retry_policies.get(&call()).await, known);
    }
}

#[tokio::test]
async fn the_wait_for_a_first_policy_is_limited() {
    let provider = Provider::manual();
    let retry_policies = retry_policies(&provider.url(), SHORT_TIMING);
    drop(provider);
    let began = Instant::now();
    let policy = within("a retry policy", retry_policies.get(&call())).await;
    assert_eq!(policy, RetryPolicy::default());
    assert!(began.elapsed() >= SHORT_TIMING.give_up_after, "{:?}", began.elapsed());
}

#[tokio::test]
async fn an_unresponsive_provider_does_not_delay_retries() {
    // Connections to it are established, and never accepted.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let timing = QueryTiming { timeout: Duration::from_millis(50), ..SHORT_TIMING };
    let retry_policies =
        retry_policies(&format!("http://{}", silent.local_addr().unwrap()), timing);
    assert_eq!(within("a retry policy", retry_policies.get(&call())).await, RetryPolicy::default());
}

#[tokio::test]
async fn a_function_has_one_policy_query_at_a_time() {
    let provider = fast_retry().start();
    let retry_policies = retry_policies(&provider.url(), SHORT_TIMING);
    let call = call();
    let heard = futures_util::future::join_all((0..50).map(|_| retry_policies.get(&call))).await;
    assert!(heard.iter().all(|policy| policy.attempts == 3));
    assert_eq!(provider.api_requests().len(), 1);
}
