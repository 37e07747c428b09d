//! State of the API's handlers.

use std::sync::Arc;

use http::Uri;
use tokio::sync::Semaphore;

use gateway_autoscaler::alerts::AlertFilter;
use gateway_base::base_url::BaseUrl;
use gateway_base::build_info::BuildInfo;
use gateway_http::allowed_hosts::AllowedHosts;
use gateway_http::client::{Client, Origin};
use gateway_http::credentials::Credentials;
use gateway_http::server::Timeouts;
use gateway_provider::Provider;
use gateway_proxy::metrics::Metrics;
use gateway_proxy::metrics::query::InvocationCounts;
use gateway_proxy::readiness::Readiness;
use gateway_queue::ingress::QueueIngress;

/// State of the API's handlers. One per proxy thread.
pub struct ApiState {
    pub client: Arc<Client>,
    pub provider: Provider,
    pub logs: Origin,
    pub credentials: Option<Arc<Credentials>>,
    pub auth_proxy: Option<AuthProxy>,
    /// Host names under which the API may be called.
    pub allowed_hosts: AllowedHosts,
    pub timeouts: Timeouts,
    pub default_namespace: Arc<str>,
    pub build: BuildInfo,
    pub metrics: Arc<Metrics>,
    pub readiness: Arc<Readiness>,
    pub invocation_counts: Arc<InvocationCounts>,
    /// Alerts to ignore, if the autoscaler is enabled.
    pub alert_filter: Option<Arc<AlertFilter>>,
    /// Enqueues calls, if there is a queue.
    pub queue_ingress: Option<Arc<QueueIngress>>,
    /// One permit per request body buffered for a retry: [`MAX_REPLAY_BODIES`](crate::system::MAX_REPLAY_BODIES) for all threads.
    pub replay_permits: Arc<Semaphore>,
}

/// The setting `auth_proxy_url`, and whether request bodies are sent to it.
#[derive(Clone)]
pub struct AuthProxy {
    /// The URL without the path.
    pub origin: Origin,
    /// The path, which is requested unchanged.
    pub target: Uri,
    pub pass_body: bool,
}

impl AuthProxy {
    /// Splits `url` into origin and path.
    pub fn new(mut url: BaseUrl, pass_body: bool) -> Self {
        let target = std::mem::take(&mut url.path).parse().unwrap_or_default();
        Self { origin: Origin::new(url), target, pass_body }
    }
}
