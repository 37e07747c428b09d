//! The gateway under test: the binary itself, with only the environment that the test sets.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex};

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::support::connection::{self, Connection, Response};
use crate::support::disk::Disk;
use crate::support::metrics::Metrics;
use crate::support::provider::Provider;
use crate::support::{eventually, within};

/// A running gateway. Killed when dropped.
pub(crate) struct Gateway {
    pub(crate) address: SocketAddr,
    pub(crate) metrics_address: SocketAddr,
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
}

/// Configuration of a gateway to start.
pub(crate) struct Builder {
    role: &'static str,
    hosts: Option<PathBuf>,
    vars: Vec<(String, String)>,
    /// Process in whose mount namespace it runs.
    mount_namespace_of: Option<u32>,
}

impl Builder {
    pub(crate) fn provider(self, provider: &Provider) -> Self {
        self.var("functions_provider_url", provider.url())
    }

    /// Sets a setting by its environment variable.
    pub(crate) fn var(mut self, name: &str, value: impl ToString) -> Self {
        self.vars.push((name.to_owned(), value.to_string()));
        self
    }

    /// Runs the gateway where `disk` is mounted.
    pub(crate) fn on_disk(self, disk: &Disk) -> Self {
        Self { mount_namespace_of: Some(disk.namespace_pid()), ..self }
    }

    /// Uses `file` instead of /etc/hosts.
    pub(crate) fn hosts_file(mut self, file: &Path) -> Self {
        self.hosts = Some(file.to_owned());
        self
    }

    /// Starts the gateway, and returns once it serves.
    pub(crate) async fn start(self) -> Gateway {
        let on_disk = command_in_namespace(self.mount_namespace_of);
        let mut child = self
            .hosts
            .as_deref()
            .map_or(on_disk, command_with_hosts_file)
            .args(self.role.split(' '))
            .envs(self.vars)
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let log: Arc<Mutex<Vec<String>>> = Arc::default();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let collected = Arc::clone(&log);
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                collected.lock().unwrap().push(line);
            }
        });
        let serving = || log.lock().unwrap().iter().find_map(|line| listen_addresses(line));
        eventually("the gateway serves", async || {
            let ended = child.try_wait().unwrap();
            assert!(ended.is_none(), "ended with {ended:?}: {:?}", log.lock().unwrap());
            serving().is_some()
        })
        .await;
        let (address, metrics_address) = serving().unwrap();
        Gateway { address, metrics_address, child, log }
    }

    /// Starts a process that is expected to exit by itself, and returns its output.
    pub(crate) async fn run_to_exit(self, arguments: &[&str]) -> Output {
        let output = command().envs(self.vars).args(arguments).kill_on_drop(true).output();
        within("the process exits", output).await.unwrap()
    }
}

impl Gateway {
    /// A gateway with defaults, except for its ports.
    pub(crate) fn builder() -> Builder {
        let builder =
            Builder { role: "serve", vars: Vec::new(), hosts: None, mount_namespace_of: None };
        builder
            .var("listen_address", "127.0.0.1")
            .var("port", "0")
            .var("metrics_port", "0")
            .var("log_format", "json")
            .var("threads", "2")
            // Nothing listens there: counts are omitted immediately.
            .var("faas_prometheus_host", "127.0.0.1")
            .var("faas_prometheus_port", "1")
            .var("function_namespace", "fn")
    }

    /// A worker, whose only port is that of its metrics.
    pub(crate) fn worker() -> Builder {
        let builder =
            Builder { role: "worker", vars: Vec::new(), hosts: None, mount_namespace_of: None };
        builder
            .var("listen_address", "127.0.0.1")
            .var("worker_metrics_port", "0")
            .var("log_format", "json")
            .var("function_namespace", "fn")
    }

    /// A process provider with its state in `state`.
    pub(crate) fn process_provider(state: &Path) -> Builder {
        let builder = Builder {
            role: "provider process",
            vars: Vec::new(),
            hosts: None,
            mount_namespace_of: None,
        };
        builder
            .var("provider_port", "0")
            .var("state_dir", state.display())
            .var("log_format", "json")
            .var("PATH", "/usr/local/bin:/usr/bin:/bin")
    }

    /// Starts a gateway with defaults in front of `provider`.
    pub(crate) async fn in_front_of(provider: &Provider) -> Self {
        Self::builder().provider(provider).start().await
    }

    pub(crate) async fn connect(&self) -> Connection {
        Connection::connect(self.address).await
    }

    /// `GET target` on a new connection.
    pub(crate) async fn get(&self, target: &str) -> Response {
        self.connect().await.get(target).await
    }

    /// `POST target` on a new connection.
    pub(crate) async fn post(&self, target: &str, body: &str) -> Response {
        self.connect().await.exchange(connection::post(target, body)).await
    }

    /// Returns whether the status of `/_/ready` is 200.
    pub(crate) async fn is_ready(&self) -> bool {
        self.get("/_/ready").await.status() == 200
    }

    pub(crate) async fn metrics(&self) -> Metrics {
        let response = Connection::connect(self.metrics_address).await.get("/metrics").await;
        Metrics { text: response.text().to_owned() }
    }

    /// Waits until `holds` accepts the metrics.
    #[track_caller]
    pub(crate) fn wait_for_metric(
        &self,
        what: &str,
        holds: impl Fn(&Metrics) -> bool,
    ) -> impl Future<Output = ()> {
        eventually(what, async move || holds(&self.metrics().await))
    }

    /// The log lines so far.
    pub(crate) fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    /// Waits until a log line contains `text`.
    pub(crate) async fn wait_for_log(&self, text: &str) {
        eventually(text, async || self.log().iter().any(|line| line.contains(text))).await;
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Waits for the process to exit.
    pub(crate) async fn wait_for_exit(&mut self) -> ExitStatus {
        within("the gateway exits", self.child.wait()).await.unwrap()
    }

    /// Sends SIGTERM and waits for the process to exit.
    pub(crate) async fn terminate(mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.wait_for_exit().await
    }

    /// Sends SIGKILL and waits for the process to exit.
    pub(crate) async fn kill(mut self) {
        self.signal(Signal::KILL);
        self.wait_for_exit().await;
    }

    /// Peak memory so far, in bytes.
    pub(crate) fn peak_memory(&self) -> u64 {
        self.memory_of("VmHWM:")
    }

    /// Current memory, in bytes.
    pub(crate) fn memory(&self) -> u64 {
        self.memory_of("VmRSS:")
    }

    fn memory_of(&self, name: &str) -> u64 {
        let path = format!("/proc/{}/status", self.pid().as_raw_nonzero());
        let status = std::fs::read_to_string(path).unwrap();
        let value = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        value.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }

    /// Number of open files and sockets.
    pub(crate) fn open_files(&self) -> usize {
        let path = format!("/proc/{}/fd", self.pid().as_raw_nonzero());
        std::fs::read_dir(path).unwrap().count()
    }

    /// Limits the size of its files to `bytes`; `None` removes the limit.
    pub(crate) fn limit_files(&self, bytes: Option<u64>) {
        use rustix::process::{Resource, Rlimit, prlimit};
        let limit = Rlimit { current: bytes, maximum: None };
        prlimit(Some(self.pid()), Resource::Fsize, limit).unwrap();
    }

    fn pid(&self) -> Pid {
        let id = self.child.id().expect("the process runs");
        Pid::from_raw(id.try_into().unwrap()).unwrap()
    }
}

/// The binary, with an empty environment.
pub(crate) fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gateway"));
    command.env_clear();
    command
}

/// The binary where `disk` is mounted.
pub(crate) fn command_on_disk(disk: &Disk) -> Command {
    command_in_namespace(Some(disk.namespace_pid()))
}

/// The binary in the mount namespace of another process. `nsenter` becomes the gateway.
fn command_in_namespace(process: Option<u32>) -> Command {
    let Some(process) = process else { return command() };
    let mut command = Command::new("nsenter");
    command.env_clear();
    command.arg(format!("--mount=/proc/{process}/ns/mnt")).arg(env!("CARGO_BIN_EXE_gateway"));
    command
}

/// The binary with another /etc/hosts.
fn command_with_hosts_file(file: &Path) -> Command {
    let mut command = Command::new("unshare");
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let mounted = r#"mount --bind "$0" /etc/hosts && exec "$@""#;
    command.args(["--mount", "sh", "-c", mounted]).arg(file).arg(env!("CARGO_BIN_EXE_gateway"));
    command
}

/// The addresses in the log line that announces them.
fn listen_addresses(line: &str) -> Option<(SocketAddr, SocketAddr)> {
    let line: serde_json::Value = serde_json::from_str(line).ok()?;
    let fields = line.get("fields")?;
    let address = |name: &str| fields[name].as_str()?.parse().ok();
    match fields["message"].as_str()? {
        // A provider has one port.
        "Serving" => Some((address("address")?, address("metrics").or(address("address"))?)),
        "Executing queued calls" => Some((address("metrics")?, address("metrics")?)),
        _ => None,
    }
}
