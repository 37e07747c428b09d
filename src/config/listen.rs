//! Addresses to listen on, with the settings that chose them, for error messages. No I/O.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::config::reader::Reader;

/// An address to listen on.
#[derive(Clone, Copy, Debug)]
pub struct Listen {
    pub address: SocketAddr,
    /// Setting of the port.
    pub port: &'static str,
    /// Setting of the IP address; `None`: it is fixed.
    pub host: Option<&'static str>,
}

/// IP address that a role listens on.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    address: IpAddr,
    setting: Option<&'static str>,
}

impl Host {
    /// Loopback, independent of settings.
    pub const LOOPBACK: Self = Self { address: IpAddr::V4(Ipv4Addr::LOCALHOST), setting: None };

    /// Reads the IP address from `setting`.
    pub fn read(settings: &mut Reader<'_>, setting: &'static str) -> Self {
        Self { address: settings.address(setting), setting: Some(setting) }
    }

    /// Returns this IP address with the port from `setting`.
    pub fn port(self, settings: &mut Reader<'_>, setting: &'static str) -> Listen {
        let address = SocketAddr::new(self.address, settings.port(setting));
        Listen { address, port: setting, host: self.setting }
    }
}
