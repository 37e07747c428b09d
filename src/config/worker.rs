//! Settings of `gateway worker`.

use std::path::PathBuf;
use std::time::Duration;

use crate::config::listen::ListenHost;
use crate::config::reader::{ConfigError, SettingsReader};
use crate::config::{
    Backend, Nats, Queue, credentials_dir, metrics_hosts, placeholder_url, pool_limits, scaling,
    telemetry,
};
use gateway_base::base_url::BaseUrl;
use gateway_http::client::PoolLimits;
use gateway_http::server::listener::ListenAddress;
use gateway_proxy::activator::ColdStart;
use gateway_proxy::trace::TracingConfig;

/// Settings of `gateway worker`.
#[derive(Clone, Debug)]
pub struct Worker {
    /// `listen_address`, `worker_metrics_port`
    pub metrics: ListenAddress,
    /// `metrics_hosts`
    pub metrics_hosts: Vec<String>,
    /// Where functions are called and queried.
    pub target: WorkerTarget,
    /// `faas_gateway_address`, `faas_gateway_port`, also if functions are called elsewhere: callbacks must not reach
    /// it.
    pub gateway: BaseUrl,
    /// `function_namespace`
    pub namespace: String,
    /// `upstream_timeout`
    pub upstream_timeout: Duration,
    /// `connect_timeout`
    pub connect_timeout: Duration,
    /// `scale_from_zero`
    pub cold_start: Option<ColdStart>,
    pub pool: PoolLimits,
    /// Directory of the credential files, with `basic_auth`; `None`: no credentials.
    pub credentials_dir: Option<PathBuf>,
    pub queue: Queue,
    pub tracing: TracingConfig,
    /// `faas_print_body`
    pub log_bodies: bool,
    /// `write_debug`
    pub log_calls: bool,
    /// `shutdown_grace`
    pub shutdown_grace: Duration,
}

/// Where a worker calls functions.
#[derive(Clone, Debug)]
pub enum WorkerTarget {
    /// `functions_provider_url`
    Provider(BaseUrl),
    /// `faas_gateway_address`, `faas_gateway_port`: the gateway counts the calls.
    Gateway(BaseUrl),
}

impl Worker {
    /// Parses the settings of `gateway worker`.
    ///
    /// # Errors
    /// All invalid settings, for the user.
    pub fn parse(mut settings: SettingsReader<'_>) -> Result<Self, Vec<ConfigError>> {
        let host = ListenHost::parse(&mut settings, "listen_address");
        let provider = settings.url("functions_provider_url");
        let port = settings.port("faas_gateway_port");
        let gateway =
            settings.parsed("faas_gateway_address", "a host name or IP address", |host| {
                BaseUrl::of_host(host, port)
            });
        let nats = Nats::parse(&mut settings);
        let has_no_servers = nats.servers.is_empty();
        let queue = Queue::parse(&mut settings, Backend::None, "", nats);
        match queue.backend {
            Backend::Embedded => settings.add_error(
                "queue",
                Some("embedded".to_owned()),
                "jetstream or stan, which several processes can share; a file belongs to one process (see with_worker)",
            ),
            Backend::None if has_no_servers => settings.add_error(
                "faas_nats_address",
                None,
                "the address of NATS, from which this worker receives calls",
            ),
            Backend::None => settings.add_error(
                "queue",
                Some("none".to_owned()),
                "a queue from which a worker can receive calls",
            ),
            Backend::JetStream | Backend::Stan | Backend::Nats => {}
        }
        let gateway = gateway.unwrap_or_else(placeholder_url);
        let worker = Self {
            metrics: host.with_port(&mut settings, "worker_metrics_port"),
            metrics_hosts: metrics_hosts(&settings),
            target: match provider {
                Some(provider) => WorkerTarget::Provider(provider),
                None => WorkerTarget::Gateway(gateway.clone()),
            },
            gateway,
            namespace: settings.text("function_namespace"),
            upstream_timeout: settings.positive_duration("upstream_timeout"),
            connect_timeout: settings.positive_duration("connect_timeout"),
            cold_start: scaling::parse_if_enabled(&mut settings),
            pool: pool_limits(&mut settings),
            credentials_dir: credentials_dir(&mut settings),
            queue: Queue { with_worker: true, ..queue },
            tracing: telemetry::tracing(&mut settings),
            log_bodies: settings.boolean("faas_print_body"),
            log_calls: settings.boolean("write_debug"),
            shutdown_grace: settings.duration("shutdown_grace"),
        };
        settings.finish(worker)
    }
}
