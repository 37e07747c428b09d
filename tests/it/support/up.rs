//! `gateway up` as users run it: the binary, with real functions.

use std::fs::File;
use std::net::SocketAddr;
use std::process::{ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdout};

use crate::support::gateway::command;
use crate::support::within;

/// A running `gateway up`. Killed when dropped.
pub(crate) struct Up {
    pub(crate) gateway: SocketAddr,
    pub(crate) metrics: SocketAddr,
    pub(crate) provider: SocketAddr,
    pub(crate) child: Child,
    _stdout: BufReader<ChildStdout>,
    pub(crate) state: TempDir,
}

impl Up {
    /// Starts it with the functions of `stack`.
    pub(crate) async fn start(stack: &str) -> Self {
        let state = TempDir::new().unwrap();
        let file = state.path().join("stack.yaml");
        std::fs::write(&file, stack).unwrap();
        let examples = concat!(env!("CARGO_MANIFEST_DIR"), "/examples");
        std::os::unix::fs::symlink(examples, state.path().join("examples")).unwrap();
        let hello = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/hello.pl");
        std::os::unix::fs::symlink(hello, state.path().join("hello.pl")).unwrap();
        let mut child = command()
            .arg("up")
            .arg(&file)
            .envs([("port", "0"), ("metrics_port", "0"), ("provider_port", "0")])
            .env("PATH", "/usr/local/bin:/usr/bin:/bin")
            // The state directory is in the current directory by default.
            .current_dir(state.path())
            .stdout(Stdio::piped())
            .stderr(File::create(state.path().join("log")).unwrap())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let (mut gateway, mut metrics, mut provider) = (None, None, None);
        while gateway.is_none() || provider.is_none() {
            let mut line = String::new();
            let read =
                within("the addresses are printed", stdout.read_line(&mut line)).await.unwrap();
            assert!(read > 0, "the process exited");
            let address = |name: &str| {
                let url = line.strip_prefix(name)?.split_whitespace().next()?;
                url.strip_prefix("http://")?.trim_end_matches("/metrics").parse().ok()
            };
            gateway = gateway.or_else(|| address("Gateway"));
            metrics = metrics.or_else(|| address("Metrics"));
            provider = provider.or_else(|| address("Provider"));
        }
        let (gateway, metrics) = (gateway.unwrap(), metrics.unwrap());
        Self { gateway, metrics, provider: provider.unwrap(), child, _stdout: stdout, state }
    }

    /// Sends SIGTERM. Returns the exit status.
    pub(crate) async fn terminate_and_wait(&mut self) -> ExitStatus {
        self.terminate();
        within("the process exits", self.child.wait()).await.unwrap()
    }

    pub(crate) fn terminate(&self) {
        let id = self.child.id().expect("the process runs");
        kill_process(Pid::from_raw(id.try_into().unwrap()).unwrap(), Signal::TERM).unwrap();
    }
}
