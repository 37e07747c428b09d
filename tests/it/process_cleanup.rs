//! What a function starts ends with its call, however it has left its process group: by a cgroup, or by the provider as
//! the parent of orphans.

use crate::support::eventually;
use crate::support::workspace::{Place, Up};

/// Each leaves a process that writes its id to the file `pid`, and is in a session of its own.
const LEAVERS: [(&str, &str); 5] = [
    // Its parent has ended before it.
    ("orphan", "(setsid sh leave.sh >&- 2>&- <&- &); until [ -s pid ]; do :; done; echo ok"),
    // Its parent is the function.
    ("child", "setsid sh leave.sh >&- 2>&- <&- & until [ -s pid ]; do :; done; echo ok"),
    // It has nothing in its environment.
    (
        "bare",
        "(env -i /usr/bin/setsid /bin/sh leave.sh >&- 2>&- <&- &); until [ -s pid ]; do :; done; echo ok",
    ),
    // Its first thread has ended.
    ("thread", "(setsid python3 leave.py >&- 2>&- <&- &); until [ -s pid ]; do :; done; echo ok"),
    // It holds the output open.
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
/// Ends its call when what it has started has been frozen.
const STUCK: &str = "functions:
  stuck:
    fprocess: sh -c '(setsid sh leave.sh >&- 2>&- <&- &); until [ -e frozen ]; do :; done; echo ok'
  other:
    fprocess: cat
";

fn stack(place: &Place) -> String {
    std::fs::write(place.path("leave.sh"), LEAVE).unwrap();
    std::fs::write(place.path("leave.py"), LEAVE_AS_THREAD).unwrap();
    let mut stack = "functions:\n".to_owned();
    for (name, script) in LEAVERS {
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

/// The process that a function has left, whose id nobody else writes from here on.
async fn left(place: &Place) -> u32 {
    let mut pid = None;
    eventually("a process is left", async || {
        let text = std::fs::read_to_string(place.path("pid")).unwrap_or_default();
        pid = text.strip_suffix('\n').and_then(|text| text.parse().ok());
        pid.is_some()
    })
    .await;
    std::fs::remove_file(place.path("pid")).unwrap();
    pid.unwrap()
}

/// State and parent of a process.
fn stat(pid: u32) -> Option<(String, u32)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit(") ").next()?.split(' ');
    Some((fields.next()?.to_owned(), fields.next()?.parse().ok()?))
}

/// Whether any thread of a process runs: the process itself looks ended once its first thread has.
fn runs(pid: u32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
    let stats = threads.filter_map(|it| std::fs::read_to_string(it.ok()?.path().join("stat")).ok());
    stats.filter_map(|stat| stat.rsplit(") ").next()?.chars().next()).any(|state| state != 'Z')
}

async fn gone(pid: u32) {
    eventually("it is gone", async || !runs(pid)).await;
}

/// Children of `parent` that have ended and nobody has waited for.
fn zombies(parent: u32) -> usize {
    let ids = std::fs::read_dir("/proc").unwrap();
    let ids = ids.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    ids.filter_map(stat).filter(|(state, of)| state == "Z" && *of == parent).count()
}

async fn nothing_outlives_its_call(place: &Place, up: Up<'_>) {
    // It starts with the server, and lives as long as that does.
    let daemon = left(place).await;
    for (name, _) in LEAVERS {
        let answer = up.post(&format!("/function/{name}"), "").await;
        assert_eq!((answer.status(), answer.text()), (200, "ok\n"), "{name}");
        gone(left(place).await).await;
    }
    assert_eq!(up.post("/function/slow", "").await.status(), 504);
    gone(left(place).await).await;
    assert_eq!(up.get("/function/server", "").await.status(), 200);
    assert!(
        stat(daemon).is_some_and(|(state, _)| state != "Z"),
        "what a replica has started is gone"
    );
    eventually("orphans are buried", async || zombies(up.id()) == 0).await;
    up.terminated().await;
    gone(daemon).await;
}

#[tokio::test]
async fn nothing_outlives_its_call_where_there_are_cgroups() {
    let place = Place::new();
    let stack = stack(&place);
    let up = place.up(&stack, &[]).await;
    let told = place.log();
    let way = "What functions start is ended by";
    // On a machine without cgroups of version 2, it is the other way again.
    assert_eq!(told.matches(way).count(), 1, "{told}");
    nothing_outlives_its_call(&place, up).await;
}

#[tokio::test]
async fn nothing_outlives_its_call_where_there_are_none() {
    let place = Place::new();
    let stack = stack(&place);
    let up = place.up_without_cgroups(&stack).await;
    let told = place.log();
    assert!(told.contains("ended by this process, which adopts it"), "{told}");
    nothing_outlives_its_call(&place, up).await;
}

/// The directory of a provider's cgroups; `None` where none can be created.
fn cgroups(place: &Place) -> Option<std::path::PathBuf> {
    let log = place.log();
    let (_, line) = log.split_once("is ended by a cgroup of each call")?;
    Some(line.split_once("path=")?.1.split_whitespace().next()?.into())
}

#[tokio::test]
async fn the_cgroups_of_a_provider_go_with_it_or_with_the_start_of_another() {
    const CAT: &str = "functions: {cat: {fprocess: cat}}";
    let (killed, next) = (Place::new(), Place::new());
    let up = killed.up(CAT, &[]).await;
    assert_eq!(up.post("/function/cat", "hello").await.text(), "hello");
    let Some(left) = cgroups(&killed) else { return };
    assert!(left.join("0").exists());
    up.killed().await;
    // Another one has no record of it.
    let up = next.up(CAT, &[]).await;
    assert!(!left.exists());
    let own = cgroups(&next).unwrap();
    assert_eq!(up.post("/function/cat", "hello").await.text(), "hello");
    assert!(own.exists());
    up.terminated().await;
    assert!(!own.exists());
}

/// A cgroup in which the kernel holds processes so that they cannot even be killed.
struct Freezer(std::path::PathBuf);

impl Freezer {
    /// `None` where there is none: it takes cgroups of version 1.
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
        // What was in there takes a moment to end.
        for _ in 0..1000 {
            if std::fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

#[tokio::test]
async fn what_does_not_end_holds_up_no_other_call() {
    let place = Place::new();
    let Some(freezer) = Freezer::new() else { return };
    std::fs::write(place.path("leave.sh"), LEAVE).unwrap();
    let up = place.up_without_cgroups(STUCK).await;
    let warnings = || place.log().matches("What a function has started does not end").count();
    let freeze = async {
        freezer.freeze(left(&place).await);
        std::fs::write(place.path("frozen"), "").unwrap();
    };
    let (answer, ()) = tokio::join!(up.post("/function/stuck", ""), freeze);
    assert_eq!((answer.text(), warnings()), ("ok\n", 1));
    let answer = up.post("/function/other", "hello").await;
    assert_eq!((answer.text(), warnings()), ("hello", 1));
    drop(freezer);
    up.terminated().await;
}
