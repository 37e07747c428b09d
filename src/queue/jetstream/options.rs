//! Where the server is, and how one is let in.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use async_nats::ConnectOptions;

use crate::queue::embedded::Limits;

/// A server with the first version that does all that is asked of it here.
pub(super) const OLDEST: (i64, i64, i64) = (2, 9, 0);
/// How soon after a lost connection the next attempt is, and at the latest.
const AGAIN: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(500));
/// A server that says nothing for so long is gone.
const PING: Duration = Duration::from_secs(10);

/// What is needed to keep a queue on a server.
#[derive(Clone, Debug)]
pub struct Options {
    /// `nats://host:port` or `tls://host:port`; any of a cluster.
    pub servers: Vec<String>,
    pub auth: Auth,
    /// Nothing goes over the connection before TLS does.
    pub tls: bool,
    /// PEM file of the authorities that are trusted; without it those of the system.
    pub root_ca: Option<PathBuf>,
    /// What the server's operator sees this client as.
    pub name: String,
    /// The queue's name, part of the names of its streams.
    pub queue: String,
    /// How many servers of a cluster keep each call.
    pub replicas: usize,
    /// They keep it in memory: it is gone when all of them have ended.
    pub in_memory: bool,
    /// A call whose taker has not been heard of for so long is taken again.
    pub lease: Duration,
    pub limits: Limits,
}

/// Who one is to the server.
#[derive(Clone, Default)]
pub enum Auth {
    #[default]
    Nobody,
    Password {
        user: String,
        password: String,
    },
    Token(String),
    /// A file with the seed of an nkey.
    NkeySeed(PathBuf),
    /// A file with a JWT and the seed to it, as `nsc` writes it.
    Credentials(PathBuf),
}

impl std::fmt::Debug for Auth {
    /// Without the secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Nobody => "Nobody",
            Self::Password { .. } => "Password",
            Self::Token(_) => "Token",
            Self::NkeySeed(_) => "NkeySeed",
            Self::Credentials(_) => "Credentials",
        })
    }
}

impl Options {
    /// How to connect: for ever anew, and without waiting for the first time.
    ///
    /// # Errors
    /// When a file cannot be read or is not what it should be.
    pub async fn connect_options(&self) -> anyhow::Result<ConnectOptions> {
        let options = ConnectOptions::new();
        let options = match &self.auth {
            Auth::Nobody => options,
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
                // It is read at each connection; that it is missing is said now.
                let read = tokio::fs::read(file).await;
                read.with_context(|| format!("cannot read {}", file.display()))?;
                options.add_root_certificates(file.clone())
            }
            None => options,
        };
        let (first, last) = AGAIN;
        Ok(options
            .name(&self.name)
            .require_tls(self.tls)
            .ping_interval(PING)
            .connection_timeout(Duration::from_secs(2))
            .retry_on_initial_connect()
            .max_reconnects(None)
            .reconnect_delay_callback(move |attempts| {
                let doublings = u32::try_from(attempts.saturating_sub(1)).unwrap_or(u32::MAX);
                first.saturating_mul(1 << doublings.min(10)).min(last)
            }))
    }
}
