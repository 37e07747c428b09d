//! The HTTP server: accepts connections and serves them until they end, with limits, deadlines and graceful shutdown.
//! A service, passed to [`Server::run`], produces the responses.

pub mod client_connection;
pub mod congestion;
mod connection;
mod connection_shard;
pub mod head_budget;
mod linger;
pub mod listener;
pub mod refusal;
mod registry;

use std::convert::Infallible;
use std::error::Error;
use std::io;
use std::net::TcpListener;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::body::{Body, Incoming};
use hyper::service::Service;
use hyper::{Request, Response};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;

use crate::server::client_connection::{ClientConnection, ClientIo};
use crate::server::congestion::CongestionControl;
use crate::server::connection::Connection;
use crate::server::head_budget::HeadBudget;
use crate::server::registry::{ConnectionRegistry, Eviction, RegistrationGuard};
use gateway_base::shutdown::ShutdownPhases;

/// Pause before the next accept when the process has no more file descriptors or memory.
const ACCEPT_RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Interval at which a new connection that waits for a permit checks the eviction of another.
const EVICTION_POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Timeouts of an exchange with a client.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// `read_timeout`: maximum time for receiving a request.
    pub read: Duration,
    /// `write_timeout`: maximum time during which a client accepts none of its response.
    pub write: Duration,
    /// `upstream_timeout`: from the first byte sent to a function until the last byte of its response.
    pub upstream: Duration,
    /// `idle_timeout`: maximum time for which a connection may stay open without a request.
    pub idle: Duration,
}

/// State that all listeners of one port share.
#[derive(Clone)]
pub struct Server {
    /// Timeouts of each connection.
    pub timeouts: Timeouts,
    /// One permit for each open connection.
    pub connection_permits: Arc<Semaphore>,
    /// Phases of the shutdown, which end accept loop and connections.
    pub phases: ShutdownPhases,
    /// Congestion control of accepted connections.
    pub congestion: CongestionControl,
    /// The memory budget for incomplete heads.
    head_budget: Arc<HeadBudget>,
    registry: Arc<ConnectionRegistry>,
}

impl Server {
    /// Creates a server with at most `max_connections` open connections.
    pub fn new(
        timeouts: Timeouts,
        max_connections: usize,
        phases: ShutdownPhases,
        head_budget: Arc<HeadBudget>,
    ) -> Self {
        let permits = max_connections.min(Semaphore::MAX_PERMITS);
        Self {
            timeouts,
            connection_permits: Arc::new(Semaphore::new(permits)),
            phases,
            congestion: CongestionControl::default(),
            head_budget,
            registry: Arc::default(),
        }
    }

    /// Serves `listener` until shutdown starts to drain, then waits for the open connections to end or for the forced
    /// end.
    ///
    /// `service` creates the service of one connection. Connections run as tasks of the current runtime.
    ///
    /// # Errors
    /// When the listener cannot be registered with the runtime: nothing is served.
    pub async fn run<S, B>(
        self,
        listener: TcpListener,
        service: impl Fn(ClientConnection) -> S,
    ) -> io::Result<()>
    where
        S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>
            + Send
            + Unpin
            + 'static,
        S::Future: Send,
        B: Body + Send + 'static,
        B::Data: Send,
        B::Error: Into<Box<dyn Error + Send + Sync>>,
    {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let builder = connection::builder();
        let connections = TaskTracker::new();
        // A child token for this thread, so that checks of it do not touch memory that other threads write.
        let closing = self.phases.draining.child_token();
        let shard = self.registry.add_shard(&self.head_budget);
        let serve_connection = |tcp: TcpStream, permit| {
            let Ok(address) = tcp.peer_addr() else { return };
            let _ = tcp.set_nodelay(true);
            self.congestion.apply(&tcp, address.ip());
            let client = ClientConnection::new(address, connections.clone(), permit);
            // The first request must start soon after the connection.
            let first = self.timeouts.idle.min(self.timeouts.read);
            client.deadlines.on_exchange_finished(Instant::now(), first);
            let registration = registry::register(&shard, &client.deadlines, &self.head_budget);
            let stream = ClientIo::new(
                tcp,
                Arc::clone(&client.deadlines),
                self.timeouts,
                Arc::clone(&registration),
            );
            let service = service(client.clone());
            let closing = closing.clone();
            let connection = Connection::new(
                builder.clone(),
                stream,
                client,
                service,
                closing,
                RegistrationGuard(registration),
            );
            connections.spawn(connection);
        };
        while let Some((tcp, permit)) = self.accept(&listener).await {
            serve_connection(tcp, permit);
        }
        for tcp in drain_backlog(listener) {
            let Ok(permit) = Arc::clone(&self.connection_permits).try_acquire_owned() else {
                break;
            };
            serve_connection(tcp, permit);
        }
        connections.close();
        // Both branches are cancel-safe. The end of the runtime stops connections that are still open.
        tokio::select! {
            () = connections.wait() => {}
            () = self.phases.forced.cancelled() => {
                tracing::warn!(connections = connections.len(), "Connections closed at the end of shutdown_grace");
            }
        }
        Ok(())
    }

    /// Returns the next connection with its permit; `None` when no more connections are accepted.
    async fn accept(
        &self,
        listener: &tokio::net::TcpListener,
    ) -> Option<(TcpStream, OwnedSemaphorePermit)> {
        let next = async {
            loop {
                match listener.accept().await {
                    // Accept first: a thread that waits for clients must not hold a permit that others need.
                    Ok((tcp, _)) => {
                        return Some((tcp, self.acquire_permit().await?));
                    }
                    // The client has already closed the connection.
                    Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
                    Err(error) => {
                        tracing::warn!(%error, "Cannot accept connections");
                        tokio::time::sleep(ACCEPT_RETRY_INTERVAL).await;
                    }
                }
            }
        };
        // Both branches are cancel-safe: a connection without a permit is closed like one that was not accepted.
        tokio::select! {
            () = self.phases.draining.cancelled() => None,
            next = next => next,
        }
    }
}

impl Server {
    /// Acquires a permit for a connection. If there is none, evicts the connection that has been idle longest.
    async fn acquire_permit(&self) -> Option<OwnedSemaphorePermit> {
        if let Ok(permit) = Arc::clone(&self.connection_permits).try_acquire_owned() {
            return Some(permit);
        }
        let mut waiting = pin!(Arc::clone(&self.connection_permits).acquire_owned());
        let mut eviction = None::<Eviction>;
        loop {
            // Evict one connection for one permit; another only if the first does not end.
            if !eviction.as_ref().is_some_and(Eviction::is_pending) {
                eviction = self.registry.evict_one();
            }
            // Cancel-safe: `waiting` keeps its position in the queue of the semaphore.
            tokio::select! {
                permit = &mut waiting => return permit.ok(),
                () = tokio::time::sleep(EVICTION_POLL_INTERVAL) => {}
            }
        }
    }
}

/// Closes `listener`, and returns the connections that the kernel has already accepted: they may have sent a request.
fn drain_backlog(listener: tokio::net::TcpListener) -> Vec<TcpStream> {
    let Ok(listener) = listener.into_std() else { return Vec::new() };
    let accepted = std::iter::from_fn(|| listener.accept().ok());
    accepted
        .filter_map(|(tcp, _)| {
            tcp.set_nonblocking(true).ok()?;
            TcpStream::from_std(tcp).ok()
        })
        .collect()
}

/// Raises the soft limit on open files to the hard limit, and returns it.
pub fn raise_file_limit() -> usize {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, limit);
    let limit = getrlimit(Resource::Nofile).current;
    limit.map_or(usize::MAX, |files| usize::try_from(files).unwrap_or(usize::MAX))
}
