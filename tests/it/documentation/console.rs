//! Runs `console` blocks: `$ ` begins a command, other lines are its expected output, in which `…` stands for any text.
//!
//! A comment in the line before a block says more:
//!
//! - `not run: REASON`: the block cannot run here;
//! - `file: NAME`: the block is written to this file first;
//! - `server`: its last command runs until the next server of the page is started;
//! - `with: COMMAND`: this server is started first.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::page::Block;

const START_TIMEOUT: Duration = Duration::from_secs(60);
const COMMAND_TIMEOUT_SECONDS: &str = "60";
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Settings of ports, with the defaults that pages name.
const PORTS: [(&str, &str); 4] = [
    ("port", ":8080"),
    ("provider_port", ":8081"),
    ("metrics_port", ":8082"),
    ("worker_metrics_port", ":8083"),
];

/// Returns free ports below the range from which the system assigns ports to connections. No other test uses these, so
/// that a port is still free when a server starts.
fn free_ports(count: usize) -> Vec<u16> {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap();
    let first: u16 = range.split_whitespace().next().unwrap().parse().unwrap();
    let is_free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    let ports: Vec<u16> = (10_000..first).rev().filter(is_free).take(count).collect();
    assert_eq!(ports.len(), count, "no free ports below {first}");
    ports
}

/// A folder in which the blocks of one page run, one after the other.
pub(super) struct Workspace {
    folder: TempDir,
    ports: Vec<u16>,
    server: Option<Child>,
}

impl Workspace {
    pub(super) fn new(root: &Path) -> Self {
        let folder = TempDir::new().unwrap();
        fs::create_dir(folder.path().join("bin")).unwrap();
        symlink(env!("CARGO_BIN_EXE_gateway"), folder.path().join("bin/gateway")).unwrap();
        symlink(root.join("examples"), folder.path().join("examples")).unwrap();
        Self { ports: free_ports(PORTS.len()), folder, server: None }
    }

    /// # Errors
    /// What is wrong with the block.
    pub(super) fn run(&mut self, block: &Block) -> Result<(), String> {
        let (word, argument) = block.comment.split_once(": ").unwrap_or((&block.comment, ""));
        if word == "file" {
            return fs::write(self.folder.path().join(argument), &block.text)
                .map_err(|error| error.to_string());
        }
        if block.language != "console" || (word == "not run" && !argument.is_empty()) {
            return Ok(());
        }
        if word == "with" {
            self.start(argument)?;
        }
        let mut commands = commands(&block.text)?;
        let server = if word == "server" { commands.pop() } else { None };
        for (command, expected) in &commands {
            let found = self.output(command)?;
            let expected = self.with_ports(expected);
            if !expected.is_empty() && !matches(&expected, &found) {
                return Err(format!("`{command}` prints\n{found}\ninstead of\n{expected}"));
            }
        }
        server.map_or(Ok(()), |(command, _)| self.start(&command))
    }

    fn with_ports(&self, text: &str) -> String {
        let text = text.replace("target/quick/gateway", "gateway");
        let text = text.replace("make up", "gateway up examples/stack.yaml");
        let pairs = PORTS.iter().zip(&self.ports);
        pairs.fold(text, |text, ((_, default), port)| text.replace(default, &format!(":{port}")))
    }

    fn shell(&self, command: &str) -> Command {
        let mut shell = Command::new("timeout");
        shell.args([
            "--foreground",
            COMMAND_TIMEOUT_SECONDS,
            "bash",
            "-c",
            &self.with_ports(command),
        ]);
        self.prepare(&mut shell);
        shell
    }

    fn prepare(&self, shell: &mut Command) {
        let path = std::env::var("PATH").unwrap_or_default();
        let bin = self.folder.path().join("bin");
        shell.current_dir(&self.folder).env_clear().stdin(Stdio::null());
        shell.env("PATH", format!("{}:{path}", bin.display())).env("HOME", self.folder.path());
        shell.env("state_dir", self.folder.path().join("state"));
        shell.envs(PORTS.iter().zip(&self.ports).map(|((name, _), port)| (name, port.to_string())));
    }

    fn output(&self, command: &str) -> Result<String, String> {
        let done = self.shell(command).output().map_err(|error| error.to_string())?;
        let found = String::from_utf8_lossy(&done.stdout).replace('\r', "").trim().to_owned();
        match done.status.success() {
            true => Ok(found),
            false => Err(format!(
                "`{command}`: {}\n{found}{}",
                done.status,
                String::from_utf8_lossy(&done.stderr)
            )),
        }
    }

    fn start(&mut self, command: &str) -> Result<(), String> {
        self.stop();
        let mut shell = Command::new("bash");
        shell.args(["-c", &self.with_ports(command)]);
        self.prepare(&mut shell);
        let log =
            fs::File::create(self.folder.path().join("log")).map_err(|error| error.to_string())?;
        shell.stdout(log.try_clone().map_err(|error| error.to_string())?).stderr(log);
        let server = self.server.insert(shell.spawn().map_err(|error| error.to_string())?);
        let end = Instant::now() + START_TIMEOUT;
        while !answers(self.ports[0]) {
            if server.try_wait().is_ok_and(|status| status.is_some()) || Instant::now() > end {
                let log = fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
                return Err(format!("`{command}` does not serve: {log}"));
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        Ok(())
    }

    fn stop(&mut self) {
        if let Some(mut server) = self.server.take() {
            let _ = Command::new("kill").arg(server.id().to_string()).status();
            let _ = server.wait();
        }
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Commands of a block, each with its expected output.
fn commands(text: &str) -> Result<Vec<(String, String)>, String> {
    let mut commands: Vec<(String, String)> = Vec::new();
    for line in text.lines() {
        if let Some(command) = line.strip_prefix("$ ") {
            commands.push((command.to_owned(), String::new()));
            continue;
        }
        let (command, expected) =
            commands.last_mut().ok_or(format!("{line:?} is not a command"))?;
        if command.ends_with('\\') {
            command.push('\n');
            command.push_str(line);
        } else {
            expected.push_str(line);
            expected.push('\n');
        }
    }
    Ok(commands
        .into_iter()
        .map(|(command, expected)| (command, expected.trim().to_owned()))
        .collect())
}

/// Returns whether `found` is `expected`, in which `…` stands for any text.
fn matches(expected: &str, found: &str) -> bool {
    let parts: Vec<&str> = expected.split('…').collect();
    let [first, middle @ .., last] = &parts[..] else { return expected == found };
    let Some(mut rest) = found.strip_prefix(first) else { return false };
    for part in middle {
        let Some((_, behind)) = rest.split_once(part) else { return false };
        rest = behind;
    }
    rest.ends_with(last)
}

/// Returns whether the gateway at `port` is alive.
fn answers(port: u16) -> bool {
    let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) else { return false };
    let mut response = String::new();
    let _ = stream.write_all(b"GET /_/healthz HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n");
    let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
    stream.read_to_string(&mut response).is_ok()
        && response.starts_with("HTTP/1.")
        && response.contains(" 200 ")
}
