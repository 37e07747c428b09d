//! How sending to callers is paced: by the algorithm that controls congestion on their connections.

use std::io;
use std::net::{IpAddr, TcpListener};
use std::sync::Arc;

use socket2::{Domain, SockRef, Socket, Type};
use tokio::net::TcpStream;

/// Every Linux has it, allows it unless told not to, and paces nothing with it.
const UNPACED: &[u8] = b"reno";

/// Why callers cannot be sent to in the way that was chosen.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot use tcp_congestion_control={algorithm}: name one that net.ipv4.tcp_allowed_congestion_control lists, \
     or leave it empty for what the system uses"
)]
pub struct CongestionError {
    algorithm: String,
    #[source]
    source: io::Error,
}

/// How accepted connections are paced, where their listener does not say it all.
#[derive(Clone, Debug, Default)]
pub struct Pacing {
    /// The algorithm of connections with other machines; `None`: that of the listener.
    beyond: Option<Arc<[u8]>>,
}

impl Pacing {
    /// Has all connections that `listeners` accept use `algorithm`.
    ///
    /// # Errors
    /// `CongestionError` when this system lacks it, or does not allow it.
    pub fn chosen(listeners: &[TcpListener], algorithm: &str) -> Result<Self, CongestionError> {
        set_all(listeners, algorithm.as_bytes())
            .map_err(|source| CongestionError { algorithm: algorithm.to_owned(), source })?;
        Ok(Self::default())
    }

    /// Has connections use what the system says now. Where that is BBR, those that do not leave this machine are not
    /// paced: it would take a timer for every piece that is sent, to spare a network that is not there.
    pub fn of_system(listeners: &[TcpListener]) -> Self {
        let Some(first) = listeners.first() else { return Self::default() };
        match SockRef::from(first).tcp_congestion() {
            Ok(system) if system.starts_with(b"bbr") => Self::unpaced_within(listeners, &system),
            _ => Self::default(),
        }
    }

    fn unpaced_within(listeners: &[TcpListener], system: &[u8]) -> Self {
        // Reno first and the other later, not the reverse: a connection that has begun with BBR is paced for ever.
        match may_change_to(system).and_then(|()| set_all(listeners, UNPACED)) {
            Ok(()) => Self { beyond: Some(system.into()) },
            Err(error) => {
                tracing::debug!(%error, "All callers are sent to as the system says: tcp_congestion_control cannot be changed");
                Self::default()
            }
        }
    }

    /// Sees to a connection that has just been accepted from `peer`.
    pub(super) fn apply(&self, tcp: &TcpStream, peer: IpAddr) {
        let Some(algorithm) = &self.beyond else { return };
        if is_within(peer, || Ok(tcp.local_addr()?.ip())) {
            return;
        }
        let socket = SockRef::from(tcp);
        // A route may have an algorithm of its own.
        if socket.tcp_congestion().is_ok_and(|name| name.starts_with(UNPACED))
            && let Err(error) = socket.set_tcp_congestion(algorithm)
        {
            tracing::warn!(%peer, %error, "A caller is sent to by reno, not as the system says");
        }
    }
}

/// Whether this process may take a connection from `UNPACED` to `algorithm`. Tried where it changes nothing.
fn may_change_to(algorithm: &[u8]) -> io::Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    socket.set_tcp_congestion(UNPACED)?;
    socket.set_tcp_congestion(algorithm)
}

fn set_all(listeners: &[TcpListener], algorithm: &[u8]) -> io::Result<()> {
    listeners.iter().try_for_each(|one| SockRef::from(one).set_tcp_congestion(algorithm))
}

/// Whether a connection between `peer` and `own` stays on this machine.
fn is_within(peer: IpAddr, own: impl FnOnce() -> io::Result<IpAddr>) -> bool {
    peer.to_canonical().is_loopback() || own().is_ok_and(|own| own == peer)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    /// What `pace` returns of two listeners, as two threads have them, and a connection that each has accepted, with
    /// its caller's end.
    async fn accepted<T>(
        pace: impl FnOnce(&[TcpListener]) -> T,
    ) -> (T, Vec<(TcpStream, TcpStream)>) {
        let bind = || {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            listener.set_nonblocking(true).unwrap();
            listener
        };
        let listeners = [bind(), bind()];
        let paced = pace(&listeners);
        let mut connections = Vec::new();
        for listener in listeners {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let caller = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            connections.push((listener.accept().await.unwrap().0, caller));
        }
        (paced, connections)
    }

    /// The algorithm of `socket`. The kernel ends the name with zeros.
    fn algorithm<'a>(socket: impl Into<SockRef<'a>>) -> String {
        let name = socket.into().tcp_congestion().unwrap();
        String::from_utf8(name).unwrap().trim_end_matches('\0').to_owned()
    }

    /// One that this system allows: another than reno, but where there is none. Then less is shown.
    fn other() -> String {
        let allowed =
            std::fs::read_to_string("/proc/sys/net/ipv4/tcp_allowed_congestion_control").unwrap();
        allowed.split_whitespace().find(|name| *name != "reno").unwrap_or("reno").to_owned()
    }

    #[tokio::test]
    async fn callers_are_sent_to_as_chosen() {
        for name in ["reno".to_owned(), other()] {
            let (pacing, connections) = accepted(|all| Pacing::chosen(all, &name)).await;
            for (accepted, _) in connections {
                pacing.as_ref().unwrap().apply(&accepted, Ipv4Addr::new(192, 0, 2, 1).into());
                assert_eq!(algorithm(&accepted), name);
            }
        }
    }

    #[tokio::test]
    async fn one_that_the_system_lacks_is_refused() {
        let (pacing, _) = accepted(|all| Pacing::chosen(all, "none-such")).await;
        let said = pacing.unwrap_err().to_string();
        assert!(
            said.starts_with("cannot use tcp_congestion_control=none-such: name one that "),
            "{said}"
        );
    }

    #[tokio::test]
    async fn callers_on_this_machine_are_not_paced_and_others_as_the_system_says() {
        let system = other();
        let pace = |all: &[TcpListener]| Pacing::unpaced_within(all, system.as_bytes());
        let (pacing, connections) = accepted(pace).await;
        for (accepted, _) in connections {
            pacing.apply(&accepted, Ipv4Addr::LOCALHOST.into());
            assert_eq!(algorithm(&accepted), "reno");
            pacing.apply(&accepted, Ipv4Addr::new(192, 0, 2, 1).into());
            assert_eq!(algorithm(&accepted), system);
        }
    }

    #[tokio::test]
    async fn where_the_algorithm_cannot_be_changed_back_it_is_not_changed() {
        let pace = |all: &[TcpListener]| {
            let system = algorithm(&all[0]);
            (Pacing::unpaced_within(all, b"none-such"), system)
        };
        let ((pacing, system), connections) = accepted(pace).await;
        for (accepted, _) in connections {
            pacing.apply(&accepted, Ipv4Addr::new(192, 0, 2, 1).into());
            assert_eq!(algorithm(&accepted), system);
        }
    }

    #[tokio::test]
    async fn what_the_system_says_holds_for_callers_on_this_machine_unless_it_is_bbr() {
        let pace = |all: &[TcpListener]| {
            let system = algorithm(&all[0]);
            Pacing::of_system(all);
            system
        };
        let (system, connections) = accepted(pace).await;
        let expect = if system.starts_with("bbr") { "reno" } else { &system };
        for (accepted, _) in connections {
            assert_eq!(algorithm(&accepted), expect);
        }
    }

    #[test]
    fn a_caller_is_on_this_machine_if_it_has_one_of_its_addresses() {
        let is_within =
            |peer: &str, own: &str| is_within(peer.parse().unwrap(), || Ok(own.parse().unwrap()));
        assert!(is_within("127.0.0.1", "127.0.0.1"));
        assert!(is_within("::1", "::1"));
        assert!(is_within("::ffff:127.0.0.1", "::ffff:127.0.0.1"));
        assert!(is_within("192.0.2.1", "192.0.2.1"));
        assert!(!is_within("192.0.2.1", "192.0.2.2"));
        assert!(!is_within("::ffff:192.0.2.1", "::ffff:192.0.2.2"));
    }
}
