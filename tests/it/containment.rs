//! What a function starts ends with its call, however it has left its process group: by a cgroup, or by the provider as
//! the parent of orphans.

use crate::support::eventually;
use crate::support::place::{Place, Up};

/// Each leaves a process that writes its id to the file `pid`, and is in a session of its own.
const LEAVERS: [(&str, &str); 4] = [
    // Its parent has ended before it.
    ("orphan", "(setsid sh leave.sh >&- 2>&- <&- &); until [ -s pid ]; do :; done; echo ok"),
    // Its parent is the function.
    ("child", "setsid sh leave.sh >&- 2>&- <&- & until [ -s pid ]; do :; done; echo ok"),
    // It has nothing in its environment.
    (
        "bare",
        "(env -i /usr/bin/setsid /bin/sh leave.sh >&- 2>&- <&- &); until [ -s pid ]; do :; done; echo ok",
    ),
    // It holds the output open.
    ("open", "(setsid sh leave.sh &); until [ -s pid ]; do :; done; echo ok"),
];
const LEAVE: &str = "echo $$ > pid; exec /bin/sleep 1000";

fn stack(place: &Place) -> String {
    std::fs::write(place.path("leave.sh"), LEAVE).unwrap();
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

async fn gone(pid: u32) {
    eventually("it is gone", async || stat(pid).is_none_or(|(state, _)| state == "Z")).await;
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
