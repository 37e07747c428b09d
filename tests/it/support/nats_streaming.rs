//! The real server of NATS Streaming, in a directory of its own: it can be stopped for a while, as by a hypervisor.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::support::eventually;
use crate::support::fake_stan::{CHANNEL, CLUSTER};
use crate::support::nats::free_port;
use crate::support::wire::Wire;

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
        eventually("it serves", async || server.state("serverz").await.is_some()).await;
        server
    }

    pub(crate) fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Has the server stand still; its connections stay.
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

    /// Has it go on.
    pub(crate) fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.process.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// How many messages were ever stored in the channel of calls.
    pub(crate) async fn stored(&self) -> u64 {
        let channel = self.state(&format!("channelsz?channel={CHANNEL}")).await;
        channel.and_then(|channel| channel["last_seq"].as_u64()).unwrap_or_default()
    }

    /// Waits until workers have acknowledged this number of calls, and no call is left.
    pub(crate) async fn drained(&self, calls: u64) {
        eventually("all is acknowledged", async || {
            let channel = self.state(&format!("channelsz?channel={CHANNEL}&subs=1")).await;
            let Some(channel) = channel.filter(|it| it["last_seq"].as_u64() >= Some(calls)) else {
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

    /// What the server's monitoring says, if it answers.
    async fn state(&self, what: &str) -> Option<Value> {
        let address = (std::net::Ipv4Addr::LOCALHOST, self.monitoring);
        tokio::net::TcpStream::connect(address).await.ok()?;
        let answer = Wire::connect(address.into()).await.get(&format!("/streaming/{what}")).await;
        serde_json::from_str(answer.text()).ok()
    }
}

impl Drop for NatsStreaming {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Where the script puts the server.
pub(crate) fn program() -> PathBuf {
    let folder = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let cache = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")));
    let server = format!("gateway-tests/nats-streaming-server-{VERSION}/nats-streaming-server");
    cache.unwrap_or_default().join(server)
}
