//! Addresses to listen on, with the settings that chose them, for error messages. No I/O.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::config::reader::SettingsReader;
use gateway_http::server::listener::ListenAddress;

/// IP address that a role listens on.
#[derive(Clone, Copy, Debug)]
pub struct ListenHost {
    address: IpAddr,
    setting: Option<&'static str>,
}

impl ListenHost {
    /// Loopback, independent of settings.
    pub const LOOPBACK: Self = Self { address: IpAddr::V4(Ipv4Addr::LOCALHOST), setting: None };

    /// Reads the IP address from `setting`.
    pub fn parse(settings: &mut SettingsReader<'_>, setting: &'static str) -> Self {
        Self { address: settings.address(setting), setting: Some(setting) }
    }

    /// Returns this IP address with the port from `setting`.
    pub fn with_port(
        self,
        settings: &mut SettingsReader<'_>,
        setting: &'static str,
    ) -> ListenAddress {
        let address = SocketAddr::new(self.address, settings.port(setting));
        ListenAddress { address, port_setting: setting, host_setting: self.setting }
    }
}
