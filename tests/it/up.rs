//! `gateway up` and `gateway provider process` as users run them: the binary, with real functions.

use std::time::Duration;

use crate::support::connection::{Connection, post};
use crate::support::up::Up;
use crate::support::within;

/// The API accepts the host names of this machine only.
fn get(target: &str) -> String {
    format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n")
}

#[tokio::test]
async fn the_example_stack_is_ready_after_the_start() {
    let stack = std::fs::read_to_string("examples/stack.yaml").unwrap();
    let mut up = Up::start(&stack).await;
    let mut client = Connection::connect(up.gateway).await;
    assert_eq!(client.exchange(post("/function/echo", "hello")).await.text(), "hello");
    assert!(client.exchange(get("/function/env")).await.text().contains("Http_Method=GET\n"));
    let sum = client.exchange(post("/function/sha512", "hello")).await;
    assert!(sum.text().starts_with("9b71d224bd62f378"), "{sum}");
    // A server needs a moment to listen, which clients do not notice.
    let greeted = client.exchange(post("/function/hello/x", "me")).await;
    assert!(greeted.text().contains("POST /x, you said: me"), "{greeted}");
    let listed = client.exchange(get("/system/functions")).await.json();
    assert_eq!(listed.as_array().unwrap().len(), 4);
    let echo = listed.as_array().unwrap().iter().find(|f| f["name"] == "echo").unwrap();
    assert_eq!(echo["invocationCount"], 1);
    let logs = client.exchange(get("/system/logs?name=echo&tail=10")).await;
    assert!(logs.text().contains("Forking fprocess."), "{logs}");
    assert!(up.terminate_and_wait().await.success());
}

#[tokio::test]
async fn a_queued_call_is_executed_and_its_response_stored() {
    let mut up = Up::start("functions: {upper: {fprocess: tr a-z A-Z}}").await;
    let mut client = Connection::connect(up.gateway).await;
    let accepted = client.exchange(post("/async-function/upper", "hello")).await;
    assert_eq!(accepted.status(), 202, "{accepted}");
    let state = format!("/async-function/{}", accepted.header("x-call-id").unwrap());
    crate::support::eventually("the call is executed", async || {
        client.exchange(get(&state)).await.json()["state"] == "succeeded"
    })
    .await;
    let result = client.exchange(get(&format!("{state}/result"))).await;
    assert_eq!((result.text(), result.header("x-function-status")), ("HELLO", Some("200")));
    assert!(up.terminate_and_wait().await.success());
}

#[tokio::test]
async fn functions_at_zero_are_scaled_up_by_requests() {
    let server = "{fprocess: perl examples/hello.pl, environment: {mode: http}}";
    let up = Up::start(&format!("functions: {{hello: {server}, echo: {{fprocess: cat}}}}")).await;
    let mut operator = Connection::connect(up.gateway).await;
    for function in ["hello", "echo", "hello"] {
        let scale = format!(r#"{{"serviceName":"{function}","replicas":0}}"#);
        let length = scale.len();
        let head = format!("POST /system/scale-function/{function} HTTP/1.1\r\nHost: localhost");
        let request = format!("{head}\r\nContent-Length: {length}\r\n\r\n{scale}");
        assert_eq!(operator.exchange(request).await.status(), 202);
        let mut clients = tokio::task::JoinSet::new();
        for _ in 0..30 {
            let mut client = Connection::connect(up.gateway).await;
            let request = post(&format!("/function/{function}"), "me");
            clients.spawn(async move { client.exchange(request).await });
        }
        for response in clients.join_all().await {
            assert!(response.status() == 200 && response.text().contains("me"), "{response}");
        }
        let status = operator.exchange(get(&format!("/system/function/{function}"))).await.json();
        assert_eq!((&status["replicas"], &status["availableReplicas"]), (&1.into(), &1.into()));
    }
}

#[tokio::test]
async fn a_call_in_flight_finishes_during_shutdown() {
    let mut up = Up::start("functions: {slow: {fprocess: sh -c 'sleep 1; echo done'}}").await;
    let mut client = Connection::connect(up.gateway).await;
    client.send(post("/function/slow", "")).await;
    let mut watcher = Connection::connect(up.gateway).await;
    crate::support::eventually("the function runs", async || {
        let logs = watcher.exchange(get("/system/logs?name=slow")).await;
        logs.text().contains("Forking fprocess.")
    })
    .await;
    up.terminate();
    assert_eq!(client.read_response().await.text(), "done\n");
    assert!(within("the process exits", up.child.wait()).await.unwrap().success());
    let log = std::fs::read_to_string(up.state.path().join("log")).unwrap();
    assert!(log.trim_end().ends_with("Stopped"), "{log}");
}

#[tokio::test]
async fn the_rest_of_a_body_is_not_parsed_as_a_request() {
    let up = Up::start("functions: {quick: {fprocess: 'true'}}").await;
    for address in [up.provider, up.gateway] {
        let mut client = Connection::connect(address).await;
        let head = "POST /function/quick HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n";
        client.send(format!("{head}\r\nabc")).await;
        assert_eq!(client.read_head().await.status(), 200);
        // Longer than the delay after which a connection hibernates: only then could it lose its position.
        tokio::time::sleep(Duration::from_millis(2500)).await;
        let hidden = "GET /system/namespaces HTTP/1.1\r\nHost: localhost\r\n\r\n";
        // The connection may be closed already, which is as good.
        let _ = client.try_send(hidden).await;
        let _ = client.try_send(vec![b'x'; 100_000 - 3 - hidden.len()]).await;
        let received = String::from_utf8_lossy(&client.read_until_idle().await).into_owned();
        let is_answered = received.contains("openfaas-fn") || received.contains("credentials");
        assert!(!is_answered, "{address}: {received}");
    }
}

#[tokio::test]
async fn cross_origin_pages_reach_functions_but_not_the_api() {
    let up = Up::start("functions: {echo: {fprocess: cat}}").await;
    for address in [up.gateway, up.provider] {
        let mut client = Connection::connect(address).await;
        for (header, status) in [
            ("Host: localhost\r\nOrigin: https://evil.example", 403),
            ("Host: localhost\r\nSec-Fetch-Site: cross-site", 403),
            ("Host: rebind.evil\r\nSec-Fetch-Site: same-origin", 403),
            // Then the provider requires credentials.
            (
                "Host: localhost\r\nOrigin: http://localhost",
                if address == up.gateway { 200 } else { 401 },
            ),
        ] {
            let request = format!("GET /system/functions HTTP/1.1\r\n{header}\r\n\r\n");
            assert_eq!(client.exchange(request).await.status(), status, "{header}");
        }
        let request =
            "GET /function/echo HTTP/1.1\r\nHost: rebind.evil\r\nOrigin: https://a.b\r\n\r\n";
        assert_eq!(client.exchange(request).await.status(), 200);
    }
}

#[tokio::test]
async fn an_idle_function_scales_to_zero_and_up_again() {
    let labels = "{com.openfaas.scale.zero: 'true', com.openfaas.scale.zero-duration: 1s}";
    let hello = "fprocess: perl examples/hello.pl, environment: {mode: http}";
    let up = Up::start(&format!("functions: {{hello: {{{hello}, labels: {labels}}}}}")).await;
    crate::support::eventually("the function scales to zero", async || {
        let status =
            Connection::connect(up.gateway).await.exchange(get("/system/function/hello")).await;
        status.json()["replicas"] == 0
    })
    .await;
    let response =
        Connection::connect(up.gateway).await.exchange(post("/function/hello/x", "me")).await;
    assert_eq!(response.status(), 200, "{response}");
    assert!(response.text().contains("you said: me"), "{response}");
}

#[tokio::test]
async fn an_interim_response_of_a_server_reaches_its_client_before_the_final_one() {
    let directory = tempfile::tempdir().unwrap();
    let gate = directory.path().join("gate");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/interim_responses.py");
    let environment = format!("{{mode: http, gate: '{}'}}", gate.display());
    let stack =
        format!("functions: {{hints: {{fprocess: python3 {script}, environment: {environment}}}}}");
    let up = Up::start(&stack).await;
    for address in [up.gateway, up.provider] {
        let mut client = Connection::connect(address).await;
        let mut head;
        loop {
            client.send(get("/function/hints")).await;
            head = client.read_head().await;
            if head.status() != 503 {
                break;
            }
            // The provider itself does not wait for the server to listen.
            client.read_body(&head).await.unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!((head.status(), head.header("link")), (103, Some("</style.css>")));
        assert_eq!(head.header("keep-alive"), None);
        std::fs::write(&gate, "").unwrap();
        assert_eq!(client.read_response().await.text(), "final");
        std::fs::remove_file(&gate).unwrap();
    }
}

#[tokio::test]
async fn the_provider_reads_requests_as_strictly_as_the_gateway() {
    let large = "{fprocess: head -c 3000000 /dev/zero}";
    let up = Up::start(&format!("functions: {{echo: {{fprocess: cat}}, large: {large}}}")).await;
    let host = "Host: localhost\r\n";
    let chunks = "5\r\nhello\r\n0\r\n\r\n";
    for address in [up.gateway, up.provider] {
        for (start, lines, body, expect) in [
            ("POST /function/echo HTTP/1.1", "Transfer-Encoding: gzip, chunked\r\n", chunks, 501),
            ("POST /function/echo HTTP/1.1", "Transfer-Encoding: chunked, gzip\r\n", chunks, 400),
            ("POST /function/echo HTTP/1.1", "Transfer-Encoding: chunked\r\n", chunks, 200),
            ("POST /function/echo HTTP/1.8", "Transfer-Encoding: chunked\r\n", chunks, 200),
            ("POST /function/echo HTTP/3.0", "", "", 505),
            ("TRACE /function/echo HTTP/1.1", "", "", 405),
            ("CONNECT /function/echo HTTP/1.1", "", "", 405),
            ("GET http://a@localhost/function/echo HTTP/1.1", "", "", 400),
            ("GET http://localhost/function/echo HTTP/1.1", "", "", 200),
            ("OPTIONS /function/echo HTTP/1.1", "Max-Forwards: 0\r\n", "", 200),
        ] {
            let mut client = Connection::connect(address).await;
            let response = client.exchange(format!("{start}\r\n{host}{lines}\r\n{body}")).await;
            assert_eq!(response.status(), expect, "{address} {start} {lines}: {response}");
            assert!(expect == 200 || !response.text().is_empty(), "{response}");
        }
        let mut client = Connection::connect(address).await;
        let lines = "Host: localhost\r\nConnection: keep-alive\r\n";
        client.send(format!("GET /function/large HTTP/1.0\r\n{lines}\r\n")).await;
        let head = client.read_head().await;
        assert_eq!(
            (head.header("content-length"), head.header("connection")),
            (None, Some("close"))
        );
        assert_eq!(client.read_to_close().await.len(), 3_000_000);
        let mut client = Connection::connect(address).await;
        let response = client.exchange("OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
        assert!(
            response.header("allow").is_some_and(|allow| allow.contains("OPTIONS")),
            "{response}"
        );
    }
}
