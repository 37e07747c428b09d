//! Responses to requests whose body is still being sent: clients that send first and read later get them, too.

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;

use crate::support::gateway::{Gateway, command};
use crate::support::provider::{Call, Provider};
use crate::support::wire::{Wire, get, post};
use crate::support::{eventually, within};

/// More than the sockets between a client and a function hold.
const LARGE: usize = 20 << 20;
/// How often each client tries: what gets lost is lost in a race.
const TIMES: usize = 5;

/// Sends a large body as Python's standard library does: all of it, then it reads.
const PYTHON: &str = "
import http.client, sys
host, path, size, times = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
for _ in range(times):
    connection = http.client.HTTPConnection(host, timeout=30)
    connection.request('POST', path, b'x' * size, {'X-Test': 'python'})
    response = connection.getresponse()
    print(response.status, response.getheader('Connection'), response.read().decode().split(' ')[0])
    connection.close()
";

/// What Python says of its requests, a line for each.
async fn python(gateway: &Gateway, path: &str) -> Vec<String> {
    let host = gateway.address.to_string();
    let (size, times) = (LARGE.to_string(), TIMES.to_string());
    let mut python = Command::new("python3");
    python.args(["-c", PYTHON, &host, path, &size, &times]).kill_on_drop(true);
    let output = within("python", python.output()).await.unwrap();
    assert!(output.status.success(), "{path}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

/// What curl says of an upload of `file`, or of its standard input if that is `-`.
async fn curl(gateway: &Gateway, path: &str, file: &str) -> String {
    let url = format!("http://{}{path}", gateway.address);
    let mut curl = Command::new("curl");
    curl.args([
        "-sS",
        "-m",
        "30",
        "-X",
        "POST",
        "-H",
        "Expect:",
        "-w",
        " %{http_code}",
        "-T",
        file,
        &url,
    ]);
    curl.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = curl.kill_on_drop(true).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let feed = async move {
        if file == "-" {
            // It need not take all of it.
            let _ = stdin.write_all(&vec![b'x'; LARGE]).await;
        }
    };
    let (output, ()) = tokio::join!(within("curl", child.wait_with_output()), feed);
    let output = output.unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}: {}", String::from_utf8_lossy(&output.stderr));
    said
}

/// All clients send a large body to `path`, and each gets a response with `status` and this first word.
async fn all_are_told(gateway: &Gateway, path: &str, status: &str, word: &str) {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("large");
    std::fs::write(&file, vec![b'x'; LARGE]).unwrap();
    let file = file.to_str().unwrap();
    assert_eq!(python(gateway, path).await, vec![format!("{status} close {word}"); TIMES]);
    for _ in 0..TIMES {
        for source in ["-", file] {
            let said = curl(gateway, path, source).await;
            assert!(said.starts_with(word) && said.ends_with(status), "{path}, {source}: {said}");
        }
    }
}

async fn refuse(call: &mut Call) {
    call.answer_with(413, b"large bodies are refused").await;
}

#[tokio::test]
async fn a_function_that_refuses_and_closes_is_heard() {
    let provider = Provider::builder()
        .answering(async |mut call| {
            refuse(&mut call).await;
            // Closed with unread data: the kernel resets the connection.
            None
        })
        .start();
    let gateway = Gateway::before(&provider).await;
    all_are_told(&gateway, "/function/upload", "413", "large").await;
}

#[tokio::test]
async fn a_function_that_refuses_and_reads_no_more_is_heard() {
    let provider = Provider::builder()
        .answering(async |mut call| {
            refuse(&mut call).await;
            call.wire.closed().await;
            None
        })
        .start();
    let gateway = Gateway::before(&provider).await;
    all_are_told(&gateway, "/function/upload", "413", "large").await;
}

#[tokio::test]
async fn refusals_of_the_gateway_itself_are_heard() {
    let listed = r#"[{"name":"upload","namespace":"fn","replicas":1,"availableReplicas":1}]"#;
    let mut provider = Provider::builder().lists(listed).start();
    let state = TempDir::new().unwrap();
    let gateway = Gateway::builder()
        .provider(&provider)
        .var("queue", "embedded")
        .var("state_dir", state.path().display())
        .var("max_async_body_bytes", "1000000")
        .var("max_calls", "1")
        .start()
        .await;
    gateway.metrics_show("it is listed", |m| m.text.contains("gateway_service_count{")).await;
    all_are_told(&gateway, "/nowhere", "404", "no").await;
    all_are_told(&gateway, "/async-function/upload", "413", "the").await;
    let mut caller = gateway.connect().await;
    caller.send(get("/function/slow")).await;
    let _held = provider.call().await;
    all_are_told(&gateway, "/function/upload", "503", "too").await;
}

#[tokio::test]
async fn the_sending_side_is_closed_at_once_and_the_rest_is_read_for_a_while() {
    let provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    eventually("ready", async || gateway.is_ready().await).await;
    let mut caller = gateway.connect().await;
    let head = "POST /nowhere HTTP/1.1\r\nHost: g\r\nContent-Length: 1000000000\r\n\r\n";
    caller.send(head).await;
    let answer = caller.answer().await;
    assert_eq!((answer.status(), answer.header("connection")), (404, Some("close")));
    assert!(!caller.readable().await);
    let piece = vec![b'x'; 1 << 20];
    for _ in 0..8 {
        caller.send(&piece).await;
    }
    // A client that neither sends nor closes does not hold its connection.
    let open = gateway.open_files();
    eventually("the connection is closed", async || gateway.open_files() < open).await;
    // Nor does one that never stops.
    let mut caller = gateway.connect().await;
    caller.send(head).await;
    assert_eq!(caller.answer().await.status(), 404);
    let endless = async { while caller.try_send(&piece).await.is_ok() {} };
    tokio::time::timeout(Duration::from_secs(60), endless).await.unwrap();
}

#[tokio::test]
async fn a_small_body_that_has_come_whole_keeps_the_connection() {
    let provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    let mut caller = gateway.connect().await;
    for _ in 0..3 {
        let answer = caller.ask(post("/nowhere", "small")).await;
        assert_eq!((answer.status(), answer.header("connection")), (404, None));
    }
}

#[tokio::test]
async fn a_head_that_is_too_large_is_answered_to_a_client_that_sends_on() {
    let provider = Provider::by_hand();
    let gateway = Gateway::before(&provider).await;
    for _ in 0..TIMES {
        let mut caller = gateway.connect().await;
        let pad = "p".repeat(8 << 20);
        caller.send(format!("GET / HTTP/1.1\r\nHost: g\r\nX-Pad: {pad}\r\n\r\n")).await;
        assert_eq!(caller.head().await.status(), 431);
    }
}

/// A function in HTTP mode that refuses what it has not read.
const PICKY: &str = "
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(413)
        self.send_header('Content-Length', '5')
        self.end_headers()
        self.wfile.write(b'large')
http.server.ThreadingHTTPServer(('127.0.0.1', int(os.environ['PORT'])), Handler).serve_forever()
";

const STACK: &str = "
functions:
  deaf: {fprocess: echo large enough}
  picky: {fprocess: python3 picky.py, environment: {mode: http}}
";

#[tokio::test]
async fn functions_of_the_process_provider_that_read_nothing_are_heard() {
    let state = TempDir::new().unwrap();
    let picky = state.path().join("picky.py");
    std::fs::write(&picky, PICKY).unwrap();
    let stack = state.path().join("stack.yaml");
    std::fs::write(&stack, STACK.replace("picky.py", picky.to_str().unwrap())).unwrap();
    let mut up = command();
    up.arg("up").arg(&stack).env("PATH", std::env::var("PATH").unwrap());
    up.envs([("port", "0"), ("metrics_port", "0"), ("provider_port", "0")]);
    up.current_dir(state.path()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = up.kill_on_drop(true).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut addresses: Vec<SocketAddr> = Vec::new();
    while addresses.len() < 2 {
        let line = within("it starts", lines.next_line()).await.unwrap().unwrap();
        if line.starts_with("Gateway") || line.starts_with("Provider") {
            let url = line.split_whitespace().nth(1).unwrap();
            addresses.push(url.strip_prefix("http://").unwrap().parse().unwrap());
        }
    }
    let gateway = addresses[0];
    eventually("the replica is ready", async || {
        Wire::connect(gateway).await.ask(post("/function/picky", "")).await.status() == 413
    })
    .await;
    // The provider of `up` may want credentials that only its gateway has.
    for (path, status, text) in
        [("/function/deaf", 200, "large enough\n"), ("/function/picky", 413, "large")]
    {
        for _ in 0..TIMES {
            let mut caller = Wire::connect(gateway).await;
            let head = format!("POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n");
            caller.send(format!("{head}Content-Length: {LARGE}\r\n\r\n")).await;
            caller.send(vec![b'x'; LARGE]).await;
            let answer = caller.answer().await;
            assert_eq!((answer.status(), answer.text()), (status, text));
        }
    }
}

#[tokio::test]
async fn the_process_provider_itself_is_heard() {
    let state = TempDir::new().unwrap();
    let mut provider = command();
    provider.args(["provider", "process"]).current_dir(state.path());
    provider.envs([("provider_port", "0"), ("log_format", "json"), ("PATH", "/usr/bin:/bin")]);
    provider.stderr(Stdio::piped()).stdout(Stdio::null());
    let mut child = provider.kill_on_drop(true).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let address: SocketAddr = loop {
        let line = within("it starts", lines.next_line()).await.unwrap().unwrap();
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        if let Some(address) = line["fields"]["address"].as_str() {
            break address.parse().unwrap();
        }
    };
    let deaf = r#"{"service": "deaf", "envProcess": "echo large enough"}"#;
    let host = "Host: 127.0.0.1";
    let deploy = format!(
        "POST /system/functions HTTP/1.1\r\n{host}\r\nContent-Length: {}\r\n\r\n{deaf}",
        deaf.len()
    );
    assert_eq!(Wire::connect(address).await.ask(deploy).await.status(), 202);
    for (path, status, text) in
        [("/function/deaf", 200, "large enough\n"), ("/function/none", 404, "function none")]
    {
        for _ in 0..TIMES {
            let mut caller = Wire::connect(address).await;
            let head = format!("POST {path} HTTP/1.1\r\n{host}\r\n");
            caller.send(format!("{head}Content-Length: {LARGE}\r\n\r\n")).await;
            caller.send(vec![b'x'; LARGE]).await;
            let answer = caller.answer().await;
            assert_eq!(answer.status(), status);
            assert!(answer.text().starts_with(text), "{answer}");
        }
    }
}
