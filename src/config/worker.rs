//! Settings of `gateway worker`.

use std::path::PathBuf;
use std::time::Duration;

use crate::config::base_url::BaseUrl;
use crate::config::listen::{Host, Listen};
use crate::config::reader::{Mistake, Reader};
use crate::config::{
    Backend, ColdStart, Idle, Nats, Queue, Traces, credentials_dir, metrics_hosts, placeholder_url,
};

/// Settings of `gateway worker`.
#[derive(Clone, Debug)]
pub struct Worker {
    /// `listen_address`, `worker_metrics_port`
    pub metrics: Listen,
    /// `metrics_hosts`
    pub metrics_hosts: Vec<String>,
    /// Where functions are called and queried.
    pub target: Target,
    /// `faas_gateway_address`, `faas_gateway_port`, also if functions are called elsewhere: callbacks must not reach it.
    pub gateway: BaseUrl,
    /// `function_namespace`
    pub namespace: String,
    /// `upstream_timeout`
    pub timeout: Duration,
    /// `connect_timeout`
    pub connect: Duration,
    /// `scale_from_zero`
    pub cold_start: Option<ColdStart>,
    pub idle: Idle,
    /// `basic_auth`: the directory that holds the credentials' files.
    pub secrets: Option<PathBuf>,
    pub queue: Queue,
    pub traces: Traces,
    /// `faas_print_body`
    pub print_bodies: bool,
    /// `write_debug`
    pub print_calls: bool,
    /// `shutdown_grace`
    pub grace: Duration,
}

/// Where a worker calls functions.
#[derive(Clone, Debug)]
pub enum Target {
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
    pub fn parse(mut settings: Reader<'_>) -> Result<Self, Vec<Mistake>> {
        let host = Host::read(&mut settings, "listen_address");
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
            Backend::Embedded => settings.mistake(
                "queue",
                Some("embedded".to_owned()),
                "a queue that several processes can share, which is one on NATS; a file belongs to one process (see with_worker)",
            ),
            Backend::None if has_no_servers => settings.mistake(
                "faas_nats_address",
                None,
                "the address of NATS, from which this worker receives calls",
            ),
            Backend::None => settings.mistake("queue", Some("none".to_owned()), "a queue from which a worker can receive calls"),
            Backend::JetStream | Backend::Stan | Backend::Nats => {}
        }
        let gateway = gateway.unwrap_or_else(placeholder_url);
        let worker = Self {
            metrics: host.port(&mut settings, "worker_metrics_port"),
            metrics_hosts: metrics_hosts(&settings),
            target: match provider {
                Some(provider) => Target::Provider(provider),
                None => Target::Gateway(gateway.clone()),
            },
            gateway,
            namespace: settings.text("function_namespace"),
            timeout: settings.positive_duration("upstream_timeout"),
            connect: settings.positive_duration("connect_timeout"),
            cold_start: ColdStart::if_asked_for(&mut settings),
            idle: Idle::parse(&mut settings),
            secrets: credentials_dir(&mut settings),
            queue: Queue { with_worker: true, ..queue },
            traces: Traces::parse(&mut settings),
            print_bodies: settings.boolean("faas_print_body"),
            print_calls: settings.boolean("write_debug"),
            grace: settings.duration("shutdown_grace"),
        };
        settings.finish(worker)
    }
}
