//! Functions whose processes exit at startup: requests do not wait for them, and only operators receive the reason.

use crate::support::workspace::{Up, Workspace};
use crate::support::{eventually, within};

/// Both lines are written to one pipe; either may be read first.
const CRASHES: &str = "functions: {crash: {\
    fprocess: sh -c 'echo start >> starts; echo one >&2; echo \"no such key\" >&2; exit 3', \
    environment: {mode: http}}}";
/// Crashes until the file `mended` exists.
const RECOVERING_FUNCTION: &str = "{fprocess: sh -c 'test -e mended && exec perl server.pl; exit 3', \
    environment: {mode: http}}";
const SERVER: &str = r#"
use IO::Socket::INET;
my $s = IO::Socket::INET->new(LocalAddr => "127.0.0.1", LocalPort => $ENV{PORT}, Listen => 9, ReuseAddr => 1);
while (my $c = $s->accept) {
    while (<$c>) { last if /^\r?\n/ }
    print $c "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello";
}
"#;

/// Fails if a response takes as long as a request waits for its function.
async fn without_waiting<T>(what: &str, response: impl Future<Output = T>) -> T {
    within(what, response).await
}

async fn wait_for_three_crashes(up: &Up<'_>) {
    up.wait_for_log("crash", "restart in 400ms").await;
}

#[tokio::test]
async fn a_call_to_a_crashing_function_fails_immediately_with_its_reason_for_local_clients() {
    let workspace = Workspace::new();
    let up = workspace.up(CRASHES, &[]).await;
    // The call waits for the scheduled restarts only.
    let response = without_waiting("the first call", up.get("/function/crash", "")).await;
    assert_eq!(response.status(), 503, "{response}");
    assert_eq!(response.header("x-gateway-reason"), Some("does-not-start"));
    assert!(response.header("retry-after").is_some());
    for part in ["crash.openfaas-fn does not start", "exit status: 3"] {
        assert!(response.text().contains(part), "{response}");
    }
    // The output is awaited only briefly: on a busy machine, that of one start may come too late.
    eventually("the last line is reported", async || {
        let response = without_waiting("a call", up.get("/function/crash", "")).await;
        response.text().contains("no such key")
    })
    .await;
    eventually("the provider reports it, too", async || {
        let status = up.get("/system/function/crash", "").await.json();
        let failure = &status["startFailure"];
        assert!(failure["starts"].as_u64().unwrap() >= 3, "{status}");
        assert_eq!(failure["reason"], "exit status: 3");
        failure["lastOutput"] == "no such key"
    })
    .await;
    // Clients of other machines receive no more than that.
    for headers in ["Origin: https://a.example\r\n", "X-Forwarded-For: 10.0.0.1\r\n"] {
        let response =
            without_waiting("a remote client's call", up.get("/function/crash", headers)).await;
        assert_eq!(response.status(), 503, "{response}");
        assert!(
            response.text().starts_with("function crash.openfaas-fn does not start (call"),
            "{response}"
        );
    }
    let queued = up.post("/async-function/crash", "").await;
    let state = format!("/async-function/{}", queued.header("x-call-id").unwrap());
    eventually("the queued call has failed", async || {
        let status = up.get(&state, "").await;
        assert!(!status.text().contains("no such key"), "{status}");
        status.json()["attempts"].as_u64() >= Some(1)
    })
    .await;
    up.terminate_and_wait().await;
}

#[tokio::test]
async fn a_crashing_function_is_logged_once() {
    let workspace = Workspace::new();
    let up = workspace.up(CRASHES, &[]).await;
    wait_for_three_crashes(&up).await;
    for _ in 0..5 {
        assert_eq!(without_waiting("a call", up.get("/function/crash", "")).await.status(), 503);
    }
    let log = workspace.log();
    let failures =
        log.lines().filter(|line| line.contains("does not start") && line.contains("starts="));
    assert_eq!(failures.count(), 1, "{log}");
    up.terminate_and_wait().await;
}

#[tokio::test]
async fn with_credentials_authorized_clients_receive_the_reason() {
    let workspace = Workspace::new();
    std::fs::write(workspace.path("basic-auth-user"), "admin").unwrap();
    std::fs::write(workspace.path("basic-auth-password"), "secret").unwrap();
    let secrets = workspace.path("").display().to_string();
    let up =
        workspace.up(CRASHES, &[("basic_auth", "true"), ("secret_mount_path", &secrets)]).await;
    let response = without_waiting("a remote client's call", up.get("/function/crash", "")).await;
    assert_eq!(response.status(), 503, "{response}");
    assert!(
        response.text().starts_with("function crash.openfaas-fn does not start (call"),
        "{response}"
    );
    let wrong = "Authorization: Basic YWRtaW46d3Jvbmc=\r\n";
    let response = without_waiting("a guess", up.get("/function/crash", wrong)).await;
    assert!(!response.text().contains("no such key"), "{response}");
    let right = "Authorization: Basic YWRtaW46c2VjcmV0\r\n";
    eventually("an operator receives the reason", async || {
        let response =
            without_waiting("an operator's call", up.get("/function/crash", right)).await;
        assert_eq!(response.status(), 503, "{response}");
        response.text().contains("no such key")
    })
    .await;
    up.terminate_and_wait().await;
}

#[tokio::test]
async fn a_function_that_recovers_is_called() {
    let workspace = Workspace::new();
    std::fs::write(workspace.path("server.pl"), SERVER).unwrap();
    let up = workspace.up(&format!("functions: {{crash: {RECOVERING_FUNCTION}}}"), &[]).await;
    wait_for_three_crashes(&up).await;
    assert_eq!(without_waiting("a call", up.get("/function/crash", "")).await.status(), 503);
    std::fs::write(workspace.path("mended"), "").unwrap();
    eventually("the function is called", async || {
        let response = without_waiting("a call", up.get("/function/crash", "")).await;
        response.status() == 200 && response.text() == "hello"
    })
    .await;
    let status = up.get("/system/function/crash", "").await.json();
    assert!(status.get("startFailure").is_none(), "{status}");
    up.terminate_and_wait().await;
}

#[tokio::test]
async fn a_new_version_is_awaited_and_the_old_one_no_longer_restarted() {
    let workspace = Workspace::new();
    std::fs::write(workspace.path("server.pl"), SERVER).unwrap();
    let up = workspace.up(CRASHES, &[]).await;
    wait_for_three_crashes(&up).await;
    let starts = workspace.line_count("starts");
    let deploy = serde_json::json!({
        "service": "crash",
        "envProcess": format!("sh -c 'cd {}; sleep 2; exec perl server.pl'", workspace.path("").display()),
        "envVars": { "mode": "http" },
    });
    let length = deploy.to_string().len();
    let request = format!(
        "POST /system/functions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{deploy}"
    );
    let mut operator = crate::support::connection::Connection::connect(up.gateway).await;
    assert_eq!(operator.exchange(request).await.status(), 202);
    // The new version needs two seconds to start; the old one would be restarted in that time.
    let response = up.post("/function/crash", "").await;
    assert_eq!((response.status(), response.text()), (200, "hello"), "{response}");
    // The start in progress during the replacement may count as well.
    assert!(
        workspace.line_count("starts") <= starts + 1,
        "{starts}, {}",
        workspace.line_count("starts")
    );
    up.terminate_and_wait().await;
}

#[tokio::test]
async fn a_restart_leaves_unchanged_functions_alone() {
    let workspace = Workspace::new();
    std::fs::write(workspace.path("server.pl"), SERVER).unwrap();
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
    let up = workspace.up(&changed(1), &[]).await;
    assert_eq!(up.post("/function/served", "").await.text(), "hello");
    wait_for_three_crashes(&up).await;
    up.terminate_and_wait().await;
    assert_eq!(workspace.line_count("served"), 1);

    let up = workspace.up(&changed(2), &[]).await;
    assert_eq!(up.post("/function/served", "").await.text(), "hello");
    assert_eq!(up.post("/function/other", "").await.text(), "2\n");
    // Each restart loop uses each pause once.
    wait_for_three_crashes(&up).await;
    let first = |line: &String| line.contains("restart in 100ms");
    assert_eq!(up.logs("crash").await.iter().filter(|line| first(line)).count(), 1);
    assert_eq!(workspace.line_count("served"), 2, "started once by each");
    up.terminate_and_wait().await;
}

#[tokio::test]
async fn the_first_call_after_a_replica_was_killed_succeeds() {
    let workspace = Workspace::new();
    let server = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/process_provider/replica.py");
    let up = workspace
        .up(
            &format!(
                "functions: {{f: {{fprocess: python3 {server}, environment: {{mode: http}}}}}}"
            ),
            &[],
        )
        .await;
    for _ in 0..4 {
        let response = up.get("/function/f", "").await;
        let pid: i32 = response.text().parse().unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        eventually("the process has ended", async || {
            let process = format!("/proc/{}", pid.as_raw_nonzero());
            let stat = std::fs::read_to_string(format!("{process}/stat"));
            // The sockets of a process stay open until all of its threads have ended.
            let threads = std::fs::read_dir(format!("{process}/task")).map_or(0, Iterator::count);
            stat.map_or(true, |stat| stat.contains(") Z ") && threads <= 1)
        })
        .await;
        let response = up.get("/function/f", "").await;
        assert_ne!(response.status(), 502, "{response}");
        eventually("another call arrives", async || {
            up.get("/function/f", "").await.status() == 200
        })
        .await;
    }
    up.terminate_and_wait().await;
}
