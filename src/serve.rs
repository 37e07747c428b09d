//! Accepts connections and carries them to their end: limits, deadlines, drain.
//! What is answered on them is the service's business.

pub mod caller;
mod connection;
pub mod heads;
mod linger;
pub mod listener;
pub mod pacing;
pub mod refusal;
mod register;

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

use crate::config::Timeouts;
use crate::serve::caller::{Caller, CallerStream};
use crate::serve::connection::Connection;
use crate::serve::heads::Heads;
use crate::serve::pacing::Pacing;
use crate::serve::register::{Leaving, Register, Seated};
use crate::shutdown::ShutdownPhases;

/// How long to wait before accepting again when the process is out of files or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long to wait for a place before another idle connection is closed.
const ROOM_PAUSE: Duration = Duration::from_millis(50);

/// What all listeners of one port share.
#[derive(Clone)]
pub struct Server {
    pub timeouts: Timeouts,
    /// One permit for each open connection.
    pub connections: Arc<Semaphore>,
    pub phases: ShutdownPhases,
    pub pacing: Pacing,
    /// The budget for incomplete heads.
    heads: Arc<Heads>,
    register: Arc<Register>,
}

impl Server {
    /// A server that holds at most `max_connections` open at a time.
    pub fn new(
        timeouts: Timeouts,
        max_connections: usize,
        phases: ShutdownPhases,
        heads: Arc<Heads>,
    ) -> Self {
        let permits = max_connections.min(Semaphore::MAX_PERMITS);
        Self {
            timeouts,
            connections: Arc::new(Semaphore::new(permits)),
            phases,
            pacing: Pacing::default(),
            heads,
            register: Arc::default(),
        }
    }

    /// Serves `listener` until `phases.draining`, then waits for the open connections to end, or for `phases.forced`.
    ///
    /// `service` makes the service of one connection. Connections run as tasks of the current runtime.
    ///
    /// # Errors
    /// Only when the listener cannot be registered with the runtime.
    pub async fn run<S, B>(
        self,
        listener: TcpListener,
        service: impl Fn(Caller) -> S,
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
        // A token of this thread's own: looking at it must not touch what other threads write.
        let closing = self.phases.draining.child_token();
        let shard = self.register.shard(&self.heads);
        let carry = |tcp: TcpStream, permit| {
            let Ok(address) = tcp.peer_addr() else { return };
            let _ = tcp.set_nodelay(true);
            self.pacing.apply(&tcp, address.ip());
            let caller = Caller::new(address, connections.clone(), permit);
            // Whoever connects is expected to say something soon.
            let first = self.timeouts.idle.min(self.timeouts.read);
            caller.watch.call_ended(Instant::now(), first);
            let seat = shard.enter(&caller.watch, &self.heads);
            let stream =
                CallerStream::new(tcp, Arc::clone(&caller.watch), self.timeouts, Arc::clone(&seat));
            let service = service(caller.clone());
            let closing = closing.clone();
            let connection =
                Connection::new(builder.clone(), stream, caller, service, closing, Seated(seat));
            connections.spawn(connection);
        };
        while let Some((tcp, permit)) = self.accept(&listener).await {
            carry(tcp, permit);
        }
        for tcp in queued(listener) {
            let Ok(permit) = Arc::clone(&self.connections).try_acquire_owned() else { break };
            carry(tcp, permit);
        }
        connections.close();
        // Both branches are cancel-safe. What still runs after the cut ends with the runtime.
        tokio::select! {
            () = connections.wait() => {}
            () = self.phases.forced.cancelled() => {
                tracing::warn!(connections = connections.len(), "Connections cut at the end of shutdown_grace");
            }
        }
        Ok(())
    }

    /// The next connection, once there is room for it; `None` when no more are taken.
    async fn accept(
        &self,
        listener: &tokio::net::TcpListener,
    ) -> Option<(TcpStream, OwnedSemaphorePermit)> {
        let next = async {
            loop {
                match listener.accept().await {
                    // The place comes second: a thread that waits for callers must not keep one from the others.
                    Ok((tcp, _)) => {
                        return Some((tcp, self.place().await?));
                    }
                    // The peer has gone already.
                    Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
                    Err(error) => {
                        tracing::warn!(%error, "Cannot accept connections");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        };
        // Both branches are cancel-safe: a connection without a place ends as those do that were not accepted yet.
        tokio::select! {
            () = self.phases.draining.cancelled() => None,
            next = next => next,
        }
    }
}

impl Server {
    /// A place for one more connection. If there is none, the connection that has been idle longest makes room.
    async fn place(&self) -> Option<OwnedSemaphorePermit> {
        if let Ok(permit) = Arc::clone(&self.connections).try_acquire_owned() {
            return Some(permit);
        }
        let mut waiting = pin!(Arc::clone(&self.connections).acquire_owned());
        let mut leaving = None::<Leaving>;
        loop {
            // One connection for one place: another is closed only if the first does not end.
            if !leaving.as_ref().is_some_and(Leaving::is_expected) {
                leaving = self.register.make_room();
            }
            // Cancel-safe: the place in the line is kept outside.
            tokio::select! {
                permit = &mut waiting => return permit.ok(),
                () = tokio::time::sleep(ROOM_PAUSE) => {}
            }
        }
    }
}

/// Closes `listener`, and returns who the kernel has let in already: they may have sent a call.
fn queued(listener: tokio::net::TcpListener) -> Vec<TcpStream> {
    let Ok(listener) = listener.into_std() else { return Vec::new() };
    let accepted = std::iter::from_fn(|| listener.accept().ok());
    accepted
        .filter_map(|(tcp, _)| {
            tcp.set_nonblocking(true).ok()?;
            TcpStream::from_std(tcp).ok()
        })
        .collect()
}

/// Raises the limit on open files as far as it goes, and returns it.
pub fn raise_file_limit() -> usize {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, limit);
    let limit = getrlimit(Resource::Nofile).current;
    limit.map_or(usize::MAX, |files| usize::try_from(files).unwrap_or(usize::MAX))
}
