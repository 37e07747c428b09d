//! The gateway under test: the binary itself, with the environment that the test gives it and no other.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex};

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::support::disk::Disk;
use crate::support::metrics::Metrics;
use crate::support::provider::Provider;
use crate::support::wire::{self, Answer, Wire};
use crate::support::{eventually, within};

/// A running gateway. Killed when dropped.
pub(crate) struct Gateway {
    pub(crate) address: SocketAddr,
    pub(crate) metrics_address: SocketAddr,
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
}

/// How a gateway is to be started.
pub(crate) struct Builder {
    role: &'static str,
    hosts: Option<PathBuf>,
    vars: Vec<(String, String)>,
    /// The process in whose mount namespace it runs.
    mounts_of: Option<u32>,
}

impl Builder {
    pub(crate) fn provider(self, provider: &Provider) -> Self {
        self.var("functions_provider_url", provider.url())
    }

    /// One of its settings, by its variable.
    pub(crate) fn var(mut self, name: &str, value: impl ToString) -> Self {
        self.vars.push((name.to_owned(), value.to_string()));
        self
    }

    /// Has it see the file systems that are mounted on `disk`.
    pub(crate) fn on(self, disk: &Disk) -> Self {
        Self { mounts_of: Some(disk.process()), ..self }
    }

    /// Names and addresses that it finds in `file` instead of in /etc/hosts.
    pub(crate) fn hosts(mut self, file: &Path) -> Self {
        self.hosts = Some(file.to_owned());
        self
    }

    /// Starts it, and returns once it serves.
    pub(crate) async fn start(self) -> Gateway {
        let on_disk = command_in(self.mounts_of);
        let mut child = self
            .hosts
            .as_deref()
            .map_or(on_disk, command_with_hosts)
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
        let serving = || log.lock().unwrap().iter().find_map(|line| addresses(line));
        eventually("the gateway serves", async || {
            let ended = child.try_wait().unwrap();
            assert!(ended.is_none(), "ended with {ended:?}: {:?}", log.lock().unwrap());
            serving().is_some()
        })
        .await;
        let (address, metrics_address) = serving().unwrap();
        Gateway { address, metrics_address, child, log }
    }

    /// Starts one that is expected to end by itself, and returns how it did.
    pub(crate) async fn output(self, arguments: &[&str]) -> Output {
        let output = command().envs(self.vars).args(arguments).kill_on_drop(true).output();
        within("a start that fails", output).await.unwrap()
    }
}

impl Gateway {
    /// A gateway with every default but for its ports.
    pub(crate) fn builder() -> Builder {
        let builder = Builder { role: "serve", vars: Vec::new(), hosts: None, mounts_of: None };
        builder
            .var("listen_address", "127.0.0.1")
            .var("port", "0")
            .var("metrics_port", "0")
            .var("log_format", "json")
            .var("threads", "2")
            // Nothing listens there: counts are left out at once.
            .var("faas_prometheus_host", "127.0.0.1")
            .var("faas_prometheus_port", "1")
            .var("function_namespace", "fn")
    }

    /// A worker, whose one port is that of its numbers.
    pub(crate) fn worker() -> Builder {
        let builder = Builder { role: "worker", vars: Vec::new(), hosts: None, mounts_of: None };
        builder
            .var("listen_address", "127.0.0.1")
            .var("worker_metrics_port", "0")
            .var("log_format", "json")
            .var("function_namespace", "fn")
    }

    /// A process provider, whose state is in `state`.
    pub(crate) fn process_provider(state: &Path) -> Builder {
        let builder =
            Builder { role: "provider process", vars: Vec::new(), hosts: None, mounts_of: None };
        builder
            .var("provider_port", "0")
            .var("state_dir", state.display())
            .var("log_format", "json")
            .var("PATH", "/usr/local/bin:/usr/bin:/bin")
    }

    /// One before `provider`, with every default.
    pub(crate) async fn before(provider: &Provider) -> Self {
        Self::builder().provider(provider).start().await
    }

    pub(crate) async fn connect(&self) -> Wire {
        Wire::connect(self.address).await
    }

    /// `GET target` on a connection of its own.
    pub(crate) async fn get(&self, target: &str) -> Answer {
        self.connect().await.get(target).await
    }

    /// `POST target` on a connection of its own.
    pub(crate) async fn post(&self, target: &str, body: &str) -> Answer {
        self.connect().await.ask(wire::post(target, body)).await
    }

    /// Whether `/_/ready` says 200.
    pub(crate) async fn is_ready(&self) -> bool {
        self.get("/_/ready").await.status() == 200
    }

    pub(crate) async fn metrics(&self) -> Metrics {
        let answer = Wire::connect(self.metrics_address).await.get("/metrics").await;
        Metrics { text: answer.text().to_owned() }
    }

    /// Waits until the metrics are as `holds` wants them.
    #[track_caller]
    pub(crate) fn metrics_show(
        &self,
        what: &str,
        holds: impl Fn(&Metrics) -> bool,
    ) -> impl Future<Output = ()> {
        eventually(what, async move || holds(&self.metrics().await))
    }

    /// What it has logged so far.
    pub(crate) fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    /// Waits until a line of the log has `text`.
    pub(crate) async fn logs(&self, text: &str) {
        eventually(text, async || self.log().iter().any(|line| line.contains(text))).await;
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Waits for its end.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        within("the end of the gateway", self.child.wait()).await.unwrap()
    }

    /// Sends SIGTERM and waits for the end.
    pub(crate) async fn terminate(mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.ended().await
    }

    /// Has it die on the spot, and waits for the end.
    pub(crate) async fn kill(mut self) {
        self.signal(Signal::KILL);
        self.ended().await;
    }

    /// The most memory it has used so far, in bytes.
    pub(crate) fn peak_memory(&self) -> u64 {
        self.memory_of("VmHWM:")
    }

    /// The memory that it uses now, in bytes.
    pub(crate) fn memory(&self) -> u64 {
        self.memory_of("VmRSS:")
    }

    fn memory_of(&self, name: &str) -> u64 {
        let path = format!("/proc/{}/status", self.pid().as_raw_nonzero());
        let status = std::fs::read_to_string(path).unwrap();
        let value = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        value.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }

    /// How many files and sockets it has open.
    pub(crate) fn open_files(&self) -> usize {
        let path = format!("/proc/{}/fd", self.pid().as_raw_nonzero());
        std::fs::read_dir(path).unwrap().count()
    }

    /// Has its files grow to no more than `bytes`, if that is to be limited.
    pub(crate) fn limit_files(&self, bytes: Option<u64>) {
        use rustix::process::{Resource, Rlimit, prlimit};
        let limit = Rlimit { current: bytes, maximum: None };
        prlimit(Some(self.pid()), Resource::Fsize, limit).unwrap();
    }

    fn pid(&self) -> Pid {
        let id = self.child.id().expect("it runs");
        Pid::from_raw(id.try_into().unwrap()).unwrap()
    }
}

/// The binary, with an environment that is empty.
pub(crate) fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gateway"));
    command.env_clear();
    command
}

/// The binary where `disk` is mounted.
pub(crate) fn command_on(disk: &Disk) -> Command {
    command_in(Some(disk.process()))
}

/// The binary in the mount namespace of another process. `nsenter` becomes the gateway.
fn command_in(process: Option<u32>) -> Command {
    let Some(process) = process else { return command() };
    let mut command = Command::new("nsenter");
    command.env_clear();
    command.arg(format!("--mount=/proc/{process}/ns/mnt")).arg(env!("CARGO_BIN_EXE_gateway"));
    command
}

/// The same, with another /etc/hosts.
fn command_with_hosts(file: &Path) -> Command {
    let mut command = Command::new("unshare");
    command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    let mounted = r#"mount --bind "$0" /etc/hosts && exec "$@""#;
    command.args(["--mount", "sh", "-c", mounted]).arg(file).arg(env!("CARGO_BIN_EXE_gateway"));
    command
}

/// The addresses in the log line that says where it serves.
fn addresses(line: &str) -> Option<(SocketAddr, SocketAddr)> {
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
