//! Processes that a function starts end with its call, even in another process group: by a cgroup, or by the provider
//! as subreaper of orphans.

use crate::support::workspace::{Up, Workspace};
use crate::support::{eventually, report_skipped};

/// Each command leaves a process in its own session that writes its id to the file `pid`.
const ESCAPES: [(&str, &str); 5] = [
    // The parent has ended before the process.
    ("orphan", "(setsid sh leave.sh >&- 2>&- <&- &); until [ -s pid ]; do :; done; echo ok"),
    // The parent is the function.
    ("child", "setsid sh leave.sh >&- 2>&- <&- & until [ -s pid ]; do :; done; echo ok"),
    // The environment is empty.
    (
        "bare",
        "(env -i /usr/bin/setsid /bin/sh leave.sh >&- 2>&- <&- &); until [ -s pid ]; do :; done; echo ok",
    ),
    // The first thread has ended.
    ("thread", "(setsid python3 leave.py >&- 2>&- <&- &); until [ -s pid ]; do :; done; echo ok"),
    // The process keeps the output open.
    ("open", "(setsid sh leave.sh &); until [ -s pid ]; do :; done; echo ok"),
];
const LEAVE: &str = "echo $$ > pid; exec /bin/sleep 1000";
const LEAVE_AS_THREAD: &str = r#"
import ctypes, os, threading, time
def stay():
    while open("/proc/self/stat").read().rsplit(") ", 1)[1][0] != "Z":
        time.sleep(0.001)
    with open("pid", "w") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(1000)
threading.Thread(target=stay).start()
ctypes.CDLL(None).pthread_exit(None)
"#;
/// Ends its call when the process that it started has been frozen.
const STUCK_FUNCTION: &str = "functions:
  stuck:
    fprocess: sh -c '(setsid sh leave.sh >&- 2>&- <&- &); until [ -e frozen ]; do :; done; echo ok'
  other:
    fprocess: cat
";

fn stack(workspace: &Workspace) -> String {
    std::fs::write(workspace.path("leave.sh"), LEAVE).unwrap();
    std::fs::write(workspace.path("leave.py"), LEAVE_AS_THREAD).unwrap();
    let mut stack = "functions:\n".to_owned();
    for (name, script) in ESCAPES {
        stack += &format!("  {name}:\n    fprocess: sh -c '{script}'\n");
    }
    stack += "  slow:\n    fprocess: sh -c '(setsid sh leave.sh &); sleep 1000'\n    \
              environment: {exec_timeout: 3s}\n";
    let server = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/process_provider/replica.py");
    stack += &format!(
        "  server:\n    fprocess: sh -c '(setsid sh leave.sh &); exec python3 {server}'\n    \
         environment: {{mode: http}}\n    labels: {{com.openfaas.scale.zero: \"false\"}}\n"
    );
    stack
}

/// The id of the process that a function has left; no other process writes the file from here on.
async fn escaped_pid(workspace: &Workspace) -> u32 {
    let mut pid = None;
    eventually("a process is running", async || {
        let text = std::fs::read_to_string(workspace.path("pid")).unwrap_or_default();
        pid = text.strip_suffix('\n').and_then(|text| text.parse().ok());
        pid.is_some()
    })
    .await;
    std::fs::remove_file(workspace.path("pid")).unwrap();
    pid.unwrap()
}

/// State and parent of a process.
fn stat(pid: u32) -> Option<(String, u32)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit(") ").next()?.split(' ');
    Some((fields.next()?.to_owned(), fields.next()?.parse().ok()?))
}

/// Returns whether any thread of a process runs: a process looks ended once its first thread has ended.
fn is_running(pid: u32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
    let stats =
        threads.filter_map(|thread| std::fs::read_to_string(thread.ok()?.path().join("stat")).ok());
    stats.filter_map(|stat| stat.rsplit(") ").next()?.chars().next()).any(|state| state != 'Z')
}

async fn wait_until_gone(pid: u32) {
    eventually("the process has ended", async || !is_running(pid)).await;
}

/// Number of children of `parent` that have ended and are not reaped.
fn zombies(parent: u32) -> usize {
    let ids = std::fs::read_dir("/proc").unwrap();
    let ids = ids.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    ids.filter_map(stat).filter(|(state, of)| state == "Z" && *of == parent).count()
}

async fn assert_nothing_outlives_its_call(workspace: &Workspace, up: Up<'_>) {
    // It starts with the server, and lives as long as the server does.
    let daemon = escaped_pid(workspace).await;
    for (name, _) in ESCAPES {
        let response = up.post(&format!("/function/{name}"), "").await;
        assert_eq!((response.status(), response.text()), (200, "ok\n"), "{name}");
        wait_until_gone(escaped_pid(workspace).await).await;
    }
    assert_eq!(up.post("/function/slow", "").await.status(), 504);
    wait_until_gone(escaped_pid(workspace).await).await;
    assert_eq!(up.get("/function/server", "").await.status(), 200);
    assert!(
        stat(daemon).is_some_and(|(state, _)| state != "Z"),
        "the process of a replica was killed"
    );
    eventually("orphans are reaped", async || zombies(up.id()) == 0).await;
    up.terminate_and_wait().await;
    wait_until_gone(daemon).await;
}

#[tokio::test]
async fn no_process_outlives_its_call_with_cgroups() {
    let workspace = Workspace::new();
    let stack = stack(&workspace);
    let up = workspace.up(&stack, &[]).await;
    let log = workspace.log();
    let way = "Processes started by functions are";
    // Without cgroups v2, the other way is used.
    assert_eq!(log.matches(way).count(), 1, "{log}");
    assert_nothing_outlives_its_call(&workspace, up).await;
}

#[tokio::test]
async fn no_process_outlives_its_call_without_cgroups() {
    let workspace = Workspace::new();
    let stack = stack(&workspace);
    let up = workspace.up_without_cgroups(&stack).await;
    let log = workspace.log();
    assert!(log.contains("adopted and killed by this process"), "{log}");
    assert_nothing_outlives_its_call(&workspace, up).await;
}

/// The directory of a provider's cgroups; `None` where none can be created.
fn cgroups(workspace: &Workspace) -> Option<std::path::PathBuf> {
    let log = workspace.log();
    let (_, line) = log.split_once("are killed with the cgroup of their call")?;
    Some(line.split_once("path=")?.1.split_whitespace().next()?.into())
}

#[tokio::test]
async fn cgroups_are_removed_at_the_end_or_at_the_next_start() {
    const CAT: &str = "functions: {cat: {fprocess: cat}}";
    let (killed, next) = (Workspace::new(), Workspace::new());
    let up = killed.up(CAT, &[]).await;
    assert_eq!(up.post("/function/cat", "hello").await.text(), "hello");
    let Some(left) = cgroups(&killed) else {
        return report_skipped("the provider can create no cgroup");
    };
    assert!(left.join("0").exists());
    up.kill_and_wait().await;
    // Another provider has no record of it.
    let up = next.up(CAT, &[]).await;
    assert!(!left.exists());
    let own = cgroups(&next).unwrap();
    assert_eq!(up.post("/function/cat", "hello").await.text(), "hello");
    assert!(own.exists());
    up.terminate_and_wait().await;
    assert!(!own.exists());
}

/// A cgroup in which the kernel freezes processes, so that they cannot even be killed.
struct Freezer(std::path::PathBuf);

impl Freezer {
    /// Requires cgroups v1; `None` without them.
    fn new() -> Option<Self> {
        let name = format!("gateway-test-{}", std::process::id());
        let path = std::path::Path::new("/sys/fs/cgroup/freezer").join(name);
        std::fs::create_dir(&path).ok()?;
        Some(Self(path))
    }

    fn freeze(&self, pid: u32) {
        std::fs::write(self.0.join("cgroup.procs"), pid.to_string()).unwrap();
        std::fs::write(self.0.join("freezer.state"), "FROZEN").unwrap();
    }

    fn thaw(&self) {
        std::fs::write(self.0.join("freezer.state"), "THAWED").unwrap();
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        self.thaw();
        // Processes in the cgroup need a moment to end.
        for _ in 0..1000 {
            if std::fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

#[tokio::test]
async fn a_process_that_cannot_be_killed_does_not_block_other_calls() {
    let workspace = Workspace::new();
    let Some(freezer) = Freezer::new() else {
        return report_skipped("there is no freezer of cgroups v1");
    };
    std::fs::write(workspace.path("leave.sh"), LEAVE).unwrap();
    let up = workspace.up_without_cgroups(STUCK_FUNCTION).await;
    let warnings =
        || workspace.log().matches("Killed descendants of a function do not exit").count();
    let freeze = async {
        freezer.freeze(escaped_pid(&workspace).await);
        std::fs::write(workspace.path("frozen"), "").unwrap();
    };
    let (response, ()) = tokio::join!(up.post("/function/stuck", ""), freeze);
    assert_eq!((response.text(), warnings()), ("ok\n", 1));
    let response = up.post("/function/other", "hello").await;
    assert_eq!((response.text(), warnings()), ("hello", 1));
    drop(freezer);
    up.terminate_and_wait().await;
}
