//! `gateway healthcheck [URL]`: for exec probes in an image without a shell or curl.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};

use gateway_base::base_url::BaseUrl;

/// Limit for connecting, and for each read and write.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

/// Requests `url` once.
///
/// # Errors
/// There is no response in time, or its status is not 2xx.
pub fn run(url: &str) -> anyhow::Result<()> {
    probe(url, PROBE_TIMEOUT)
}

fn probe(url: &str, timeout: Duration) -> anyhow::Result<()> {
    let parsed = BaseUrl::parse(url).filter(|url| !url.tls);
    let Some(parsed) = parsed else { bail!("{url:?} is not an http URL") };
    let path = if parsed.path.is_empty() { "/" } else { parsed.path.as_str() };
    let address = (parsed.host(), parsed.port())
        .to_socket_addrs()
        .with_context(|| format!("cannot resolve {}", parsed.host()))?
        .next()
        .with_context(|| format!("{} has no address", parsed.host()))?;
    let mut tcp = TcpStream::connect_timeout(&address, timeout)
        .with_context(|| format!("cannot connect to {address}"))?;
    tcp.set_read_timeout(Some(timeout))?;
    tcp.set_write_timeout(Some(timeout))?;
    let host = &parsed.authority;
    write!(tcp, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
    // Reads only the start of the status line.
    let mut status_line = [0; 12];
    tcp.read_exact(&mut status_line).map_err(|error| read_error(error, timeout))?;
    let status = String::from_utf8_lossy(&status_line[9..]).into_owned();
    ensure!(status_line.starts_with(b"HTTP/1.") && status.starts_with('2'), "status {status}");
    Ok(())
}

fn read_error(error: io::Error, timeout: Duration) -> anyhow::Error {
    match error.kind() {
        // The system's message for this error is "try again".
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            anyhow!("no response within {timeout:?}")
        }
        _ => anyhow::Error::new(error).context("no response"),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn the_error_of_a_probe_without_response_has_the_timeout() {
        // The kernel accepts connections for the listener, as for a process that hangs.
        let hanging = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/_/healthz", hanging.local_addr().unwrap());
        let error = probe(&url, Duration::from_millis(50)).unwrap_err();
        assert_eq!(format!("{error:#}"), "no response within 50ms");
    }
}
