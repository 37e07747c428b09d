//! Options of the connection to NATS and of the queue.
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use async_nats::ConnectOptions;

use crate::embedded::Limits;
use gateway_base::backoff::Backoff;

/// Minimum version of the server.
pub(super) const MIN_VERSION: (i64, i64, i64) = (2, 9, 0);
/// First and maximum delay of a reconnect.
const RECONNECT_BACKOFF: Backoff =
    Backoff::new(Duration::from_millis(50), Duration::from_millis(500));
/// Interval of pings; a server that does not respond to them is considered gone.
const PING_INTERVAL: Duration = Duration::from_secs(10);

/// Options of a queue on a NATS server.
#[derive(Clone, Debug)]
pub struct Options {
    /// `nats://host:port` or `tls://host:port`; any servers of a cluster.
    pub servers: Vec<String>,
    pub auth: Auth,
    /// Requires TLS from the start of the connection.
    pub tls: bool,
    /// PEM file of the trusted authorities; defaults to those of the system.
    pub root_ca: Option<PathBuf>,
    /// Name of this client in the server's monitoring.
    pub name: String,
    /// Name of the queue, part of the names of its streams.
    pub queue: String,
    /// Number of servers in a cluster that store each call.
    pub replicas: usize,
    /// Stores the queue in memory: it is lost when all its servers have stopped.
    pub in_memory: bool,
    /// Ack timeout: a call whose receiver sends no ack for this time is redelivered.
    pub lease: Duration,
    pub limits: Limits,
}

/// Credentials for the server.
#[derive(Clone, Default)]
pub enum Auth {
    #[default]
    Anonymous,
    Password {
        user: String,
        password: String,
    },
    Token(String),
    /// File with the seed of an nkey.
    NkeySeed(PathBuf),
    /// File with a JWT and its seed, as written by `nsc`.
    Credentials(PathBuf),
}

impl std::fmt::Debug for Auth {
    /// Omits the secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Anonymous => "Nobody",
            Self::Password { .. } => "Password",
            Self::Token(_) => "Token",
            Self::NkeySeed(_) => "NkeySeed",
            Self::Credentials(_) => "Credentials",
        })
    }
}

impl Options {
    /// Returns connect options that reconnect without limit, and do not wait for the first connection.
    ///
    /// # Errors
    /// When a file cannot be read or has invalid content. The caller should report a configuration error.
    pub async fn connect_options(&self) -> anyhow::Result<ConnectOptions> {
        let options = ConnectOptions::new();
        let options = match &self.auth {
            Auth::Anonymous => options,
            Auth::Password { user, password } => {
                options.user_and_password(user.clone(), password.clone())
            }
            Auth::Token(token) => options.token(token.clone()),
            Auth::NkeySeed(file) => {
                let seed = tokio::fs::read_to_string(file).await;
                let seed = seed.with_context(|| format!("cannot read {}", file.display()))?;
                options.nkey(seed.trim().to_owned())
            }
            Auth::Credentials(file) => options
                .credentials_file(file)
                .await
                .with_context(|| format!("cannot read {}", file.display()))?,
        };
        let options = match &self.root_ca {
            Some(file) => {
                // The file is read at each connection; this reports a missing file at startup.
                let read = tokio::fs::read(file).await;
                read.with_context(|| format!("cannot read {}", file.display()))?;
                options.add_root_certificates(file.clone())
            }
            None => options,
        };
        Ok(options
            .name(&self.name)
            .require_tls(self.tls)
            .ping_interval(PING_INTERVAL)
            .connection_timeout(Duration::from_secs(2))
            .retry_on_initial_connect()
            .max_reconnects(None)
            .reconnect_delay_callback(|attempts| {
                RECONNECT_BACKOFF.after(u32::try_from(attempts).unwrap_or(u32::MAX))
            }))
    }
}
