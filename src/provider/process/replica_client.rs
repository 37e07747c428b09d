//! HTTP/1.1 to a replica on this machine.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::body::Body;
use http::header::HOST;
use http::{HeaderValue, Request, Response, StatusCode};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::config::base_url::BaseUrl;
use crate::provider::process::runner::RunnerTasks;
use crate::proxy::body::RequestBody;
use crate::proxy::client::Origin;
use crate::proxy::headers;
use crate::proxy::tunnel::Tunnel;
use crate::watch::Watch;

/// A connection within the machine is there at once, or the replica has more to do than accept it.
const CONNECT: Duration = Duration::from_secs(2);
/// A changed protocol on which nothing is said for so long has ended.
const LONGEST_SILENCE: Duration = Duration::from_secs(3600);

/// Sends `request`, whose URI is path and query, and returns when the answer's head is there. Bodies stream.
///
/// The caller sees to deadlines: dropping the future, or the answer, ends the call.
pub(super) async fn send(
    tasks: &RunnerTasks,
    address: SocketAddr,
    request: Request<Body>,
) -> anyhow::Result<Response<Body>> {
    let origin = Origin::new(BaseUrl::parse(&format!("http://{address}")).context("no address")?);
    let mut request = request.map(RequestBody::Api);
    let upgrade = headers::end_to_end(request.headers_mut());
    if !request.headers().contains_key(HOST) {
        request.headers_mut().insert(HOST, HeaderValue::from_str(&address.to_string())?);
    }
    let caller = upgrade.map(|_| hyper::upgrade::on(&mut request));
    let watch = Arc::new(Watch::new());
    let mut answer = tasks.client.send(&origin, request, &watch).await?;
    let switches = answer.status() == StatusCode::SWITCHING_PROTOCOLS;
    if switches {
        let caller = caller.context("it changed protocols unasked")?;
        let tunnel = Tunnel::new(caller, &mut answer, LONGEST_SILENCE);
        let cut = tasks.cut.clone();
        tasks.spawn(async move {
            // Both branches are cancel-safe: what is cut is lost on purpose.
            tokio::select! {
                () = tunnel.run() => {}
                () = cut.cancelled() => {}
            }
        });
    }
    Ok(answer.map(Body::new))
}

/// Connects to a replica.
pub(super) async fn connect(address: SocketAddr) -> anyhow::Result<TcpStream> {
    let connecting = timeout(CONNECT, TcpStream::connect(address)).await;
    let tcp =
        connecting.context("it accepts no connection")?.context("it accepts no connection")?;
    // The kernel may connect a port with itself while nobody listens there.
    anyhow::ensure!(tcp.local_addr()? != tcp.peer_addr()?, "it does not listen yet");
    Ok(tcp)
}
