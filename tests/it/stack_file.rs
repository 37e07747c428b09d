//! The stack file of `gateway up`: what is refused, and how changes and secrets are applied.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::process::{Child, Command};

use crate::support::connection::{Connection, post};
use crate::support::gateway::command;
use crate::support::{eventually, within};

/// A running `gateway up` with the stack file `stack.yaml`, in a session without a terminal. Killed when dropped.
pub(crate) struct Up {
    pub(crate) child: Child,
    directory: PathBuf,
    gateway: SocketAddr,
}

impl Up {
    pub(crate) async fn start(directory: &Path, stack: &str, arguments: &[&str]) -> Self {
        std::fs::write(directory.join("stack.yaml"), stack).unwrap();
        Self::restart(directory, arguments).await
    }

    async fn restart(directory: &Path, arguments: &[&str]) -> Self {
        let file = |name: &str| std::fs::File::create(directory.join(name)).unwrap();
        // The tests themselves may run in a terminal.
        let gateway = command();
        let mut setsid = Command::new("setsid");
        setsid.arg(gateway.as_std().get_program()).arg("up").arg(directory.join("stack.yaml"));
        let child = setsid
            .args(arguments)
            .env_clear()
            .envs([("port", "0"), ("metrics_port", "0"), ("provider_port", "0")])
            .env("PATH", "/usr/local/bin:/usr/bin:/bin")
            .current_dir("/")
            .stdout(file("out"))
            .stderr(file("log"))
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let text = || std::fs::read_to_string(directory.join("out")).unwrap();
        let address = || {
            let out = text();
            let line = out.lines().find_map(|line| line.strip_prefix("Gateway"))?;
            line.split_whitespace().next()?.strip_prefix("http://")?.parse().ok()
        };
        eventually("the addresses are printed", async || address().is_some()).await;
        let gateway = address().unwrap();
        Self { child, directory: directory.to_owned(), gateway }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let id = self.child.id().expect("the process runs");
        kill_process(Pid::from_raw(id.try_into().unwrap()).unwrap(), signal).unwrap();
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.directory.join("log")).unwrap()
    }

    fn out(&self) -> String {
        std::fs::read_to_string(self.directory.join("out")).unwrap()
    }

    /// Replaces the stack file as editors do.
    pub(crate) fn write(&self, stack: &str) {
        let next = self.directory.join("stack.yaml~");
        std::fs::write(&next, stack).unwrap();
        std::fs::rename(next, self.directory.join("stack.yaml")).unwrap();
    }

    pub(crate) async fn says(&self, what: &str) {
        eventually(&format!("the log says {what:?}"), async || self.log().contains(what)).await;
    }

    /// The function's response to a call, or its status.
    pub(crate) async fn call(&self, function: &str) -> String {
        let mut client = Connection::connect(self.gateway).await;
        let response = client.exchange(post(&format!("/function/{function}"), "in")).await;
        if response.status() == 200 {
            response.text().to_owned()
        } else {
            response.status().to_string()
        }
    }

    pub(crate) async fn answers(&self, function: &str, expect: &str) {
        eventually(&format!("{function} answers {expect:?}"), async || {
            self.call(function).await == expect
        })
        .await;
    }

    async fn secret(&self, name: &str, value: &str) {
        let file = self.directory.join("value");
        std::fs::write(&file, value).unwrap();
        let set = command()
            .args(["secret", "set", name, "--from-file"])
            .arg(file)
            .arg("--state-dir")
            .arg(self.directory.join(".gateway"))
            .output();
        let output = within("the secret is set", set).await.unwrap();
        assert!(output.status.success(), "{output:?}");
    }
}

fn stack(functions: &[(&str, &str)]) -> String {
    let entry = |(name, command): &(&str, &str)| format!("  {name}: {{fprocess: {command}}}\n");
    format!("functions:\n{}", functions.iter().map(entry).collect::<String>())
}

#[tokio::test]
async fn stack_file_changes_are_applied_at_runtime() {
    let directory = TempDir::new().unwrap();
    let up = Up::start(
        directory.path(),
        &stack(&[("stays", "echo one"), ("changes", "echo one"), ("goes", "echo one")]),
        &[],
    )
    .await;
    assert_eq!(up.call("goes").await, "one\n");
    up.write(&stack(&[("stays", "echo one"), ("changes", "echo two"), ("comes", "cat")]));
    up.answers("comes", "in").await;
    up.answers("changes", "two\n").await;
    up.answers("goes", "404").await;
    assert_eq!(up.call("stays").await, "one\n");
    for line in ["Added comes", "Changed changes", "Deleted goes"] {
        up.says(line).await;
    }
    assert!(!up.log().contains("Changed stays"), "{}", up.log());
}

#[tokio::test]
async fn an_empty_or_incomplete_stack_file_removes_nothing() {
    let directory = TempDir::new().unwrap();
    let up =
        Up::start(directory.path(), &stack(&[("a", "echo one"), ("b", "echo one")]), &[]).await;
    for nothing in ["", "functions: {a: {fpro", "functions:\n"] {
        let before = up.log().matches("is not applied: its functions").count();
        up.write(nothing);
        eventually("the call is refused", async || {
            up.log().matches("is not applied: its functions").count() > before
        })
        .await;
        assert_eq!((up.call("a").await, up.call("b").await), ("one\n".into(), "one\n".into()));
    }
    // One function is invalid, one has changed, one is new.
    up.write(&stack(&[("a", "cat | cat"), ("b", "echo two"), ("c", "echo new")]));
    up.answers("b", "two\n").await;
    up.answers("c", "new\n").await;
    assert_eq!(up.call("a").await, "one\n");
    up.says("line 2: functions.a.fprocess: | needs a shell").await;
    up.says("Function a remains unchanged").await;
    std::fs::remove_file(directory.path().join("stack.yaml")).unwrap();
    up.says("Cannot read the stack file").await;
    assert_eq!(up.call("a").await, "one\n");
}

#[tokio::test]
async fn with_once_the_stack_file_is_not_watched() {
    let (directory, other) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let once = Up::start(directory.path(), &stack(&[("a", "echo one")]), &["--once"]).await;
    let follows = Up::start(other.path(), &stack(&[("a", "echo one")]), &[]).await;
    for up in [&once, &follows] {
        up.write(&stack(&[("a", "echo two")]));
    }
    // The file would have been reloaded by then.
    follows.answers("a", "two\n").await;
    // A signal reloads it anyway, and the loaded file is the current state.
    assert_eq!(once.call("a").await, "one\n");
    once.signal(Signal::HUP);
    once.answers("a", "two\n").await;
}

#[tokio::test]
async fn a_function_waits_for_its_secrets_while_others_start() {
    let directory = TempDir::new().unwrap();
    let text = "functions:\n  a: {fprocess: echo one}\n  b:\n    fprocess: sh -c 'cat $secrets_path/key'\n    secrets: [key, other]\n";
    let up = Up::start(directory.path(), text, &[]).await;
    assert_eq!((up.call("a").await, up.call("b").await), ("one\n".into(), "404".into()));
    let state = directory.path().canonicalize().unwrap().join(".gateway");
    for name in ["key", "other"] {
        let line = format!("  gateway secret set {name} --state-dir {}\n", state.display());
        assert!(up.out().contains(&line), "{line}: {}", up.out());
    }
    up.secret("key", "k1").await;
    up.secret("other", "o1").await;
    up.answers("b", "k1").await;
    // A new value reaches a deployed function.
    up.secret("key", "k2").await;
    up.answers("b", "k2").await;
}

#[tokio::test]
async fn a_reverted_change_no_longer_waits_for_its_secret() {
    let directory = TempDir::new().unwrap();
    let late = |name: &str| format!("  {name}: {{fprocess: echo two, secrets: [late]}}\n");
    let first = stack(&[("a", "echo one")]);
    let up = Up::start(directory.path(), &first, &[]).await;
    up.write(&format!("functions:\n{}", late("a")));
    up.says("is not deployed until its secrets exist").await;
    // The other function is deployed after this one, and shows that the secret was read.
    up.write(&format!("{}{}", stack(&[("a", "echo one"), ("b", "echo one")]), late("c")));
    up.answers("b", "one\n").await;
    up.secret("late", "s").await;
    up.answers("c", "two\n").await;
    assert_eq!(up.call("a").await, "one\n");
}

#[tokio::test]
async fn functions_removed_from_the_file_are_deleted_at_the_next_start() {
    let directory = TempDir::new().unwrap();
    let both = stack(&[("a", "echo one"), ("b", "echo one")]);
    let mut up = Up::start(directory.path(), &both, &[]).await;
    let body = r#"{"service":"by-hand","envProcess":"echo hand"}"#;
    let mut client = Connection::connect(up.gateway).await;
    let request = format!(
        "POST /system/functions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    assert_eq!(client.exchange(request).await.status(), 202);
    up.signal(Signal::TERM);
    assert!(within("the process exits", up.child.wait()).await.unwrap().success());
    up.write(&stack(&[("a", "echo one")]));
    let up = Up::restart(directory.path(), &[]).await;
    assert_eq!((up.call("a").await, up.call("b").await), ("one\n".into(), "404".into()));
    assert_eq!(up.call("by-hand").await, "hand\n");
}

#[tokio::test]
async fn commands_and_files_are_relative_to_the_stack_file() {
    let directory = TempDir::new().unwrap();
    std::fs::write(directory.path().join("said"), "hello").unwrap();
    std::fs::write(directory.path().join("run.sh"), "#!/bin/sh\ncat said\n").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(directory.path().join("run.sh"), mode).unwrap();
    let text = stack(&[("script", "./run.sh"), ("argument", "cat said")]);
    let up = Up::start(directory.path(), &text, &[]).await;
    assert_eq!(
        (up.call("script").await, up.call("argument").await),
        ("hello".into(), "hello".into())
    );
    // It was started from `/`, but keeps its state here.
    assert!(directory.path().join(".gateway/functions").is_dir());
}

#[tokio::test]
async fn all_errors_of_the_stack_file_are_reported_together() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("stack.yaml");
    let text = "functions:\n  a: {fproces: cat}\n  b: {fprocess: no-such-program}\n  a: {fprocess: cat}\n  \
                c: {fprocess: cat, environment: {mode: wasm}}\n  d: {fprocess: a > b}\n";
    std::fs::write(&file, text).unwrap();
    let up = command()
        .arg("up")
        .arg(&file)
        .envs([("port", "0"), ("metrics_port", "0"), ("provider_port", "0")])
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = within("the process exits", up).await.unwrap();
    assert!(!output.status.success());
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    for expect in [
        "line 2: functions.a.fproces: unknown key: did you mean fprocess?",
        "line 3: functions.b: envProcess: \"no-such-program\" is not a program",
        "line 4: functions.a: duplicate key, first on line 2",
        "line 5: functions.c: envVars: mode",
        "line 6: functions.d.fprocess: > needs a shell",
    ] {
        assert!(stderr.contains(expect), "{expect}: {stderr}");
    }
    assert!(!stderr.contains("serde") && !stderr.contains("Stack {"), "{stderr}");
}
