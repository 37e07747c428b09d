//! Where a port is listened on, and by which settings, so that whoever cannot listen there can say what to change.
//! No I/O.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::config::reader::Reader;

/// An address to listen on.
#[derive(Clone, Copy, Debug)]
pub struct Listen {
    pub address: SocketAddr,
    /// The setting of its port.
    pub port: &'static str,
    /// The setting of its IP address; `None`: that cannot be chosen.
    pub host: Option<&'static str>,
}

/// The IP address that a role listens on.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    address: IpAddr,
    setting: Option<&'static str>,
}

impl Host {
    /// Loopback, whatever is set.
    pub const LOOPBACK: Self = Self { address: IpAddr::V4(Ipv4Addr::LOCALHOST), setting: None };

    /// The one that `setting` chooses.
    pub fn read(from: &mut Reader<'_>, setting: &'static str) -> Self {
        Self { address: from.address(setting), setting: Some(setting) }
    }

    /// The port of it that `setting` chooses.
    pub fn port(self, from: &mut Reader<'_>, setting: &'static str) -> Listen {
        let address = SocketAddr::new(self.address, from.port(setting));
        Listen { address, port: setting, host: self.setting }
    }
}
