//! The real NATS Streaming server, in its own directory. It can be frozen for a while.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::support::connection::Connection;
use crate::support::eventually;
use crate::support::fake_stan::{CHANNEL, CLUSTER};
use crate::support::nats::free_port;

/// The version that `tests/tools/nats-streaming.sh` installs.
const VERSION: &str = "0.25.6";

/// The server. It is killed when this is dropped.
pub(crate) struct NatsStreaming {
    port: u16,
    monitoring: u16,
    process: Child,
    _directory: TempDir,
}

impl NatsStreaming {
    /// A running server that stores on disk.
    pub(crate) async fn start() -> Self {
        let directory = TempDir::new().unwrap();
        let (port, monitoring) = (free_port(), free_port());
        let store = directory.path().join("store");
        let process = Command::new(program())
            .args(["-a", "127.0.0.1", "-p", &port.to_string(), "-m", &monitoring.to_string()])
            .args(["-cid", CLUSTER, "-store", "file", "-dir"])
            .arg(store)
            .stdout(Stdio::null())
            .stderr(File::create(directory.path().join("log")).unwrap())
            .spawn();
        let process = process.expect("nats-streaming-server: see tests/tools/nats-streaming.sh");
        let server = Self { port, monitoring, process, _directory: directory };
        eventually("the server responds", async || {
            server.monitoring_data("serverz").await.is_some()
        })
        .await;
        server
    }

    pub(crate) fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Freezes the server; its connections stay open.
    pub(crate) fn freeze(&self) {
        self.signal(Signal::STOP);
        // The signal has been sent when `kill` returns, but each thread stops when it is next scheduled.
        let tasks = format!("/proc/{}/task", self.process.id());
        let all_stopped = || {
            std::fs::read_dir(&tasks).unwrap().flatten().all(|task| {
                let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
                stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
            })
        };
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !all_stopped() {
            assert!(std::time::Instant::now() < deadline, "the server does not stop");
            std::thread::yield_now();
        }
    }

    /// Resumes the server.
    pub(crate) fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.process.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// Number of messages that were ever stored in the channel of calls.
    pub(crate) async fn message_count(&self) -> u64 {
        let channel = self.monitoring_data(&format!("channelsz?channel={CHANNEL}")).await;
        channel.and_then(|channel| channel["last_seq"].as_u64()).unwrap_or_default()
    }

    /// Waits until workers have acknowledged `calls` calls, and no call is left.
    pub(crate) async fn wait_until_drained(&self, calls: u64) {
        eventually("all messages are acknowledged", async || {
            let channel =
                self.monitoring_data(&format!("channelsz?channel={CHANNEL}&subs=1")).await;
            let Some(channel) =
                channel.filter(|channel| channel["last_seq"].as_u64() >= Some(calls))
            else {
                return false;
            };
            // Each worker of the group has been sent a part.
            channel["subscriptions"].as_array().is_some_and(|workers| {
                workers.iter().any(|worker| worker["last_sent"] == channel["last_seq"])
                    && workers.iter().all(|worker| worker["pending_count"] == 0)
            })
        })
        .await;
    }

    /// Monitoring data of the server, if it responds.
    async fn monitoring_data(&self, what: &str) -> Option<Value> {
        let address = (std::net::Ipv4Addr::LOCALHOST, self.monitoring);
        tokio::net::TcpStream::connect(address).await.ok()?;
        let response =
            Connection::connect(address.into()).await.get(&format!("/streaming/{what}")).await;
        serde_json::from_str(response.text()).ok()
    }
}

impl Drop for NatsStreaming {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Path at which the script installs the server.
pub(crate) fn program() -> PathBuf {
    let folder = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let cache = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")));
    let server = format!("gateway-tests/nats-streaming-server-{VERSION}/nats-streaming-server");
    cache.unwrap_or_default().join(server)
}
