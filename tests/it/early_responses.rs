//! Responses to requests whose body is still being sent: clients that read only after sending receive them, too.

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;

use crate::support::connection::{Connection, get, post};
use crate::support::gateway::{Gateway, command};
use crate::support::provider::{Invocation, Provider};
use crate::support::{eventually, within};

/// More than the socket buffers between a client and a function hold.
const LARGE_BODY: usize = 20 << 20;
/// Attempts per client, because a lost response is a race.
const ATTEMPTS: usize = 5;

/// Sends a large body as Python's standard library does: it reads only after it has sent everything.
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

/// Python's report of its requests, one line each.
async fn python(gateway: &Gateway, path: &str) -> Vec<String> {
    let host = gateway.address.to_string();
    let (size, times) = (LARGE_BODY.to_string(), ATTEMPTS.to_string());
    let mut python = Command::new("python3");
    python.args(["-c", PYTHON, &host, path, &size, &times]).kill_on_drop(true);
    let output = within("python", python.output()).await.unwrap();
    assert!(output.status.success(), "{path}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

/// curl's report of an upload of `file`, or of its standard input if that is `-`.
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
            // curl need not read all of it.
            let _ = stdin.write_all(&vec![b'x'; LARGE_BODY]).await;
        }
    };
    let (output, ()) = tokio::join!(within("curl", child.wait_with_output()), feed);
    let output = output.unwrap();
    let reported = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{reported}: {}", String::from_utf8_lossy(&output.stderr));
    reported
}

/// Asserts that all clients that send a large body to `path` receive a response with `status` and this first word.
async fn assert_all_clients_receive(gateway: &Gateway, path: &str, status: &str, word: &str) {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("large");
    std::fs::write(&file, vec![b'x'; LARGE_BODY]).unwrap();
    let file = file.to_str().unwrap();
    assert_eq!(python(gateway, path).await, vec![format!("{status} close {word}"); ATTEMPTS]);
    for _ in 0..ATTEMPTS {
        for source in ["-", file] {
            let reported = curl(gateway, path, source).await;
            assert!(
                reported.starts_with(word) && reported.ends_with(status),
                "{path}, {source}: {reported}"
            );
        }
    }
}

async fn refuse(call: &mut Invocation) {
    call.send_response(413, b"large bodies are refused").await;
}

#[tokio::test]
async fn a_client_receives_the_refusal_of_a_function_that_closes() {
    let provider = Provider::builder()
        .handler(async |mut call| {
            refuse(&mut call).await;
            // Closing with unread data makes the kernel reset the connection.
            None
        })
        .start();
    let gateway = Gateway::in_front_of(&provider).await;
    assert_all_clients_receive(&gateway, "/function/upload", "413", "large").await;
}

#[tokio::test]
async fn a_client_receives_the_refusal_of_a_function_that_stops_reading() {
    let provider = Provider::builder()
        .handler(async |mut call| {
            refuse(&mut call).await;
            call.connection.read_to_close().await;
            None
        })
        .start();
    let gateway = Gateway::in_front_of(&provider).await;
    assert_all_clients_receive(&gateway, "/function/upload", "413", "large").await;
}

#[tokio::test]
async fn a_client_receives_refusals_of_the_gateway() {
    let listed = r#"[{"name":"upload","namespace":"fn","replicas":1,"availableReplicas":1}]"#;
    let mut provider = Provider::builder().listing(listed).start();
    let state = TempDir::new().unwrap();
    let gateway = Gateway::builder()
        .provider(&provider)
        .var("queue", "embedded")
        .var("state_dir", state.path().display())
        .var("max_async_body_bytes", "1000000")
        .var("max_calls", "1")
        .start()
        .await;
    gateway
        .wait_for_metric("the function is listed", |m| m.text.contains("gateway_service_count{"))
        .await;
    assert_all_clients_receive(&gateway, "/nowhere", "404", "no").await;
    assert_all_clients_receive(&gateway, "/async-function/upload", "413", "the").await;
    let mut client = gateway.connect().await;
    client.send(get("/function/slow")).await;
    let _held = provider.next_call().await;
    assert_all_clients_receive(&gateway, "/function/upload", "503", "too").await;
}

#[tokio::test]
async fn after_an_early_response_the_rest_of_the_request_is_drained() {
    let provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    eventually("the gateway is ready", async || gateway.is_ready().await).await;
    let mut client = gateway.connect().await;
    let head = "POST /nowhere HTTP/1.1\r\nHost: g\r\nContent-Length: 1000000000\r\n\r\n";
    client.send(head).await;
    let response = client.read_response().await;
    assert_eq!((response.status(), response.header("connection")), (404, Some("close")));
    assert!(!client.wait_readable().await);
    let piece = vec![b'x'; 1 << 20];
    for _ in 0..8 {
        client.send(&piece).await;
    }
    // A client that neither sends nor closes does not keep its connection.
    let open = gateway.open_files();
    eventually("the connection is closed", async || gateway.open_files() < open).await;
    // Nor does a client that never stops sending.
    let mut client = gateway.connect().await;
    client.send(head).await;
    assert_eq!(client.read_response().await.status(), 404);
    let endless = async { while client.try_send(&piece).await.is_ok() {} };
    tokio::time::timeout(Duration::from_secs(60), endless).await.unwrap();
}

#[tokio::test]
async fn a_small_complete_body_keeps_the_connection() {
    let provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    let mut client = gateway.connect().await;
    for _ in 0..3 {
        let response = client.exchange(post("/nowhere", "small")).await;
        assert_eq!((response.status(), response.header("connection")), (404, None));
    }
}

#[tokio::test]
async fn a_client_that_keeps_sending_receives_the_refusal_of_a_large_head() {
    let provider = Provider::manual();
    let gateway = Gateway::in_front_of(&provider).await;
    for _ in 0..ATTEMPTS {
        let mut client = gateway.connect().await;
        let pad = "p".repeat(8 << 20);
        client.send(format!("GET / HTTP/1.1\r\nHost: g\r\nX-Pad: {pad}\r\n\r\n")).await;
        assert_eq!(client.read_head().await.status(), 431);
    }
}

/// A function in HTTP mode that refuses a request without reading its body.
const REFUSING_SERVER: &str = "
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
async fn clients_receive_responses_of_forked_functions_that_read_nothing() {
    let state = TempDir::new().unwrap();
    let script = state.path().join("picky.py");
    std::fs::write(&script, REFUSING_SERVER).unwrap();
    let stack = state.path().join("stack.yaml");
    std::fs::write(&stack, STACK.replace("picky.py", script.to_str().unwrap())).unwrap();
    let mut up = command();
    up.arg("up").arg(&stack).env("PATH", std::env::var("PATH").unwrap());
    up.envs([("port", "0"), ("metrics_port", "0"), ("provider_port", "0")]);
    up.current_dir(state.path()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = up.kill_on_drop(true).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut addresses: Vec<SocketAddr> = Vec::new();
    while addresses.len() < 2 {
        let line = within("the function starts", lines.next_line()).await.unwrap().unwrap();
        if line.starts_with("Gateway") || line.starts_with("Provider") {
            let url = line.split_whitespace().nth(1).unwrap();
            addresses.push(url.strip_prefix("http://").unwrap().parse().unwrap());
        }
    }
    let gateway = addresses[0];
    eventually("the replica is ready", async || {
        Connection::connect(gateway).await.exchange(post("/function/picky", "")).await.status()
            == 413
    })
    .await;
    // The provider of `up` requires credentials that only its gateway has.
    for (path, status, text) in
        [("/function/deaf", 200, "large enough\n"), ("/function/picky", 413, "large")]
    {
        for _ in 0..ATTEMPTS {
            let mut client = Connection::connect(gateway).await;
            let head = format!("POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n");
            client.send(format!("{head}Content-Length: {LARGE_BODY}\r\n\r\n")).await;
            client.send(vec![b'x'; LARGE_BODY]).await;
            let response = client.read_response().await;
            assert_eq!((response.status(), response.text()), (status, text));
        }
    }
}

#[tokio::test]
async fn clients_receive_refusals_of_the_process_provider() {
    let state = TempDir::new().unwrap();
    let mut provider = command();
    provider.args(["provider", "process"]).current_dir(state.path());
    provider.envs([("provider_port", "0"), ("log_format", "json"), ("PATH", "/usr/bin:/bin")]);
    provider.stderr(Stdio::piped()).stdout(Stdio::null());
    let mut child = provider.kill_on_drop(true).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let address: SocketAddr = loop {
        let line = within("the function starts", lines.next_line()).await.unwrap().unwrap();
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
    assert_eq!(Connection::connect(address).await.exchange(deploy).await.status(), 202);
    for (path, status, text) in
        [("/function/deaf", 200, "large enough\n"), ("/function/none", 404, "function none")]
    {
        for _ in 0..ATTEMPTS {
            let mut client = Connection::connect(address).await;
            let head = format!("POST {path} HTTP/1.1\r\n{host}\r\n");
            client.send(format!("{head}Content-Length: {LARGE_BODY}\r\n\r\n")).await;
            client.send(vec![b'x'; LARGE_BODY]).await;
            let response = client.read_response().await;
            assert_eq!(response.status(), status);
            assert!(response.text().starts_with(text), "{response}");
        }
    }
}
