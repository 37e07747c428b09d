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
            let connected = timeout(each, TcpStream::connect(address)).await;
            match connected.map(|stream| stream.and_then(checked)) {
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

/// `stream`, if it is connected with another socket.
///
/// # Errors
/// The peer has already reset the connection, or is the socket itself: while nothing listens on a port of this machine,
/// the kernel may choose that very port for the client.
fn checked(stream: TcpStream) -> io::Result<TcpStream> {
    if stream.local_addr()? == stream.peer_addr()? {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    Ok(stream)
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
    async fn a_connection_that_is_reset_or_its_own_peer_is_none() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let stream = checked(stream).unwrap();
        reset(listener.accept().unwrap().0);
        // Reads the reset.
        timeout(Duration::from_secs(10), stream.readable()).await.unwrap().unwrap();
        assert_eq!(checked(stream).unwrap_err().kind(), io::ErrorKind::NotConnected);

        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let own = socket.local_addr().unwrap();
        let stream = socket.connect(own).await.unwrap();
        assert_eq!(checked(stream).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }

    #[tokio::test]
    async fn an_address_that_resets_connections_is_passed_over() {
        let open = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addresses = [resetting(), open.local_addr().unwrap()];
        // The reset comes before, while or after the connection is looked at.
        for _ in 0..1000 {
            dial(&addresses, Duration::from_secs(10)).await.unwrap();
            while let Ok(Ok(_)) = timeout(Duration::ZERO, open.accept()).await {}
        }
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
