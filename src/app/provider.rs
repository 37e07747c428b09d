//! The role of the process provider: its API on a port of its own.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use axum::middleware::from_fn_with_state;
use tokio_util::sync::CancellationToken;

use crate::auth::{self, Credentials};
use crate::config::{self, Timeouts};
use crate::provider::process::{self, ProcessProvider};
use crate::routes;
use crate::same_origin::{self, AllowedHosts};
use crate::serve::heads::Heads;
use crate::serve::listener::bind;
use crate::serve::{Server, raise_file_limit};
use crate::shutdown::{Event, OnHangup, Signals, Stages, Tasks};

/// What the provider holds its callers to: they are gateways, which have deadlines of their own.
const TIMEOUTS: Timeouts = Timeouts {
    read: Duration::from_secs(60),
    write: Duration::from_secs(300),
    // Not used: how long a function may take is the function's own setting.
    upstream: Duration::MAX,
    idle: Duration::from_secs(300),
};
/// What processes get to end by themselves once no call needs them.
const PROCESSES_GRACE: Duration = Duration::from_secs(5);
const MAX_CONNECTIONS: usize = 10_000;

/// A running process provider.
pub(super) struct Provider {
    pub(super) address: SocketAddr,
    pub(super) process: Arc<ProcessProvider>,
    listener: Option<TcpListener>,
    credentials: Option<Arc<Credentials>>,
    /// Its users have credentials, and may call it by any name.
    is_public: bool,
    grace: Duration,
    stages: Stages,
    /// No connection is open any more.
    drained: CancellationToken,
}

/// `gateway provider process`
pub(super) fn run(config: config::Provider) -> anyhow::Result<()> {
    super::block_on(runtime()?, async {
        let mut signals = Signals::listen().context("cannot listen for signals")?;
        let tasks = Tasks::default();
        let credentials = match &config.credentials_dir {
            Some(directory) => Some(Credentials::read(directory)?),
            None => None,
        };
        let mut provider = Provider::open(&config, credentials, &tasks).await?;
        provider.serve(&tasks);
        tracing::info!(address = %provider.address, state = %config.state_dir.display(), "Serving");
        let signal = loop {
            match signals.event(OnHangup::StopWithoutTerminal).await {
                Event::Stop(signal) => break signal,
                Event::Reload => {
                    tracing::info!("SIGHUP: files are read again");
                    provider.stages.reload();
                }
            }
        };
        tracing::info!("Stopping on {signal}");
        tokio::select! {
            () = provider.stop(&tasks) => {}
            signal = signals.next() => bail!("ended at once by a second signal, {signal}"),
        }
        tracing::info!("Stopped");
        Ok(())
    })
}

/// Processes are started, fed and read by many tasks at a time.
pub(super) fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")
}

impl Provider {
    /// Takes the port and the state directory; serves nothing yet. Its API asks for `credentials`.
    pub(super) async fn open(
        config: &config::Provider,
        credentials: Option<Arc<Credentials>>,
        tasks: &Tasks,
    ) -> anyhow::Result<Self> {
        let listener = bind(config.listen, 1)?.remove(0);
        raise_file_limit();
        let process = ProcessProvider::open_adopting_orphans(config, tasks).await?;
        Ok(Self {
            address: listener.local_addr()?,
            process,
            listener: Some(listener),
            is_public: config.credentials_dir.is_some(),
            credentials,
            grace: config.shutdown_grace,
            stages: Stages::default(),
            drained: CancellationToken::new(),
        })
    }

    pub(super) fn serve(&mut self, tasks: &Tasks) {
        let Some(listener) = self.listener.take() else { return };
        let local_only = self.address.ip().is_loopback() && !self.is_public;
        let allowed_hosts = if local_only { AllowedHosts::Local } else { AllowedHosts::Any };
        let router = process::router(Arc::clone(&self.process))
            .layer(from_fn_with_state(self.credentials.clone(), auth::guard_provider))
            .layer(from_fn_with_state(allowed_hosts, same_origin::guard));
        if let Some(credentials) = self.credentials.clone() {
            let reloads = self.stages.reloads();
            tasks.spawn(|stopping| credentials.watch_files(stopping, reloads));
        }
        let heads = Arc::<Heads>::default();
        let server = Server::new(TIMEOUTS, MAX_CONNECTIONS, self.stages.clone(), heads);
        let drained = self.drained.clone();
        tasks.spawn(|_stopping| async move {
            let _drained = drained.drop_guard();
            let service = |caller| routes::router_service(&router, caller, TIMEOUTS.idle);
            if let Err(error) = server.run(listener, service).await {
                tracing::error!(%error, "The provider's port cannot be served");
            }
        });
    }

    /// Takes no more calls, lets those in flight finish, and stops every process.
    pub(super) async fn stop(self, tasks: &Tasks) {
        self.stages.closing.cancel();
        let serves = self.listener.is_none();
        let drained = tokio::time::timeout(self.grace, self.drained.cancelled());
        if serves && drained.await.is_err() {
            tracing::warn!("Calls cut at the end of shutdown_grace");
        }
        self.process.stop(PROCESSES_GRACE).await;
        self.stages.cut.cancel();
        if tasks.stop(super::TASKS_GRACE).await.is_err() {
            tracing::warn!("Background work did not end in time");
        }
    }
}
