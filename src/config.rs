//! All settings, parsed once into types. No other module parses a duration or URL of a setting. No I/O: the environment
//! is passed as a function, so that tests can pass a table.

pub mod autoscale;
pub mod cli;
mod help;
mod ignored;
pub mod listen;
pub mod nats;
pub mod reader;
mod scaling;
pub mod settings;
mod telemetry;
#[cfg(test)]
mod tests;
pub mod typos;
pub mod worker;

use std::path::PathBuf;
use std::time::Duration;

use crate::config::autoscale::Autoscale;
use crate::config::listen::ListenHost;
pub use crate::config::nats::Nats;
use crate::config::reader::{ConfigError, SettingsReader};
pub use crate::config::telemetry::LogConfig;
pub use crate::config::worker::{Worker, WorkerTarget};
use gateway_base::base_url::BaseUrl;
use gateway_http::client::PoolLimits;
use gateway_http::server::Timeouts;
use gateway_http::server::listener::ListenAddress;
use gateway_provider::process;
use gateway_proxy::activator::ColdStart;
use gateway_proxy::trace::{AccessLogMode, TracingConfig};
use gateway_queue::MAX_ASYNC_BODY_BYTES;
use gateway_worker::callback::allowlist::CallbackAllowlist;

/// Settings of `gateway serve`.
#[derive(Clone, Debug)]
pub struct Serve {
    /// `listen_address`, `port`: the port for clients.
    pub listen: ListenAddress,
    /// `listen_address`, `metrics_port`.
    pub metrics: ListenAddress,
    /// `metrics_hosts`
    pub metrics_hosts: Vec<String>,
    /// `threads`: number of proxy threads; 0: one per core.
    pub threads: usize,
    /// `tcp_congestion_control` of client connections; `None`: the system's default.
    pub congestion_control: Option<String>,
    /// `functions_provider_url`
    pub provider: BaseUrl,
    /// `logs_provider_url`
    pub logs_provider: BaseUrl,
    /// `function_namespace`
    pub namespace: String,
    /// `direct_functions_suffix`; `None`: functions are called through the provider.
    pub direct_functions: Option<String>,
    /// `scale_from_zero`; `None`: calls do not wait for functions that are not ready.
    pub cold_start: Option<ColdStart>,
    /// `autoscale`
    pub autoscale: Option<Autoscale>,
    /// `faas_prometheus_host`, `faas_prometheus_port`; `None`: counts come from this process's metrics.
    pub prometheus: Option<BaseUrl>,
    pub timeouts: Timeouts,
    /// `connect_timeout`: maximum time for connecting to one address of a provider or function.
    pub connect_timeout: Duration,
    pub limits: Limits,
    pub auth: Auth,
    pub queue: Queue,
    pub tracing: TracingConfig,
    /// `access_log`
    pub access_log: AccessLogMode,
    /// The API accepts only host names of this machine.
    pub local_only: bool,
    pub shutdown: Shutdown,
}

/// Limits of this process.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub pool: PoolLimits,
    /// `max_calls`
    pub calls: usize,
    /// `max_connections`
    pub connections: usize,
    /// `max_head_memory`
    pub head_memory: usize,
}

/// Access control of the API.
#[derive(Clone, Debug)]
pub struct Auth {
    /// Directory of the credential files, with `basic_auth`; `None`: no credentials.
    pub credentials_dir: Option<PathBuf>,
    /// `auth_proxy_url`
    pub proxy_url: Option<BaseUrl>,
    /// `auth_proxy_pass_body`
    pub proxy_pass_body: bool,
}

/// Settings of queued calls.
#[derive(Clone, Debug)]
pub struct Queue {
    /// `queue`
    pub backend: Backend,
    pub nats: Nats,
    /// `with_worker`
    pub with_worker: bool,
    /// `state_dir`
    pub state_dir: PathBuf,
    /// `max_inflight`
    pub max_inflight: usize,
    /// `max_async_body_bytes`
    pub max_body_bytes: usize,
    /// `max_pending_calls`
    pub max_pending_calls: usize,
    /// `result_ttl`
    pub result_ttl: Duration,
    /// `max_result_body_bytes`
    pub max_result_body_bytes: usize,
    /// `callback_allowlist`
    pub callback_allowlist: CallbackAllowlist,
    /// `secret_mount_path`: directory of the secrets that sign callbacks.
    pub secrets_dir: PathBuf,
}

/// Kind of queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    None,
    Embedded,
    JetStream,
    /// NATS Streaming.
    Stan,
    /// JetStream or NATS Streaming, by discovery.
    Nats,
}

/// Shutdown of the process.
#[derive(Clone, Copy, Debug)]
pub struct Shutdown {
    /// `shutdown_delay`
    pub delay: Duration,
    /// `shutdown_grace`
    pub grace: Duration,
}

/// Settings of `gateway provider process`.
#[derive(Clone, Debug)]
pub struct Provider {
    /// `provider_address`, `provider_port`
    pub listen: ListenAddress,
    /// `state_dir`, and the environment variables that functions inherit.
    pub process: process::Config,
    /// Directory of the credential files, with `basic_auth`; `None`: no credentials.
    pub credentials_dir: Option<PathBuf>,
    /// `shutdown_grace`
    pub shutdown_grace: Duration,
}

/// Settings of `gateway up`.
#[derive(Clone, Debug)]
pub struct Up {
    pub serve: Serve,
    pub provider: Provider,
    /// Stack file to deploy.
    pub stack: Option<PathBuf>,
    /// Warnings about settings that have no effect on this role.
    pub warnings: Vec<String>,
}

/// Variables of this process that functions inherit.
const INHERITED_VARIABLES: [&str; 5] = ["PATH", "HOME", "LANG", "TZ", "TMPDIR"];

impl Serve {
    /// Parses the settings of `gateway serve`.
    ///
    /// # Errors
    /// All invalid settings, for the user.
    pub fn parse(mut settings: SettingsReader<'_>) -> Result<Self, Vec<ConfigError>> {
        let provider = settings.url("functions_provider_url");
        if provider.is_none() && settings.text("functions_provider_url").is_empty() {
            settings.add_error("functions_provider_url", None, gateway_base::base_url::EXPECTED);
        }
        let host = ListenHost::parse(&mut settings, "listen_address");
        let prometheus = prometheus(&mut settings);
        let direct = settings.boolean("direct_functions");
        let direct_functions = direct.then(|| settings.text("direct_functions_suffix"));
        let provider = provider.unwrap_or_else(placeholder_url);
        let nats = Nats::parse(&mut settings);
        let queue = Queue::parse(&mut settings, Backend::None, "", nats);
        let mut serve = Self::parse_common(&mut settings, host, provider, queue);
        serve.logs_provider = settings.url("logs_provider_url").unwrap_or(serve.logs_provider);
        serve.prometheus = prometheus;
        serve.direct_functions = direct_functions;
        serve.cold_start = scaling::parse_if_enabled(&mut settings);
        serve.autoscale = Autoscale::parse(&mut settings, false);
        settings.finish(serve)
    }

    /// Parses the settings that `serve` and `up` share.
    fn parse_common(
        settings: &mut SettingsReader<'_>,
        host: ListenHost,
        provider: BaseUrl,
        queue: Queue,
    ) -> Self {
        Self {
            listen: host.with_port(settings, "port"),
            metrics: host.with_port(settings, "metrics_port"),
            metrics_hosts: metrics_hosts(settings),
            threads: settings.count("threads", 0..=1024),
            congestion_control: Some(settings.text("tcp_congestion_control"))
                .filter(|name| !name.is_empty()),
            logs_provider: provider.clone(),
            provider,
            namespace: settings.text("function_namespace"),
            direct_functions: None,
            cold_start: None,
            autoscale: None,
            prometheus: None,
            timeouts: Timeouts {
                read: settings.positive_duration("read_timeout"),
                write: settings.positive_duration("write_timeout"),
                upstream: settings.positive_duration("upstream_timeout"),
                idle: settings.positive_duration("idle_timeout"),
            },
            connect_timeout: settings.positive_duration("connect_timeout"),
            limits: Limits {
                pool: pool_limits(settings),
                calls: settings.count("max_calls", 1..=10_000_000),
                connections: settings.count("max_connections", 1..=10_000_000),
                head_memory: settings.count("max_head_memory", 1 << 20..=1 << 30),
            },
            auth: Auth {
                credentials_dir: credentials_dir(settings),
                proxy_url: settings.url("auth_proxy_url"),
                proxy_pass_body: settings.boolean("auth_proxy_pass_body"),
            },
            queue,
            tracing: telemetry::tracing(settings),
            access_log: telemetry::access_log(settings),
            local_only: false,
            shutdown: Shutdown {
                delay: settings.duration("shutdown_delay"),
                grace: settings.duration("shutdown_grace"),
            },
        }
    }
}

fn pool_limits(settings: &mut SettingsReader<'_>) -> PoolLimits {
    PoolLimits {
        total: settings.count("max_idle_conns", 0..=1_000_000),
        per_host: settings.count("max_idle_conns_per_host", 0..=1_000_000),
    }
}

impl Queue {
    /// Parses settings of the queue. `auto` is the kind of queue for `queue=auto`, `callbacks` the list for
    /// `callback_allowlist=auto`.
    fn parse(
        settings: &mut SettingsReader<'_>,
        auto: Backend,
        callbacks: &str,
        nats: Nats,
    ) -> Self {
        let auto = if nats.servers.is_empty() { auto } else { Backend::Nats };
        let expected = "auto, embedded, jetstream, stan or none";
        let backend = settings.parsed("queue", expected, |text| match text {
            "auto" => Some(auto),
            "embedded" => Some(Backend::Embedded),
            "jetstream" => Some(Backend::JetStream),
            "stan" => Some(Backend::Stan),
            "none" => Some(Backend::None),
            _ => None,
        });
        let backend = backend.unwrap_or(auto);
        if matches!(backend, Backend::JetStream | Backend::Stan) && nats.servers.is_empty() {
            settings.add_error(
                "faas_nats_address",
                None,
                "the address of NATS, for queue=jetstream and queue=stan",
            );
        }
        let with_worker =
            settings.parsed("with_worker", "auto, true or false", |text| match text {
                "auto" => Some(backend != Backend::None),
                "true" | "1" => Some(true),
                "false" | "0" => Some(false),
                _ => None,
            });
        Self {
            backend,
            nats,
            with_worker: with_worker.unwrap_or_default() && backend != Backend::None,
            state_dir: PathBuf::from(settings.text("state_dir")),
            max_inflight: settings.count("max_inflight", 1..=10_000),
            max_body_bytes: settings.count("max_async_body_bytes", 0..=MAX_ASYNC_BODY_BYTES),
            max_pending_calls: settings.count("max_pending_calls", 1..=1_000_000_000),
            result_ttl: settings.duration("result_ttl"),
            max_result_body_bytes: settings.count("max_result_body_bytes", 0..=(1 << 30)),
            callback_allowlist: settings
                .parsed(
                    "callback_allowlist",
                    gateway_worker::callback::allowlist::EXPECTED,
                    |text| match text {
                        "auto" => CallbackAllowlist::parse(callbacks),
                        text => CallbackAllowlist::parse(text),
                    },
                )
                .unwrap_or_default(),
            secrets_dir: PathBuf::from(settings.text("secret_mount_path")),
        }
    }
}

impl Provider {
    /// Parses the settings of `gateway provider process`.
    ///
    /// # Errors
    /// All invalid settings, for the user.
    pub fn parse(mut settings: SettingsReader<'_>) -> Result<Self, Vec<ConfigError>> {
        let host = ListenHost::parse(&mut settings, "provider_address");
        let provider = Self::parse_common(&mut settings, host);
        let address = provider.listen.address.ip();
        if !address.is_loopback() && provider.credentials_dir.is_none() {
            settings.add_error(
                "provider_address",
                Some(address.to_string()),
                "a loopback address, while basic_auth is false: a client of the provider can run commands as its \
                 user",
            );
        }
        settings.finish(provider)
    }

    fn parse_common(settings: &mut SettingsReader<'_>, host: ListenHost) -> Self {
        Self {
            listen: host.with_port(settings, "provider_port"),
            process: process::Config {
                state_dir: PathBuf::from(settings.text("state_dir")),
                environment: INHERITED_VARIABLES
                    .iter()
                    .filter_map(|name| {
                        Some(((*name).to_owned(), settings.environment_variable(name)?))
                    })
                    .collect(),
            },
            credentials_dir: credentials_dir(settings),
            shutdown_grace: settings.duration("shutdown_grace"),
        }
    }
}

impl Up {
    /// Parses the settings of `gateway up`. It listens on loopback only, since nothing in front of it keeps untrusted
    /// clients out.
    ///
    /// # Errors
    /// All invalid settings, for the user.
    pub fn parse(
        mut settings: SettingsReader<'_>,
        stack: Option<PathBuf>,
    ) -> Result<Self, Vec<ConfigError>> {
        let provider = Provider::parse_common(&mut settings, ListenHost::LOOPBACK);
        let queue = Queue::parse(&mut settings, Backend::Embedded, "loopback", Nats::default());
        let mut serve =
            Serve::parse_common(&mut settings, ListenHost::LOOPBACK, placeholder_url(), queue);
        serve.cold_start = Some(scaling::parse(&mut settings));
        serve.autoscale = Autoscale::parse(&mut settings, true);
        serve.local_only = serve.auth.credentials_dir.is_none() && serve.auth.proxy_url.is_none();
        let warnings = ignored::warnings(&settings);
        settings.finish(Self { serve, provider, stack, warnings })
    }
}

/// Additional host names under which the metrics port answers.
fn metrics_hosts(settings: &SettingsReader<'_>) -> Vec<String> {
    let hosts = settings.text("metrics_hosts");
    hosts.split(',').map(str::trim).filter(|host| !host.is_empty()).map(str::to_owned).collect()
}

/// Directory of the credential files, with `basic_auth`.
fn credentials_dir(settings: &mut SettingsReader<'_>) -> Option<PathBuf> {
    settings.boolean("basic_auth").then(|| PathBuf::from(settings.text("secret_mount_path")))
}

fn prometheus(settings: &mut SettingsReader<'_>) -> Option<BaseUrl> {
    let port = settings.port("faas_prometheus_port");
    settings.parsed("faas_prometheus_host", "a host name or IP address", |host| {
        BaseUrl::of_host(host, port)
    })
}

/// Placeholder for a URL that is missing or set later. A missing one is reported as an error.
fn placeholder_url() -> BaseUrl {
    BaseUrl {
        tls: false,
        authority: http::uri::Authority::from_static("127.0.0.1"),
        path: String::new(),
    }
}
