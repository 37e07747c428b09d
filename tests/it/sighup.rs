//! SIGHUP: with and without a terminal, for each role.

use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use tempfile::TempDir;
use tokio::process::Command;

use crate::stack_file::Up;
use crate::support::gateway::{Gateway, command};
use crate::support::provider::Provider;
use crate::support::{eventually, within};

const SERVER: &str = "functions:\n  server: {fprocess: perl hello.pl, environment: {mode: http}}\n";

fn with_server() -> TempDir {
    let directory = TempDir::new().unwrap();
    let hello = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/hello.pl");
    std::os::unix::fs::symlink(hello, directory.path().join("hello.pl")).unwrap();
    directory
}

#[tokio::test]
async fn without_a_terminal_sighup_reloads_the_stack_file() {
    let directory = TempDir::new().unwrap();
    let up = Up::start(directory.path(), "functions: {a: {fprocess: echo one}}", &["--once"]).await;
    up.write("functions: {b: {fprocess: echo two}}");
    up.signal(Signal::HUP);
    up.says("SIGHUP: reloading the stack file").await;
    up.answers("b", "two\n").await;
    up.answers("a", "404").await;
    up.write("functions: [");
    up.signal(Signal::HUP);
    up.says("is not applied: its functions").await;
    assert_eq!(up.call("b").await, "two\n");
}

/// Runs the program in its own terminal, which is closed when the program reports readiness on `out`. Prints the
/// program's exit status.
const IN_A_TERMINAL: &str = r#"
import os, pty, sys, time
how, out, *program = sys.argv[1:]
open(out, 'w').close()
child, terminal = pty.fork()
if child == 0:
    file = os.open(out, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.execv(program[0], program)
while b'Press Ctrl-C to stop.' not in open(out, 'rb').read():
    assert os.waitpid(child, os.WNOHANG) == (0, 0), open(out).read()
    time.sleep(0.02)
print(child, flush=True)
sys.stdin.readline()
if how == 'close':
    os.close(terminal)
else:
    os.kill(child, 1)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), flush=True)
"#;

#[tokio::test]
async fn with_a_terminal_sighup_stops_up_and_all_its_processes() {
    for how in ["close", "signal"] {
        let directory = with_server();
        std::fs::write(directory.path().join("stack.yaml"), SERVER).unwrap();
        let program = command().as_std().get_program().to_owned();
        let mut python = Command::new("python3")
            .args(["-c", IN_A_TERMINAL, how])
            .arg(directory.path().join("out"))
            .arg(program)
            .arg("up")
            .arg(directory.path().join("stack.yaml"))
            .env_clear()
            .envs([("port", "0"), ("metrics_port", "0"), ("provider_port", "0")])
            .env("PATH", "/usr/local/bin:/usr/bin:/bin")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let running = directory.path().join(".gateway/running");
        let replicas = || -> Vec<i32> {
            let entries = std::fs::read_dir(&running).into_iter().flatten();
            entries
                .filter_map(|entry| {
                    let name = entry.ok()?.file_name().into_string().ok()?;
                    name.split(|c: char| !c.is_ascii_digit()).find_map(|digits| digits.parse().ok())
                })
                .collect()
        };
        eventually("the replica runs", async || !replicas().is_empty()).await;
        let replicas = replicas();
        let alive = |id: i32| Pid::from_raw(id).is_some_and(|id| test_kill_process(id).is_ok());
        assert!(replicas.iter().all(|id| alive(*id)), "{replicas:?}");
        // Closing its input lets the script continue.
        drop(python.stdin.take());
        let output = within("the process exits", python.wait_with_output()).await.unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let log = std::fs::read_to_string(directory.path().join("out")).unwrap();
        assert_eq!(text.lines().nth(1), Some("0"), "{how}: {text} {log}");
        assert!(log.contains("Stopping: waiting for requests in flight"), "{how}: {log}");
        for id in replicas {
            eventually("no replica is left", async || !alive(id)).await;
        }
    }
}

#[tokio::test]
async fn sighup_reloads_the_credentials_of_serve() {
    let secrets = TempDir::new().unwrap();
    std::fs::write(secrets.path().join("basic-auth-user"), "admin").unwrap();
    std::fs::write(secrets.path().join("basic-auth-password"), "old").unwrap();
    let provider = Provider::manual();
    let gateway = Gateway::builder()
        .provider(&provider)
        .var("basic_auth", "true")
        .var("secret_mount_path", secrets.path().display())
        .start()
        .await;
    let status = async |password: &str| {
        let pair = base64::Engine::encode(
            &base64::engine::general_purpose::STANDARD,
            format!("admin:{password}"),
        );
        let header = format!("Authorization: Basic {pair}");
        gateway.request("GET", "/ui/", &[&header]).await.status()
    };
    assert_eq!((status("old").await, status("new").await), (200, 401));
    std::fs::write(secrets.path().join("basic-auth-password"), "new").unwrap();
    gateway.signal(Signal::HUP);
    eventually("the new password is accepted", async || status("new").await == 200).await;
    assert!(gateway.log().iter().any(|line| line.contains("SIGHUP: reloading files")));
}

#[tokio::test]
async fn an_ignored_hangup_stays_ignored() {
    let directory = TempDir::new().unwrap();
    let port = Stdio::null();
    let program = command().as_std().get_program().to_owned();
    std::fs::write(directory.path().join("stack.yaml"), "functions: {a: {fprocess: cat}}").unwrap();
    let file = |name: &str| std::fs::File::create(directory.path().join(name)).unwrap();
    let mut child = Command::new("nohup")
        .arg(program)
        .arg("up")
        .arg(directory.path().join("stack.yaml"))
        .env_clear()
        .envs([("port", "0"), ("metrics_port", "0"), ("provider_port", "0")])
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .stdin(port)
        .stdout(file("out"))
        .stderr(file("log"))
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let says = |name: &str, what: &str| {
        std::fs::read_to_string(directory.path().join(name)).unwrap().contains(what)
    };
    eventually("the process runs", async || says("out", "Press Ctrl-C to stop.")).await;
    let id = Pid::from_raw(child.id().unwrap().try_into().unwrap()).unwrap();
    kill_process(id, Signal::HUP).unwrap();
    kill_process(id, Signal::TERM).unwrap();
    assert!(within("the process exits", child.wait()).await.unwrap().success());
    assert!(!says("log", "SIGHUP") && says("log", "SIGTERM"));
}
