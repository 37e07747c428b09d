//! HTTP/1.1 to the replicas on this machine.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::body::Body;
use http::header::HOST;
use http::{HeaderValue, Request, Response, StatusCode};
use hyper::upgrade::OnUpgrade;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::config::base_url::BaseUrl;
use crate::deadlines::Deadlines;
use crate::interim::InterimQueue;
use crate::provider::process::launcher::ProcessTasks;
use crate::proxy::body::RequestBody;
use crate::proxy::client::Origin;
use crate::proxy::failover::FailoverRequest;
use crate::proxy::headers;
use crate::proxy::tunnel::Tunnel;
use crate::proxy::upstream_body::UpstreamBody;

/// A connection within the machine is there at once, or the replica has more to do than accept it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A changed protocol on which nothing is said for so long has ended.
const TUNNEL_IDLE_TIMEOUT: Duration = Duration::from_secs(3600);

/// A request that is about to be sent to a replica.
pub(super) struct ReplicaRequest {
    outgoing: FailoverRequest,
    /// The caller's connection, if it wants to change protocols.
    upgrade: Option<OnUpgrade>,
    /// Where the client's connection takes interim responses.
    interim: Option<Arc<InterimQueue>>,
}

/// Why a replica gave no answer.
#[derive(Debug)]
pub(super) enum SendError {
    /// Nobody accepts connections there, and the request can be sent to another one.
    Refused,
    Other(anyhow::Error),
}

impl ReplicaRequest {
    /// `request`'s URI is path and query; `host` is for one that names none.
    pub(super) fn new(request: Request<Body>, host: SocketAddr) -> anyhow::Result<Self> {
        let mut request = request.map(RequestBody::Api);
        let interim = request.extensions().get::<Arc<InterimQueue>>().cloned();
        let upgrade = headers::keep_end_to_end(request.headers_mut());
        if !request.headers().contains_key(HOST) {
            request.headers_mut().insert(HOST, HeaderValue::from_str(&host.to_string())?);
        }
        let upgrade = upgrade.map(|_| hyper::upgrade::on(&mut request));
        Ok(Self { outgoing: FailoverRequest::new(request), upgrade, interim })
    }

    /// Sends it to the replica at `address`, and returns when the answer's head is there. Bodies stream.
    ///
    /// The caller sees to deadlines: dropping the future, or the answer, ends the call.
    pub(super) async fn send(
        &mut self,
        tasks: &ProcessTasks,
        address: SocketAddr,
    ) -> Result<Response<Body>, SendError> {
        let url = BaseUrl::parse(&format!("http://{address}")).context("no address");
        let origin = Origin::new(url.map_err(SendError::Other)?);
        let deadlines = Arc::new(Deadlines::new().with_interim(self.interim.clone()));
        let mut answer = match self.outgoing.send(&tasks.client, &origin, &deadlines).await {
            Ok(answer) => answer,
            Err(error) if error.is_connect() => return Err(SendError::Refused),
            Err(error) => return Err(SendError::Other(error.into())),
        };
        if answer.status() == StatusCode::SWITCHING_PROTOCOLS {
            self.start_tunnel(tasks, &mut answer).map_err(SendError::Other)?;
        }
        Ok(answer.map(Body::new))
    }

    fn start_tunnel(
        &mut self,
        tasks: &ProcessTasks,
        answer: &mut Response<UpstreamBody>,
    ) -> anyhow::Result<()> {
        let caller = self.upgrade.take().context("it changed protocols unasked")?;
        let tunnel = Tunnel::new(caller, answer, TUNNEL_IDLE_TIMEOUT);
        let force_kill = tasks.force_kill.clone();
        tasks.spawn(async move {
            // Both branches are cancel-safe: what is cut is lost on purpose.
            tokio::select! {
                () = tunnel.run() => {}
                () = force_kill.cancelled() => {}
            }
        });
        Ok(())
    }
}

/// Connects to a replica.
pub(super) async fn connect(address: SocketAddr) -> anyhow::Result<TcpStream> {
    let connecting = timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await;
    let tcp =
        connecting.context("it accepts no connection")?.context("it accepts no connection")?;
    // The kernel may connect a port with itself while nobody listens there.
    anyhow::ensure!(tcp.local_addr()? != tcp.peer_addr()?, "it does not listen yet");
    Ok(tcp)
}
