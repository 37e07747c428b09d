//! Listening sockets: one for each thread on the same address, so that the kernel distributes connections.

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{SocketAddr, TcpListener};

use socket2::{Domain, Protocol, Socket, Type};

/// Maximum number of connections that wait to be accepted. Linux limits it to `net.core.somaxconn`.
const BACKLOG: i32 = 8192;

/// An address to listen on.
#[derive(Clone, Copy, Debug)]
pub struct ListenAddress {
    pub address: SocketAddr,
    /// Setting of the port.
    pub port_setting: &'static str,
    /// Setting of the IP address; `None`: it is fixed.
    pub host_setting: Option<&'static str>,
}

/// A listener could not be bound to its address.
#[derive(Debug, thiserror::Error)]
pub struct BindError {
    listen: ListenAddress,
    #[source]
    source: io::Error,
}

impl fmt::Display for BindError {
    /// Names the setting to change, which depends on the role of the process.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ListenAddress { address, port_setting: port, host_setting: host } = self.listen;
        write!(f, "cannot listen on {address}: ")?;
        match (self.source.kind(), host) {
            (ErrorKind::AddrInUse, _) => {
                write!(
                    f,
                    "set {port} to a port that is free, or stop the process that listens there"
                )
            }
            (ErrorKind::PermissionDenied, _) => {
                write!(f, "set {port} to at least 1024, or allow this user to bind lower ports")
            }
            (ErrorKind::AddrNotAvailable, Some(host)) => {
                write!(f, "set {host} to an address of this machine, or to 0.0.0.0 for all")
            }
            (_, Some(host)) => write!(f, "the address is set by {host} and {port}"),
            (_, None) => write!(f, "the address is set by {port}"),
        }
    }
}

/// Binds `count` listeners to the address of `listen`; for port 0, all of them to the same free port.
///
/// # Errors
/// `BindError` when the address cannot be bound, for example because it is in use, even by a process that shares it.
/// Its text names the setting to change.
pub fn bind(listen: ListenAddress, count: usize) -> Result<Vec<TcpListener>, BindError> {
    bind_all(listen.address, count).map_err(|source| BindError { listen, source })
}

fn bind_all(address: SocketAddr, count: usize) -> io::Result<Vec<TcpListener>> {
    // SO_REUSEPORT lets any process of this user share the port. A first socket without it checks that the port is
    // free, because two gateways that share a port unnoticed are hard to diagnose. A port that the kernel picks is
    // free.
    if address.port() != 0 {
        new_socket(address)?.bind(&address.into())?;
    }
    let first = bind_shared(address)?;
    let address = local_address(&first)?;
    let others = (1..count).map(|_| bind_shared(address));
    std::iter::once(Ok(first))
        .chain(others)
        .map(|socket| {
            let socket = socket?;
            socket.listen(BACKLOG)?;
            Ok(socket.into())
        })
        .collect()
}

/// Returns a socket bound to `address` with SO_REUSEPORT.
fn bind_shared(address: SocketAddr) -> io::Result<Socket> {
    let socket = new_socket(address)?;
    socket.set_reuse_port(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

fn new_socket(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // Allow the port while connections of an earlier process are in TIME_WAIT.
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
    fn several_listeners_share_a_port_that_a_second_process_cannot_bind() {
        let listeners = bind(listen(([127, 0, 0, 1], 0)), 3).unwrap();
        let address = listeners[0].local_addr().unwrap();
        assert!(listeners.iter().all(|l| l.local_addr().unwrap() == address));
        let text = bind(listen(address), 1).unwrap_err().to_string();
        assert!(text.starts_with(&format!("cannot listen on {address}: set metrics_port ")));
    }

    #[test]
    fn a_bind_error_names_the_setting_to_change() {
        let check = |kind: ErrorKind, host: Option<&'static str>, names: &str| {
            let listen = ListenAddress { host_setting: host, ..listen(([192, 0, 2, 1], 80)) };
            let text = BindError { listen, source: kind.into() }.to_string();
            assert_eq!(text, format!("cannot listen on 192.0.2.1:80: {names}"));
        };
        let host = Some("listen_address");
        let low = "set metrics_port to at least 1024, or allow this user to bind lower ports";
        check(ErrorKind::PermissionDenied, host, low);
        let not_ours = "set listen_address to an address of this machine, or to 0.0.0.0 for all";
        check(ErrorKind::AddrNotAvailable, host, not_ours);
        check(ErrorKind::AddrNotAvailable, None, "the address is set by metrics_port");
        check(ErrorKind::Other, host, "the address is set by listen_address and metrics_port");
    }
}
