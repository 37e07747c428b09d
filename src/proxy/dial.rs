//! Opens a connection to one of an upstream's addresses.
//!
//! Nothing has been sent by then, so any request may go to the next address. An address that does not answer belongs to
//! a machine that is cut off, or to a Service of Kubernetes, which has one address for all its pods and chooses a pod
//! for each attempt: so where nobody refuses, all addresses are tried again.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::time::timeout;

/// After this time no round of attempts begins. Each address has been tried once by then, or the call's deadline ends
/// this.
const PATIENCE: Duration = Duration::from_secs(10);

/// Connects to the first of `addresses` that takes the connection within `each`.
///
/// # Errors
/// Why the last address that was tried did not.
pub(super) async fn dial(addresses: &[SocketAddr], each: Duration) -> io::Result<TcpStream> {
    dial_for(addresses, each, PATIENCE).await
}

async fn dial_for(
    addresses: &[SocketAddr],
    each: Duration,
    patience: Duration,
) -> io::Result<TcpStream> {
    let start = Instant::now();
    loop {
        let mut is_silent = false;
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in addresses {
            match timeout(each, TcpStream::connect(address)).await {
                // While nobody listens on a port of this machine, the kernel may pick that very port as the client's
                // own, and connect it with itself.
                Ok(Ok(stream)) if stream.local_addr()? == stream.peer_addr()? => {
                    last = io::ErrorKind::ConnectionRefused.into();
                }
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) => last = error,
                Err(_) => (is_silent, last) = (true, io::ErrorKind::TimedOut.into()),
            }
        }
        if !is_silent || start.elapsed() >= patience {
            return Err(last);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::{TcpListener, TcpSocket};

    use super::*;

    const SHORT: Duration = Duration::from_millis(100);

    /// A port that answers no attempt to connect: its queue is full.
    async fn silent() -> (TcpListener, Vec<TcpStream>) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(1).unwrap();
        let (address, mut waiting) = (listener.local_addr().unwrap(), Vec::new());
        while let Ok(stream) = timeout(SHORT, TcpStream::connect(address)).await {
            waiting.push(stream.unwrap());
        }
        (listener, waiting)
    }

    /// A port that refuses connections.
    async fn closed() -> SocketAddr {
        TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
    }

    #[tokio::test]
    async fn an_address_that_is_silent_or_refuses_is_passed_over() {
        let (silent, _waiting) = silent().await;
        let open = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let [silent, open] = [silent, open].map(|it| (it.local_addr().unwrap(), it));
        let stream = dial(&[silent.0, closed().await, open.0], SHORT).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), open.0);
    }

    #[tokio::test]
    async fn a_silent_address_is_tried_again_and_one_that_refuses_is_not() {
        let (listener, waiting) = silent().await;
        let address = listener.local_addr().unwrap();
        let accepting = async {
            // Not before the first attempt has been given up.
            tokio::time::sleep(3 * SHORT).await;
            for _ in &waiting {
                listener.accept().await.unwrap();
            }
        };
        // The system itself repeats an attempt after a second, which would be too late for each of these.
        let addresses = [address];
        let (stream, ()) = tokio::join!(dial(&addresses, SHORT), accepting);
        assert_eq!(stream.unwrap().peer_addr().unwrap(), address);
        let long = Duration::from_secs(3600);
        let refused = timeout(long, dial(&[closed().await], long)).await.unwrap().unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test]
    async fn each_address_is_tried_once_at_least_and_none_for_ever() {
        let (listener, _waiting) = silent().await;
        let silent = listener.local_addr().unwrap();
        let open = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addresses = [silent, silent, open.local_addr().unwrap()];
        assert!(dial_for(&addresses, SHORT, Duration::ZERO).await.is_ok());
        let error = dial_for(&[silent], SHORT, SHORT).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(dial(&[], SHORT).await.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
