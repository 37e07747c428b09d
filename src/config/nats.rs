//! Address and credentials of NATS. No I/O.

use std::path::PathBuf;
use std::time::Duration;

use crate::config::reader::SettingsReader;

/// Connection to NATS, and names on it.
#[derive(Clone, Default)]
pub struct Nats {
    /// `faas_nats_address`, each with its port.
    pub servers: Vec<String>,
    /// `faas_nats_channel`
    pub queue_name: String,
    /// `nats_user`, `nats_password`
    pub login: Option<(String, String)>,
    /// `nats_token`
    pub token: Option<String>,
    /// `nats_nkey_seed`
    pub nkey_seed_file: Option<PathBuf>,
    /// `nats_creds`
    pub credentials_file: Option<PathBuf>,
    /// `nats_tls`
    pub tls: bool,
    /// `nats_ca`
    pub ca_file: Option<PathBuf>,
    /// `nats_replicas`
    pub replicas: usize,
    /// `nats_storage=memory`: servers store calls in memory instead of on disk.
    pub in_memory: bool,
    /// `ack_wait`
    pub ack_wait: Duration,
    /// `faas_nats_cluster_name`
    pub cluster_id: String,
    /// `faas_nats_queue_group`
    pub queue_group: String,
    /// `faas_reconnect_delay`
    pub reconnect_delay: Duration,
}

impl std::fmt::Debug for Nats {
    /// Omits secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nats").field("servers", &self.servers).finish_non_exhaustive()
    }
}

impl Nats {
    pub(super) fn parse(settings: &mut SettingsReader<'_>) -> Self {
        let text = |name: &str| Some(settings.text(name)).filter(|text| !text.is_empty());
        let (user, token) = (text("nats_user"), text("nats_token"));
        let file = |name: &str| text(name).map(PathBuf::from);
        let (nkey_seed, creds, ca) = (file("nats_nkey_seed"), file("nats_creds"), file("nats_ca"));
        let password = settings.text("nats_password");
        // Only validated: reconnecting has no limit.
        settings.parsed("faas_max_reconnect", "a whole number", |text| {
            (text.is_empty() || text.parse::<i64>().is_ok()).then_some(())
        });
        let in_memory = settings.parsed("nats_storage", "file or memory", |text| match text {
            "file" => Some(false),
            "memory" => Some(true),
            _ => None,
        });
        let port = settings.port("faas_nats_port");
        let address = settings.text("faas_nats_address");
        let hosts = address.split(',').map(str::trim).filter(|host| !host.is_empty());
        // An IPv6 address contains colons; its port follows the bracket.
        let has_port = |host: &str| host.rsplit(']').next().is_some_and(|rest| rest.contains(':'));
        let servers = hosts.map(|host| match has_port(host) {
            true => host.to_owned(),
            false => format!("{host}:{port}"),
        });
        Self {
            servers: servers.collect(),
            queue_name: settings.text("faas_nats_channel"),
            login: user.map(|user| (user, password)),
            token,
            nkey_seed_file: nkey_seed,
            credentials_file: creds,
            tls: settings.boolean("nats_tls"),
            ca_file: ca,
            replicas: settings.count("nats_replicas", 1..=5),
            in_memory: in_memory.unwrap_or_default(),
            ack_wait: settings.positive_duration("ack_wait"),
            cluster_id: settings.text("faas_nats_cluster_name"),
            queue_group: settings.text("faas_nats_queue_group"),
            reconnect_delay: settings.positive_duration("faas_reconnect_delay"),
        }
    }
}
