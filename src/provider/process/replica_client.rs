//! HTTP/1.1 to a replica on this machine. The one place that knows how; one connection for each call.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, bail};
use axum::body::Body;
use axum::http::header::{CONNECTION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE};
use axum::http::{HeaderMap, HeaderName, Request, Response};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::provider::process::runner::RunnerTasks;

/// A connection within the machine is there at once, or the replica has more to do than accept it.
const CONNECT: Duration = Duration::from_secs(2);

/// Sends `request`, whose URI is path and query, and returns when the answer's head is there. Bodies stream.
pub(super) async fn send(
    tasks: &RunnerTasks,
    address: SocketAddr,
    mut request: Request<Body>,
) -> anyhow::Result<Response<Body>> {
    let tcp = connect(address).await?;
    remove_hop_by_hop(request.headers_mut());
    let (mut sender, connection) = http1::handshake(TokioIo::new(tcp)).await?;
    let cut = tasks.cut.clone();
    // Ends with the exchange, since the sender is not kept.
    tasks.spawn(async move {
        // Both branches are cancel-safe: what is cut is lost on purpose.
        tokio::select! {
            _ = connection => {}
            () = cut.cancelled() => {}
        }
    });
    let mut response = sender.send_request(request).await?.map(Body::new);
    remove_hop_by_hop(response.headers_mut());
    Ok(response)
}

/// Connects to a replica.
pub(super) async fn connect(address: SocketAddr) -> anyhow::Result<TcpStream> {
    let connecting = timeout(CONNECT, TcpStream::connect(address)).await;
    let tcp =
        connecting.context("it accepts no connection")?.context("it accepts no connection")?;
    // While nobody listens, the kernel may pick the very port that is called as the caller's own, and connects it
    // with itself.
    if tcp.local_addr()? == tcp.peer_addr()? {
        bail!("it does not listen yet");
    }
    tcp.set_nodelay(true)?;
    Ok(tcp)
}

/// Removes what is meant for the next hop only.
fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in [CONNECTION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE] {
        headers.remove(name);
    }
    for name in ["keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization"] {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_for_the_next_hop_are_removed_with_all_that_connection_names() {
        let request = Request::get("/")
            .header("connection", "x-a, Keep-Alive")
            .header("connection", "close, x-b")
            .header("x-a", "1")
            .header("x-b", "2")
            .header("x-c", "3")
            .header("keep-alive", "timeout=5")
            .header("te", "trailers")
            .header("transfer-encoding", "chunked")
            .body(())
            .unwrap();
        let mut headers = request.into_parts().0.headers;
        remove_hop_by_hop(&mut headers);
        assert_eq!(headers.keys().collect::<Vec<_>>(), ["x-c"]);
    }
}
