//! Selects the TCP congestion control algorithm of client connections.

use std::io;
use std::net::{IpAddr, TcpListener};
use std::sync::Arc;

use socket2::{Domain, SockRef, Socket, Type};
use tokio::net::TcpStream;

/// An algorithm without pacing that every Linux has and normally allows.
const UNPACED_ALGORITHM: &[u8] = b"reno";

/// The configured algorithm cannot be used.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot use tcp_congestion_control={algorithm}: name one that net.ipv4.tcp_allowed_congestion_control lists, \
     or leave it empty for the default of the system"
)]
pub struct CongestionError {
    algorithm: String,
    #[source]
    source: io::Error,
}

/// The congestion control of accepted connections, where it differs from that of their listener.
#[derive(Clone, Debug, Default)]
pub struct CongestionControl {
    /// The algorithm of connections with other machines; `None` for that of the listener.
    remote: Option<Arc<[u8]>>,
}

impl CongestionControl {
    /// Sets `algorithm` for all connections that `listeners` accept.
    ///
    /// # Errors
    /// `CongestionError` when this system does not have the algorithm, or does not allow it. The gateway must not
    /// start.
    pub fn fixed(listeners: &[TcpListener], algorithm: &str) -> Result<Self, CongestionError> {
        set_all(listeners, algorithm.as_bytes())
            .map_err(|source| CongestionError { algorithm: algorithm.to_owned(), source })?;
        Ok(Self::default())
    }

    /// Uses the default algorithm of the system. If that is BBR, connections within this machine use one without
    /// pacing, because BBR needs a timer for each segment that is sent, and there is no network to protect.
    pub fn from_system(listeners: &[TcpListener]) -> Self {
        let Some(first) = listeners.first() else { return Self::default() };
        match SockRef::from(first).tcp_congestion() {
            Ok(system) if system.starts_with(b"bbr") => Self::unpaced_local(listeners, &system),
            _ => Self::default(),
        }
    }

    fn unpaced_local(listeners: &[TcpListener], system: &[u8]) -> Self {
        // Start with Reno and switch later, not the reverse: a connection that started with BBR stays paced.
        match check_can_switch_to(system).and_then(|()| set_all(listeners, UNPACED_ALGORITHM)) {
            Ok(()) => Self { remote: Some(system.into()) },
            Err(error) => {
                tracing::debug!(%error, "The system's congestion control cannot be changed per connection");
                Self::default()
            }
        }
    }

    /// Sets the algorithm of a connection that has been accepted from `peer`.
    pub(super) fn apply(&self, tcp: &TcpStream, peer: IpAddr) {
        let Some(algorithm) = &self.remote else { return };
        if is_local(peer, || Ok(tcp.local_addr()?.ip())) {
            return;
        }
        let socket = SockRef::from(tcp);
        // A route may have set another algorithm.
        if socket.tcp_congestion().is_ok_and(|name| name.starts_with(UNPACED_ALGORITHM))
            && let Err(error) = socket.set_tcp_congestion(algorithm)
        {
            tracing::warn!(%peer, %error, "A connection uses reno instead of the system's congestion control");
        }
    }
}

/// Checks with a separate socket that this process may switch from `UNPACED_ALGORITHM` to `algorithm`.
fn check_can_switch_to(algorithm: &[u8]) -> io::Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_tcp_congestion(UNPACED_ALGORITHM)?;
    socket.set_tcp_congestion(algorithm)
}

fn set_all(listeners: &[TcpListener], algorithm: &[u8]) -> io::Result<()> {
    listeners.iter().try_for_each(|one| SockRef::from(one).set_tcp_congestion(algorithm))
}

/// Returns whether a connection between `peer` and `own` stays on this machine.
fn is_local(peer: IpAddr, own: impl FnOnce() -> io::Result<IpAddr>) -> bool {
    peer.to_canonical().is_loopback() || own().is_ok_and(|own| own == peer)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    /// Applies `configure` to two listeners, as two threads have them. Returns its result, and one accepted connection of
    /// each listener with its client's end.
    async fn accepted<T>(
        configure: impl FnOnce(&[TcpListener]) -> T,
    ) -> (T, Vec<(TcpStream, TcpStream)>) {
        let bind = || {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            listener.set_nonblocking(true).unwrap();
            listener
        };
        let listeners = [bind(), bind()];
        let result = configure(&listeners);
        let mut connections = Vec::new();
        for listener in listeners {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            connections.push((listener.accept().await.unwrap().0, client));
        }
        (result, connections)
    }

    /// Returns the algorithm of `socket`, without the zeros that the kernel appends.
    fn algorithm<'a>(socket: impl Into<SockRef<'a>>) -> String {
        let name = socket.into().tcp_congestion().unwrap();
        String::from_utf8(name).unwrap().trim_end_matches('\0').to_owned()
    }

    /// Returns an algorithm other than reno that this system allows, or reno if there is none; then the tests check
    /// less.
    fn other_algorithm() -> String {
        let allowed =
            std::fs::read_to_string("/proc/sys/net/ipv4/tcp_allowed_congestion_control").unwrap();
        allowed.split_whitespace().find(|name| *name != "reno").unwrap_or("reno").to_owned()
    }

    #[tokio::test]
    async fn accepted_connections_use_the_configured_algorithm() {
        for name in ["reno".to_owned(), other_algorithm()] {
            let (congestion, connections) =
                accepted(|all| CongestionControl::fixed(all, &name)).await;
            for (accepted, _) in connections {
                congestion.as_ref().unwrap().apply(&accepted, Ipv4Addr::new(192, 0, 2, 1).into());
                assert_eq!(algorithm(&accepted), name);
            }
        }
    }

    #[tokio::test]
    async fn an_unavailable_algorithm_is_refused() {
        let (congestion, _) = accepted(|all| CongestionControl::fixed(all, "none-such")).await;
        let text = congestion.unwrap_err().to_string();
        assert!(
            text.starts_with("cannot use tcp_congestion_control=none-such: name one that "),
            "{text}"
        );
    }

    #[tokio::test]
    async fn local_connections_are_unpaced_and_remote_ones_use_the_system_algorithm() {
        let system = other_algorithm();
        let configure =
            |all: &[TcpListener]| CongestionControl::unpaced_local(all, system.as_bytes());
        let (congestion, connections) = accepted(configure).await;
        for (accepted, _) in connections {
            congestion.apply(&accepted, Ipv4Addr::LOCALHOST.into());
            assert_eq!(algorithm(&accepted), "reno");
            congestion.apply(&accepted, Ipv4Addr::new(192, 0, 2, 1).into());
            assert_eq!(algorithm(&accepted), system);
        }
    }

    #[tokio::test]
    async fn an_algorithm_that_cannot_be_restored_is_not_replaced() {
        let configure = |all: &[TcpListener]| {
            let system = algorithm(&all[0]);
            (CongestionControl::unpaced_local(all, b"none-such"), system)
        };
        let ((congestion, system), connections) = accepted(configure).await;
        for (accepted, _) in connections {
            congestion.apply(&accepted, Ipv4Addr::new(192, 0, 2, 1).into());
            assert_eq!(algorithm(&accepted), system);
        }
    }

    #[tokio::test]
    async fn local_connections_use_the_system_algorithm_unless_it_is_bbr() {
        let configure = |all: &[TcpListener]| {
            let system = algorithm(&all[0]);
            CongestionControl::from_system(all);
            system
        };
        let (system, connections) = accepted(configure).await;
        let expect = if system.starts_with("bbr") { "reno" } else { &system };
        for (accepted, _) in connections {
            assert_eq!(algorithm(&accepted), expect);
        }
    }

    #[test]
    fn a_client_with_an_address_of_this_machine_is_local() {
        let is_local =
            |peer: &str, own: &str| is_local(peer.parse().unwrap(), || Ok(own.parse().unwrap()));
        assert!(is_local("127.0.0.1", "127.0.0.1"));
        assert!(is_local("::1", "::1"));
        assert!(is_local("::ffff:127.0.0.1", "::ffff:127.0.0.1"));
        assert!(is_local("192.0.2.1", "192.0.2.1"));
        assert!(!is_local("192.0.2.1", "192.0.2.2"));
        assert!(!is_local("::ffff:192.0.2.1", "::ffff:192.0.2.2"));
    }
}
