//! Listening sockets: one for each thread on the same address, so that the kernel deals connections out.

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener};

use socket2::{Domain, Protocol, Socket, Type};

use crate::config::listen::ListenAddress;

/// Connections that have not been accepted yet. Linux cuts it to `net.core.somaxconn`.
const BACKLOG: i32 = 8192;

/// Why an address cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub struct BindError {
    listen: ListenAddress,
    #[source]
    source: io::Error,
}

impl fmt::Display for BindError {
    /// Says what to change: which port is which setting's depends on the role.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ListenAddress { address, port_setting: port, host_setting: host } = self.listen;
        write!(f, "cannot listen on {address}: ")?;
        match (self.source.kind(), host) {
            (ErrorKind::AddrInUse, _) => {
                write!(f, "set {port} to a port that is free, or end what listens there")
            }
            (ErrorKind::PermissionDenied, _) => {
                write!(f, "set {port} to a port from 1024 on, or allow this user lower ones")
            }
            (ErrorKind::AddrNotAvailable, Some(host)) => {
                write!(f, "set {host} to an address that this machine has, or to 0.0.0.0 for all")
            }
            (_, Some(host)) => write!(f, "it is where {host} and {port} say"),
            (_, None) => write!(f, "it is where {port} says"),
        }
    }
}

/// Binds `count` listeners to the address of `listen`; port 0 picks a free one for all of them.
///
/// # Errors
/// `BindError` when the address is taken, even by a process that would share it.
pub fn bind(listen: ListenAddress, count: usize) -> Result<Vec<TcpListener>, BindError> {
    bind_all(listen.address, count).map_err(|source| BindError { listen, source })
}

fn bind_all(address: SocketAddr, count: usize) -> io::Result<Vec<TcpListener>> {
    // SO_REUSEPORT lets any process of this user join in. A first socket without it finds out whether the port is
    // free: two gateways that silently share one would be a riddle. A port that the kernel picks is nobody else's.
    if address.port() != 0 {
        socket(address)?.bind(&address.into())?;
    }
    let first = shared(address)?;
    let address = local_address(&first)?;
    let others = (1..count).map(|_| shared(address));
    std::iter::once(Ok(first))
        .chain(others)
        .map(|socket| {
            let socket = socket?;
            socket.listen(BACKLOG)?;
            Ok(socket.into())
        })
        .collect()
}

/// A socket that shares `address` with others of its kind.
fn shared(address: SocketAddr) -> io::Result<Socket> {
    let socket = socket(address)?;
    socket.set_reuse_port(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

fn socket(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // Connections of an earlier process that linger in TIME_WAIT are no reason to refuse.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn local_address(socket: &Socket) -> io::Result<SocketAddr> {
    socket.local_addr()?.as_socket().ok_or_else(|| io::Error::other("no socket address"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listen(address: impl Into<SocketAddr>) -> ListenAddress {
        ListenAddress {
            address: address.into(),
            port_setting: "metrics_port",
            host_setting: Some("listen_address"),
        }
    }

    #[test]
    fn several_listeners_share_a_port_and_a_second_process_is_refused() {
        let listeners = bind(listen(([127, 0, 0, 1], 0)), 3).unwrap();
        let address = listeners[0].local_addr().unwrap();
        assert!(listeners.iter().all(|l| l.local_addr().unwrap() == address));
        let said = bind(listen(address), 1).unwrap_err().to_string();
        assert!(said.starts_with(&format!("cannot listen on {address}: set metrics_port ")));
    }

    #[test]
    fn an_address_that_cannot_be_listened_on_leads_to_the_setting_that_chose_it() {
        let check = |kind: ErrorKind, host: Option<&'static str>, names: &str| {
            let listen = ListenAddress { host_setting: host, ..listen(([192, 0, 2, 1], 80)) };
            let said = BindError { listen, source: kind.into() }.to_string();
            assert_eq!(said, format!("cannot listen on 192.0.2.1:80: {names}"));
        };
        let host = Some("listen_address");
        let low = "set metrics_port to a port from 1024 on, or allow this user lower ones";
        check(ErrorKind::PermissionDenied, host, low);
        let not_ours =
            "set listen_address to an address that this machine has, or to 0.0.0.0 for all";
        check(ErrorKind::AddrNotAvailable, host, not_ours);
        check(ErrorKind::AddrNotAvailable, None, "it is where metrics_port says");
        check(ErrorKind::Other, host, "it is where listen_address and metrics_port say");
    }
}
