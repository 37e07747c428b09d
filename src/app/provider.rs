//! The process provider role: its API on its own port.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use axum::middleware::from_fn_with_state;
use tokio_util::sync::CancellationToken;

use crate::config;
use gateway_api::{auth, same_origin};
use gateway_base::shutdown::{Event, OnHangup, ShutdownPhases, Signals, Tasks};
use gateway_http::allowed_hosts::AllowedHosts;
use gateway_http::credentials::Credentials;
use gateway_http::server::head_budget::HeadBudget;
use gateway_http::server::listener::bind;
use gateway_http::server::{Server, Timeouts, raise_file_limit};
use gateway_provider::process::{self, ProcessProvider};
use gateway_proxy::service::serve_router;

/// Timeouts of the provider's API. Its clients are gateways, which have their own deadlines.
const API_TIMEOUTS: Timeouts = Timeouts {
    read: Duration::from_secs(60),
    write: Duration::from_secs(300),
    // Not used: the execution time limit is a setting of each function.
    upstream: Duration::MAX,
    idle: Duration::from_secs(300),
};
/// Time for processes to exit after SIGTERM, once no invocation needs them.
const PROCESS_STOP_TIMEOUT: Duration = Duration::from_secs(5);
const MAX_CONNECTIONS: usize = 10_000;

/// A running process provider.
pub(super) struct ProviderServer {
    pub(super) address: SocketAddr,
    pub(super) process: Arc<ProcessProvider>,
    listener: Option<TcpListener>,
    credentials: Option<Arc<Credentials>>,
    /// Clients have credentials of their own, and may use any host name.
    is_public: bool,
    grace: Duration,
    phases: ShutdownPhases,
    /// Cancelled when the last connection has closed.
    drained: CancellationToken,
}

/// `gateway provider process`
pub(super) fn run(config: config::Provider) -> anyhow::Result<()> {
    super::block_on(build_runtime()?, async {
        let mut signals = Signals::listen().context("cannot listen for signals")?;
        let tasks = Tasks::default();
        let credentials = match &config.credentials_dir {
            Some(directory) => Some(Credentials::read(directory)?),
            None => None,
        };
        let mut provider = ProviderServer::open(&config, credentials, &tasks).await?;
        provider.serve(&tasks);
        tracing::info!(address = %provider.address, state = %config.process.state_dir.display(), "Serving");
        let signal = loop {
            match signals.next_event(OnHangup::StopWithoutTerminal).await {
                Event::Stop(signal) => break signal,
                Event::Reload => {
                    tracing::info!("SIGHUP: reloading files");
                    provider.phases.reload();
                }
            }
        };
        tracing::info!("Stopping on {signal}");
        tokio::select! {
            () = provider.stop(&tasks) => {}
            signal = signals.next_termination() => bail!("shutdown aborted by a second signal, {signal}"),
        }
        tracing::info!("Stopped");
        Ok(())
    })
}

/// Builds a multi-threaded runtime: many tasks start processes and copy their input and output concurrently.
pub(super) fn build_runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")
}

impl ProviderServer {
    /// Binds the port and locks the state directory, but serves nothing yet. The API requires `credentials`.
    ///
    /// # Errors
    /// When the port cannot be bound, or the state directory is in use or damaged.
    pub(super) async fn open(
        config: &config::Provider,
        credentials: Option<Arc<Credentials>>,
        tasks: &Tasks,
    ) -> anyhow::Result<Self> {
        let listener = bind(config.listen, 1)?.remove(0);
        raise_file_limit();
        let process = ProcessProvider::open_adopting_orphans(&config.process, tasks).await?;
        Ok(Self {
            address: listener.local_addr()?,
            process,
            listener: Some(listener),
            is_public: config.credentials_dir.is_some(),
            credentials,
            grace: config.shutdown_grace,
            phases: ShutdownPhases::default(),
            drained: CancellationToken::new(),
        })
    }

    /// Starts to serve the API. Does nothing when called again.
    pub(super) fn serve(&mut self, tasks: &Tasks) {
        let Some(listener) = self.listener.take() else { return };
        let local_only = self.address.ip().is_loopback() && !self.is_public;
        let allowed_hosts = if local_only { AllowedHosts::Local } else { AllowedHosts::Any };
        let router = process::router(Arc::clone(&self.process), crate::app::BUILD)
            .layer(from_fn_with_state(self.credentials.clone(), auth::guard_provider))
            .layer(from_fn_with_state(allowed_hosts, same_origin::guard));
        if let Some(credentials) = self.credentials.clone() {
            let reloads = self.phases.reloads();
            tasks.spawn(|stopping| credentials.watch_files(stopping, reloads));
        }
        let head_budget = Arc::<HeadBudget>::default();
        let server = Server::new(API_TIMEOUTS, MAX_CONNECTIONS, self.phases.clone(), head_budget);
        let drained = self.drained.clone();
        tasks.spawn(|_stopping| async move {
            let _drained = drained.drop_guard();
            if let Err(error) = serve_router(router, server, listener).await {
                tracing::error!(%error, "The provider's API failed");
            }
        });
    }

    /// Stops accepting requests, waits for those in flight, and stops all processes.
    pub(super) async fn stop(self, tasks: &Tasks) {
        self.phases.draining.cancel();
        let serves = self.listener.is_none();
        let drained = tokio::time::timeout(self.grace, self.drained.cancelled());
        if serves && drained.await.is_err() {
            tracing::warn!("Requests aborted at the end of shutdown_grace");
        }
        self.process.stop(PROCESS_STOP_TIMEOUT).await;
        self.phases.forced.cancel();
        if tasks.stop(super::BACKGROUND_STOP_TIMEOUT).await.is_err() {
            tracing::warn!("Background tasks did not stop in time");
        }
    }
}
