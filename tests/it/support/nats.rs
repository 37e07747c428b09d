//! A real nats-server with JetStream, in its own directory.

use std::fs::File;
use std::net::{Ipv4Addr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};

use tempfile::TempDir;

/// The server. It is killed, and its data deleted, when this is dropped.
pub(crate) struct Nats {
    directory: TempDir,
    port: u16,
    arguments: Vec<String>,
    process: Option<Child>,
}

impl Nats {
    /// A running server.
    pub(crate) fn start() -> Self {
        Self::start_with(&[])
    }

    /// A running server with additional arguments.
    pub(crate) fn start_with(arguments: &[&str]) -> Self {
        let mut nats = Self::not_started();
        nats.arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        nats.restart();
        nats
    }

    /// A server that has not been started.
    pub(crate) fn not_started() -> Self {
        let port = free_port();
        Self { directory: TempDir::new().unwrap(), port, arguments: Vec::new(), process: None }
    }

    pub(crate) fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Starts the server on its stored data.
    pub(crate) fn restart(&mut self) {
        assert!(self.process.is_none(), "it runs");
        let process = Command::new("nats-server")
            .args(["-a", "127.0.0.1", "-p", &self.port.to_string(), "-js", "-sd"])
            .arg(self.directory.path())
            .args(&self.arguments)
            .stdout(Stdio::null())
            .stderr(File::create(self.log()).unwrap())
            .spawn();
        self.process = Some(process.expect("nats-server is needed for this test"));
    }

    /// Kills the server without a graceful shutdown.
    pub(crate) fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let ended = process.try_wait().unwrap();
            process.kill().unwrap();
            process.wait().unwrap();
            if let Some(ended) = ended
                && !std::thread::panicking()
            {
                let log = std::fs::read_to_string(self.log()).unwrap_or_default();
                panic!("nats-server ended by itself: {ended}\n{log}");
            }
        }
    }

    fn log(&self) -> std::path::PathBuf {
        self.directory.path().join("log")
    }
}

/// A port without a listener. It is outside of the range of ephemeral ports: a connection could occupy one of those
/// before a killed server is restarted.
pub(crate) fn free_port() -> u16 {
    const FIRST: u16 = 20_000;
    const COUNT: u16 = 12_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Concurrent test processes begin at different ports.
    let begin = u16::try_from(std::process::id() * 61 % u32::from(COUNT)).unwrap();
    (0..COUNT)
        .map(|_| FIRST + (begin + NEXT.fetch_add(1, Relaxed) % COUNT) % COUNT)
        .find(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok())
        .expect("a free port")
}

impl Drop for Nats {
    fn drop(&mut self) {
        self.kill();
    }
}
