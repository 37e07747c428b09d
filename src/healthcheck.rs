//! `gateway healthcheck [URL]`: for exec probes in an image without a shell or curl.

use std::io::{Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use anyhow::{Context, bail, ensure};

use crate::config::base_url::BaseUrl;

/// A probe that takes longer has failed.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Asks `url`.
///
/// # Errors
/// When nothing answers there, or not with 2xx.
pub fn run(url: &str) -> anyhow::Result<()> {
    let parsed = BaseUrl::parse(url).filter(|url| !url.tls);
    let Some(parsed) = parsed else { bail!("{url:?} is not an http URL") };
    let path = if parsed.path.is_empty() { "/" } else { parsed.path.as_str() };
    let address = (parsed.host(), parsed.port())
        .to_socket_addrs()
        .with_context(|| format!("cannot resolve {}", parsed.host()))?
        .next()
        .with_context(|| format!("{} has no address", parsed.host()))?;
    let mut tcp = TcpStream::connect_timeout(&address, TIMEOUT)
        .with_context(|| format!("cannot connect to {address}"))?;
    tcp.set_read_timeout(Some(TIMEOUT))?;
    tcp.set_write_timeout(Some(TIMEOUT))?;
    let host = &parsed.authority;
    write!(tcp, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
    // The status line is all that matters.
    let mut head = [0; 12];
    tcp.read_exact(&mut head).context("no answer")?;
    let status = String::from_utf8_lossy(&head[9..]).into_owned();
    ensure!(head.starts_with(b"HTTP/1.") && status.starts_with('2'), "status {status}");
    Ok(())
}
