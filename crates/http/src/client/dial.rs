//! Opens a connection to one of an upstream's addresses.
//!
//! Nothing of a request has been sent yet, so the next address may be tried for any request. An address that does not
//! respond belongs to an unreachable machine, or to a Service of Kubernetes, which has one address for all its pods
//! and selects a pod for each attempt. Therefore all addresses are tried again if any of them timed out.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::time::timeout;

/// No round of attempts starts after this time. The first round always completes, unless the deadline of the exchange
/// cancels it.
const RETRY_WINDOW: Duration = Duration::from_secs(10);

/// Connects to the first of `addresses` that accepts the connection within `per_address`.
///
/// # Errors
/// The error of the last address that was tried, or `NotFound` if there are no addresses.
pub(super) async fn dial(addresses: &[SocketAddr], per_address: Duration) -> io::Result<TcpStream> {
    dial_within(addresses, per_address, RETRY_WINDOW).await
}

async fn dial_within(
    addresses: &[SocketAddr],
    per_address: Duration,
    retry_window: Duration,
) -> io::Result<TcpStream> {
    let start = Instant::now();
    loop {
        let mut any_timed_out = false;
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in addresses {
            let connected = timeout(per_address, TcpStream::connect(address)).await;
            match connected.map(|stream| stream.and_then(verify_connected)) {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) => last = error,
                Err(_) => (any_timed_out, last) = (true, io::ErrorKind::TimedOut.into()),
            }
        }
        if !any_timed_out || start.elapsed() >= retry_window {
            return Err(last);
        }
    }
}

/// Returns `stream` if it is connected to another socket.
///
/// # Errors
/// When the peer has already reset the connection, or when the socket is connected to itself: while nothing listens on
/// a local port, the kernel may choose the same port for the client.
fn verify_connected(stream: TcpStream) -> io::Result<TcpStream> {
    if stream.local_addr()? == stream.peer_addr()? {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, TcpSocket};

    use super::*;

    const SHORT_TIMEOUT: Duration = Duration::from_millis(100);

    /// A port that does not respond to connection attempts, because its backlog is full.
    async fn unresponsive() -> (TcpListener, Vec<TcpStream>) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(1).unwrap();
        let (address, mut backlog) = (listener.local_addr().unwrap(), Vec::new());
        while let Ok(stream) = timeout(SHORT_TIMEOUT, TcpStream::connect(address)).await {
            backlog.push(stream.unwrap());
        }
        (listener, backlog)
    }

    /// A port that refuses connections.
    async fn closed() -> SocketAddr {
        TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
    }

    #[tokio::test]
    async fn an_unresponsive_or_refusing_address_is_skipped() {
        let (unresponsive, _backlog) = unresponsive().await;
        let open = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let [unresponsive, open] =
            [unresponsive, open].map(|listener| (listener.local_addr().unwrap(), listener));
        let stream = dial(&[unresponsive.0, closed().await, open.0], SHORT_TIMEOUT).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), open.0);
    }

    /// A port that resets every connection, on a thread of its own.
    fn resetting() -> SocketAddr {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                reset(stream);
            }
        });
        address
    }

    fn reset(stream: std::net::TcpStream) {
        socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    }

    #[tokio::test]
    async fn a_reset_or_self_connected_stream_is_rejected() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let stream = verify_connected(stream).unwrap();
        reset(listener.accept().unwrap().0);
        // Reads the reset.
        timeout(Duration::from_secs(10), stream.readable()).await.unwrap().unwrap();
        assert_eq!(verify_connected(stream).unwrap_err().kind(), io::ErrorKind::NotConnected);

        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let own = socket.local_addr().unwrap();
        let stream = socket.connect(own).await.unwrap();
        assert_eq!(verify_connected(stream).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test]
    async fn an_address_that_resets_connections_is_skipped() {
        let open = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addresses = [resetting(), open.local_addr().unwrap()];
        // The reset arrives before, during or after the check of the connection.
        for _ in 0..1000 {
            dial(&addresses, Duration::from_secs(10)).await.unwrap();
            while let Ok(Ok(_)) = timeout(Duration::ZERO, open.accept()).await {}
        }
    }

    #[tokio::test]
    async fn an_unresponsive_address_is_retried_and_a_refusing_one_is_not() {
        let (listener, backlog) = unresponsive().await;
        let address = listener.local_addr().unwrap();
        let accepting = async {
            // Only after the first attempt has timed out.
            tokio::time::sleep(3 * SHORT_TIMEOUT).await;
            for _ in &backlog {
                listener.accept().await.unwrap();
            }
        };
        // The kernel repeats its SYN after a second, which is too late for each of these attempts.
        let addresses = [address];
        let (stream, ()) = tokio::join!(dial(&addresses, SHORT_TIMEOUT), accepting);
        assert_eq!(stream.unwrap().peer_addr().unwrap(), address);
        let long = Duration::from_secs(3600);
        let refused = timeout(long, dial(&[closed().await], long)).await.unwrap().unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test]
    async fn each_address_is_tried_at_least_once_and_retries_end() {
        let (listener, _backlog) = unresponsive().await;
        let unresponsive = listener.local_addr().unwrap();
        let open = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addresses = [unresponsive, unresponsive, open.local_addr().unwrap()];
        assert!(dial_within(&addresses, SHORT_TIMEOUT, Duration::ZERO).await.is_ok());
        let error = dial_within(&[unresponsive], SHORT_TIMEOUT, SHORT_TIMEOUT).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(dial(&[], SHORT_TIMEOUT).await.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
