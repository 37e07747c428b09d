//! Functions whose processes end at their start: nobody waits for them, and only operators learn why.

use crate::support::workspace::{Place, Up};
use crate::support::{eventually, within};

/// Both lines go to one pipe: of two, either may be read first.
const CRASHES: &str = "functions: {crash: {\
    fprocess: sh -c 'echo start >> starts; echo one >&2; echo \"no such key\" >&2; exit 3', \
    environment: {mode: http}}}";
/// Crashes until the file `mended` is there.
const MENDED: &str = "{fprocess: sh -c 'test -e mended && exec perl server.pl; exit 3', \
    environment: {mode: http}}";
const SERVER: &str = r#"
use IO::Socket::INET;
my $s = IO::Socket::INET->new(LocalAddr => "127.0.0.1", LocalPort => $ENV{PORT}, Listen => 9, ReuseAddr => 1);
while (my $c = $s->accept) {
    while (<$c>) { last if /^\r?\n/ }
    print $c "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello";
}
"#;

/// A call waits for its function far longer than a test waits for a call.
async fn soon<T>(what: &str, answer: impl Future<Output = T>) -> T {
    within(what, answer).await
}

async fn crashed_thrice(up: &Up<'_>) {
    up.logged("crash", "next try in 400ms").await;
}

#[tokio::test]
async fn a_call_of_a_function_that_does_not_start_is_refused_at_once_and_this_machine_told_why() {
    let place = Place::new();
    let up = place.up(CRASHES, &[]).await;
    // It waits for the starts that are to come, and for no more.
    let answer = soon("the first call", up.get("/function/crash", "")).await;
    assert_eq!(answer.status(), 503, "{answer}");
    assert_eq!(answer.header("x-gateway-reason"), Some("does-not-start"));
    assert!(answer.header("retry-after").is_some());
    for part in ["crash.openfaas-fn does not start", "exit status: 3"] {
        assert!(answer.text().contains(part), "{answer}");
    }
    // The output is waited for only briefly: on a busy machine, that of one start may come too late.
    eventually("the last line is told", async || {
        let answer = soon("a call", up.get("/function/crash", "")).await;
        answer.text().contains("no such key")
    })
    .await;
    eventually("the provider tells it, too", async || {
        let status = up.get("/system/function/crash", "").await.json();
        let failure = &status["startFailure"];
        assert!(failure["starts"].as_u64().unwrap() >= 3, "{status}");
        assert_eq!(failure["reason"], "exit status: 3");
        failure["lastOutput"] == "no such key"
    })
    .await;
    // Clients of other machines are told no more than that.
    for headers in ["Origin: https://a.example\r\n", "X-Forwarded-For: 10.0.0.1\r\n"] {
        let answer = soon("a stranger's call", up.get("/function/crash", headers)).await;
        assert_eq!(answer.status(), 503, "{answer}");
        assert!(
            answer.text().starts_with("function crash.openfaas-fn does not start (call"),
            "{answer}"
        );
    }
    let queued = up.post("/async-function/crash", "").await;
    let state = format!("/async-function/{}", queued.header("x-call-id").unwrap());
    eventually("the queued call has failed", async || {
        let told = up.get(&state, "").await;
        assert!(!told.text().contains("no such key"), "{told}");
        told.json()["attempts"].as_u64() >= Some(1)
    })
    .await;
    up.terminated().await;
}

#[tokio::test]
async fn that_a_function_does_not_start_is_logged_once() {
    let place = Place::new();
    let up = place.up(CRASHES, &[]).await;
    crashed_thrice(&up).await;
    for _ in 0..5 {
        assert_eq!(soon("a call", up.get("/function/crash", "")).await.status(), 503);
    }
    let log = place.log();
    let told =
        log.lines().filter(|line| line.contains("does not start") && line.contains("starts="));
    assert_eq!(told.count(), 1, "{log}");
    up.terminated().await;
}

#[tokio::test]
async fn with_credentials_whoever_has_them_is_told_why() {
    let place = Place::new();
    std::fs::write(place.path("basic-auth-user"), "admin").unwrap();
    std::fs::write(place.path("basic-auth-password"), "secret").unwrap();
    let secrets = place.path("").display().to_string();
    let up = place.up(CRASHES, &[("basic_auth", "true"), ("secret_mount_path", &secrets)]).await;
    let answer = soon("a stranger's call", up.get("/function/crash", "")).await;
    assert_eq!(answer.status(), 503, "{answer}");
    assert!(
        answer.text().starts_with("function crash.openfaas-fn does not start (call"),
        "{answer}"
    );
    let wrong = "Authorization: Basic YWRtaW46d3Jvbmc=\r\n";
    let answer = soon("a guess", up.get("/function/crash", wrong)).await;
    assert!(!answer.text().contains("no such key"), "{answer}");
    let right = "Authorization: Basic YWRtaW46c2VjcmV0\r\n";
    eventually("an operator is told", async || {
        let answer = soon("an operator's call", up.get("/function/crash", right)).await;
        assert_eq!(answer.status(), 503, "{answer}");
        answer.text().contains("no such key")
    })
    .await;
    up.terminated().await;
}

#[tokio::test]
async fn a_function_that_starts_after_all_is_called() {
    let place = Place::new();
    std::fs::write(place.path("server.pl"), SERVER).unwrap();
    let up = place.up(&format!("functions: {{crash: {MENDED}}}"), &[]).await;
    crashed_thrice(&up).await;
    assert_eq!(soon("a call", up.get("/function/crash", "")).await.status(), 503);
    std::fs::write(place.path("mended"), "").unwrap();
    eventually("it is called", async || {
        let answer = soon("a call", up.get("/function/crash", "")).await;
        answer.status() == 200 && answer.text() == "hello"
    })
    .await;
    let status = up.get("/system/function/crash", "").await.json();
    assert!(status.get("startFailure").is_none(), "{status}");
    up.terminated().await;
}

#[tokio::test]
async fn a_new_version_is_waited_for_again_and_the_old_one_started_no_more() {
    let place = Place::new();
    std::fs::write(place.path("server.pl"), SERVER).unwrap();
    let up = place.up(CRASHES, &[]).await;
    crashed_thrice(&up).await;
    let starts = place.lines("starts");
    let deploy = serde_json::json!({
        "service": "crash",
        "envProcess": format!("sh -c 'cd {}; sleep 2; exec perl server.pl'", place.path("").display()),
        "envVars": { "mode": "http" },
    });
    let length = deploy.to_string().len();
    let request = format!(
        "POST /system/functions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{deploy}"
    );
    let mut operator = crate::support::wire::Wire::connect(up.gateway).await;
    assert_eq!(operator.ask(request).await.status(), 202);
    // It takes two seconds to start, in which the old one would be started again.
    let answer = up.post("/function/crash", "").await;
    assert_eq!((answer.status(), answer.text()), (200, "hello"), "{answer}");
    // The start that was under way when it was replaced may have been one more.
    assert!(place.lines("starts") <= starts + 1, "{starts}, {}", place.lines("starts"));
    up.terminated().await;
}

#[tokio::test]
async fn a_restart_leaves_unchanged_functions_alone() {
    let place = Place::new();
    std::fs::write(place.path("server.pl"), SERVER).unwrap();
    let counted =
        "fprocess: sh -c 'echo start >> served; exec perl server.pl', environment: {mode: http}";
    let changed = |version: u32| {
        format!(
            "functions: {{\
             served: {{{counted}}}, \
             crash: {{fprocess: sh -c 'exit 3', environment: {{mode: http}}}}, \
             other: {{fprocess: echo {version}}}}}"
        )
    };
    let up = place.up(&changed(1), &[]).await;
    assert_eq!(up.post("/function/served", "").await.text(), "hello");
    crashed_thrice(&up).await;
    up.terminated().await;
    assert_eq!(place.lines("served"), 1);

    let up = place.up(&changed(2), &[]).await;
    assert_eq!(up.post("/function/served", "").await.text(), "hello");
    assert_eq!(up.post("/function/other", "").await.text(), "2\n");
    // Every loop of starts has one pause of each length.
    crashed_thrice(&up).await;
    let first = |line: &String| line.contains("next try in 100ms");
    assert_eq!(up.logs("crash").await.iter().filter(|line| first(line)).count(), 1);
    assert_eq!(place.lines("served"), 2, "started once by each");
    up.terminated().await;
}

#[tokio::test]
async fn the_first_call_after_a_replica_was_killed_is_no_bad_gateway() {
    let place = Place::new();
    let server = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/process_provider/replica.py");
    let up = place
        .up(
            &format!(
                "functions: {{f: {{fprocess: python3 {server}, environment: {{mode: http}}}}}}"
            ),
            &[],
        )
        .await;
    for _ in 0..4 {
        let answer = up.get("/function/f", "").await;
        let pid: i32 = answer.text().parse().unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        eventually("it is gone", async || {
            let process = format!("/proc/{}", pid.as_raw_nonzero());
            let stat = std::fs::read_to_string(format!("{process}/stat"));
            // Its other threads hold its sockets until they have ended, too.
            let threads = std::fs::read_dir(format!("{process}/task")).map_or(0, Iterator::count);
            stat.map_or(true, |stat| stat.contains(") Z ") && threads <= 1)
        })
        .await;
        let answer = up.get("/function/f", "").await;
        assert_ne!(answer.status(), 502, "{answer}");
        eventually("another is there", async || up.get("/function/f", "").await.status() == 200)
            .await;
    }
    up.terminated().await;
}
