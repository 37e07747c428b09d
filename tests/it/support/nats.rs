//! A real nats-server with JetStream, in a directory of its own.

use std::net::{Ipv4Addr, TcpListener};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

/// The server. It is killed when this is dropped; what it has stored goes as well.
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

    /// A running server, with arguments of its own.
    pub(crate) fn start_with(arguments: &[&str]) -> Self {
        let mut nats = Self::away();
        nats.arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        nats.restart();
        nats
    }

    /// A server that has not been started.
    pub(crate) fn away() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        Self { directory: TempDir::new().unwrap(), port, arguments: Vec::new(), process: None }
    }

    pub(crate) fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Starts the server on what it has stored before.
    pub(crate) fn restart(&mut self) {
        assert!(self.process.is_none(), "it runs");
        let process = Command::new("nats-server")
            .args(["-a", "127.0.0.1", "-p", &self.port.to_string(), "-js", "-sd"])
            .arg(self.directory.path())
            .args(&self.arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        self.process = Some(process.expect("nats-server is needed for this test"));
    }

    /// Kills the server: it has no time for anything.
    pub(crate) fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }
}

impl Drop for Nats {
    fn drop(&mut self) {
        self.kill();
    }
}
