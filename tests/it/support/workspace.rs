//! `gateway up` with settings, and a state directory that outlives the process.

use std::fs::File;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdout, Command};

use crate::support::connection::{Connection, Response, post};
use crate::support::gateway::command;
use crate::support::{eventually, within};

/// Directory with the stack file, the state, the log, and the files that functions write.
pub(crate) struct Workspace(TempDir);

/// A running `gateway up`. Killed when dropped.
pub(crate) struct Up<'a> {
    pub(crate) gateway: SocketAddr,
    workspace: &'a Workspace,
    child: Child,
    _stdout: BufReader<ChildStdout>,
}

impl Workspace {
    pub(crate) fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Number of lines that functions have written to the file `name`.
    pub(crate) fn line_count(&self, name: &str) -> usize {
        std::fs::read_to_string(self.path(name)).unwrap_or_default().lines().count()
    }

    /// Starts it with the functions of `stack` and further settings.
    pub(crate) async fn up(&self, stack: &str, vars: &[(&str, &str)]) -> Up<'_> {
        self.run(command(), stack, vars).await
    }

    /// Starts it where no cgroup can be created.
    pub(crate) async fn up_without_cgroups(&self, stack: &str) -> Up<'_> {
        let script = r#"mount -t tmpfs none /sys/fs/cgroup && exec "$0" "$@""#;
        let mut command = Command::new("unshare");
        command.env_clear().args(["--mount", "sh", "-c", script, env!("CARGO_BIN_EXE_gateway")]);
        self.run(command, stack, &[]).await
    }

    async fn run(&self, mut command: Command, stack: &str, vars: &[(&str, &str)]) -> Up<'_> {
        std::fs::write(self.path("stack.yaml"), stack).unwrap();
        let mut child = command
            .args(["up", "stack.yaml"])
            .envs([("port", "0"), ("metrics_port", "0"), ("provider_port", "0")])
            .env("PATH", "/usr/local/bin:/usr/bin:/bin")
            .envs(vars.iter().copied())
            .current_dir(self.0.path())
            .stdout(Stdio::piped())
            .stderr(File::create(self.path("log")).unwrap())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut gateway = None;
        while gateway.is_none() {
            let mut line = String::new();
            let read =
                within("the addresses are printed", stdout.read_line(&mut line)).await.unwrap();
            assert!(read > 0, "it ended: {}", self.log());
            let address = |name: &str| {
                let url = line.strip_prefix(name)?.split_whitespace().next()?;
                url.strip_prefix("http://")?.parse().ok()
            };
            gateway = gateway.or_else(|| address("Gateway"));
        }
        Up { gateway: gateway.unwrap(), workspace: self, child, _stdout: stdout }
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }
}

impl Up<'_> {
    pub(crate) fn id(&self) -> u32 {
        self.child.id().expect("the process runs")
    }

    /// Sends a request for `target` with `headers` on a new connection.
    pub(crate) async fn get(&self, target: &str, headers: &str) -> Response {
        let mut client = Connection::connect(self.gateway).await;
        client.exchange(format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n")).await
    }

    pub(crate) async fn post(&self, target: &str, body: &str) -> Response {
        Connection::connect(self.gateway).await.exchange(post(target, body)).await
    }

    /// Texts of the log lines of `function` and its replicas.
    pub(crate) async fn logs(&self, function: &str) -> Vec<String> {
        let response = self.get(&format!("/system/logs?name={function}"), "").await;
        let text = |line: &str| {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            line["text"].as_str().unwrap().to_owned()
        };
        response.text().lines().map(text).collect()
    }

    /// Waits until `function` has logged a line with `text`.
    pub(crate) async fn wait_for_log(&self, function: &str, text: &str) {
        eventually(text, async || self.logs(function).await.iter().any(|line| line.contains(text)))
            .await;
    }

    /// Kills it, and waits until it is gone.
    pub(crate) async fn kill_and_wait(mut self) {
        within("the process exits", self.child.kill()).await.unwrap();
    }

    /// Sends SIGTERM, and waits for the process to exit.
    pub(crate) async fn terminate_and_wait(mut self) {
        let id = self.child.id().expect("the process runs");
        kill_process(Pid::from_raw(id.try_into().unwrap()).unwrap(), Signal::TERM).unwrap();
        let status = within("the process exits", self.child.wait()).await.unwrap();
        assert!(status.success(), "{}", self.workspace.log());
    }
}
