//! HTTP/1.1 client for replicas on this machine.

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

use crate::process::launcher::ProcessTasks;
use gateway_base::base_url::BaseUrl;
use gateway_http::client::Origin;
use gateway_http::client::body::RequestBody;
use gateway_http::client::failover::FailoverRequest;
use gateway_http::client::tunnel::Tunnel;
use gateway_http::client::upstream_body::UpstreamBody;
use gateway_http::deadlines::ExchangeDeadlines;
use gateway_http::headers;
use gateway_http::interim::InterimQueue;

/// Limit for connecting: a local connection is established immediately unless the replica is overloaded.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Idle time after which a tunnel is closed.
const TUNNEL_IDLE_TIMEOUT: Duration = Duration::from_secs(3600);

/// A request to a replica.
pub(super) struct ReplicaRequest {
    outgoing: FailoverRequest,
    /// The client's connection, if the request asks for an upgrade.
    upgrade: Option<OnUpgrade>,
    /// Queue for interim responses to the client.
    interim: Option<Arc<InterimQueue>>,
}

/// A request to a replica failed.
#[derive(Debug)]
pub(super) enum SendError {
    /// The connection was refused; the request can be sent to another replica.
    Refused,
    Other(anyhow::Error),
}

impl ReplicaRequest {
    /// Prepares `request`, whose URI is path and query. `host` is used if the request has no `Host` header.
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

    /// Sends the request to the replica at `address`, and returns after the response head. Bodies are streamed.
    ///
    /// There is no timeout: drop the future or the response to abort the call.
    pub(super) async fn send(
        &mut self,
        tasks: &ProcessTasks,
        address: SocketAddr,
    ) -> Result<Response<Body>, SendError> {
        let url = BaseUrl::parse(&format!("http://{address}")).context("invalid address");
        let origin = Origin::new(url.map_err(SendError::Other)?);
        let deadlines = Arc::new(ExchangeDeadlines::new().with_interim(self.interim.clone()));
        let mut response = match self.outgoing.send(&tasks.client, &origin, &deadlines).await {
            Ok(response) => response,
            Err(error) if error.is_connect() => return Err(SendError::Refused),
            Err(error) => return Err(SendError::Other(error.into())),
        };
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            self.start_tunnel(tasks, &mut response).map_err(SendError::Other)?;
        }
        Ok(response.map(Body::new))
    }

    fn start_tunnel(
        &mut self,
        tasks: &ProcessTasks,
        response: &mut Response<UpstreamBody>,
    ) -> anyhow::Result<()> {
        let client = self.upgrade.take().context("it sent 101 without an upgrade request")?;
        let tunnel = Tunnel::new(client, response, TUNNEL_IDLE_TIMEOUT);
        let force_kill = tasks.force_kill.clone();
        tasks.spawn(async move {
            // Both branches are cancel-safe: a forced stop drops the connection.
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
    // The kernel may connect a port to itself while no process listens on it.
    anyhow::ensure!(tcp.local_addr()? != tcp.peer_addr()?, "it is not listening yet");
    Ok(tcp)
}
