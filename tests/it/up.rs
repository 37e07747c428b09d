//! `gateway up` and `gateway provider process` as they are run: the binary, with real functions.

use std::time::Duration;

use crate::support::up::Up;
use crate::support::wire::{Wire, post};
use crate::support::within;

/// The API is open to this machine's own names alone.
fn get(target: &str) -> String {
    format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n")
}

#[tokio::test]
async fn the_example_stack_can_be_called_at_once() {
    let stack = std::fs::read_to_string("examples/stack.yaml").unwrap();
    let mut up = Up::start(&stack).await;
    let mut caller = Wire::connect(up.gateway).await;
    assert_eq!(caller.ask(post("/function/echo", "hello")).await.text(), "hello");
    assert!(caller.ask(get("/function/env")).await.text().contains("Http_Method=GET\n"));
    let sum = caller.ask(post("/function/sha512", "hello")).await;
    assert!(sum.text().starts_with("9b71d224bd62f378"), "{sum}");
    // A server needs a moment to listen, which its callers do not notice.
    let greeted = caller.ask(post("/function/hello/x", "me")).await;
    assert!(greeted.text().contains("POST /x, you said: me"), "{greeted}");
    let listed = caller.ask(get("/system/functions")).await.json();
    assert_eq!(listed.as_array().unwrap().len(), 4);
    let echo = listed.as_array().unwrap().iter().find(|f| f["name"] == "echo").unwrap();
    assert_eq!(echo["invocationCount"], 1);
    let logs = caller.ask(get("/system/logs?name=echo&tail=10")).await;
    assert!(logs.text().contains("Forking fprocess."), "{logs}");
    assert!(up.terminated().await.success());
}

#[tokio::test]
async fn a_queued_call_is_made_and_its_answer_kept() {
    let mut up = Up::start("functions: {upper: {fprocess: tr a-z A-Z}}").await;
    let mut caller = Wire::connect(up.gateway).await;
    let accepted = caller.ask(post("/async-function/upper", "hello")).await;
    assert_eq!(accepted.status(), 202, "{accepted}");
    let state = format!("/async-function/{}", accepted.header("x-call-id").unwrap());
    crate::support::eventually("it is made", async || {
        caller.ask(get(&state)).await.json()["state"] == "succeeded"
    })
    .await;
    let result = caller.ask(get(&format!("{state}/result"))).await;
    assert_eq!((result.text(), result.header("x-function-status")), ("HELLO", Some("200")));
    assert!(up.terminated().await.success());
}

#[tokio::test]
async fn functions_scaled_to_zero_are_woken_by_their_callers() {
    let server = "{fprocess: perl examples/hello.pl, environment: {mode: http}}";
    let up = Up::start(&format!("functions: {{hello: {server}, echo: {{fprocess: cat}}}}")).await;
    let mut operator = Wire::connect(up.gateway).await;
    for function in ["hello", "echo", "hello"] {
        let scale = format!(r#"{{"serviceName":"{function}","replicas":0}}"#);
        let length = scale.len();
        let head = format!("POST /system/scale-function/{function} HTTP/1.1\r\nHost: localhost");
        let request = format!("{head}\r\nContent-Length: {length}\r\n\r\n{scale}");
        assert_eq!(operator.ask(request).await.status(), 202);
        let mut callers = tokio::task::JoinSet::new();
        for _ in 0..30 {
            let mut caller = Wire::connect(up.gateway).await;
            let request = post(&format!("/function/{function}"), "me");
            callers.spawn(async move { caller.ask(request).await });
        }
        for answer in callers.join_all().await {
            assert!(answer.status() == 200 && answer.text().contains("me"), "{answer}");
        }
        let status = operator.ask(get(&format!("/system/function/{function}"))).await.json();
        assert_eq!((&status["replicas"], &status["availableReplicas"]), (&1.into(), &1.into()));
    }
}

#[tokio::test]
async fn a_call_in_flight_is_answered_when_it_stops() {
    let mut up = Up::start("functions: {slow: {fprocess: sh -c 'sleep 1; echo done'}}").await;
    let mut caller = Wire::connect(up.gateway).await;
    caller.send(post("/function/slow", "")).await;
    let mut watcher = Wire::connect(up.gateway).await;
    crate::support::eventually("the function runs", async || {
        let logs = watcher.ask(get("/system/logs?name=slow")).await;
        logs.text().contains("Forking fprocess.")
    })
    .await;
    up.terminate();
    assert_eq!(caller.answer().await.text(), "done\n");
    assert!(within("it ends", up.child.wait()).await.unwrap().success());
    let log = std::fs::read_to_string(up.state.path().join("log")).unwrap();
    assert!(log.trim_end().ends_with("Stopped"), "{log}");
}

#[tokio::test]
async fn the_rest_of_a_body_is_not_taken_for_a_request() {
    let up = Up::start("functions: {quick: {fprocess: 'true'}}").await;
    for address in [up.provider, up.gateway] {
        let mut caller = Wire::connect(address).await;
        let head = "POST /function/quick HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n";
        caller.send(format!("{head}\r\nabc")).await;
        assert_eq!(caller.head().await.status(), 200);
        // Longer than a connection waits before it goes to rest: only then could it forget where it was.
        tokio::time::sleep(Duration::from_millis(2500)).await;
        let hidden = "GET /system/namespaces HTTP/1.1\r\nHost: localhost\r\n\r\n";
        // The connection may be gone already, which is as good.
        let _ = caller.try_send(hidden).await;
        let _ = caller.try_send(vec![b'x'; 100_000 - 3 - hidden.len()]).await;
        let told = String::from_utf8_lossy(&caller.closed_or_silent().await).into_owned();
        let is_answered = told.contains("openfaas-fn") || told.contains("credentials");
        assert!(!is_answered, "{address}: {told}");
    }
}

#[tokio::test]
async fn pages_of_others_reach_functions_but_not_the_api() {
    let up = Up::start("functions: {echo: {fprocess: cat}}").await;
    for address in [up.gateway, up.provider] {
        let mut caller = Wire::connect(address).await;
        for (header, status) in [
            ("Host: localhost\r\nOrigin: https://evil.example", 403),
            ("Host: localhost\r\nSec-Fetch-Site: cross-site", 403),
            ("Host: rebind.evil\r\nSec-Fetch-Site: same-origin", 403),
            // The provider asks for credentials then.
            (
                "Host: localhost\r\nOrigin: http://localhost",
                if address == up.gateway { 200 } else { 401 },
            ),
        ] {
            let request = format!("GET /system/functions HTTP/1.1\r\n{header}\r\n\r\n");
            assert_eq!(caller.ask(request).await.status(), status, "{header}");
        }
        let request =
            "GET /function/echo HTTP/1.1\r\nHost: rebind.evil\r\nOrigin: https://a.b\r\n\r\n";
        assert_eq!(caller.ask(request).await.status(), 200);
    }
}

#[tokio::test]
async fn a_function_sleeps_when_nobody_calls_and_wakes_when_somebody_does() {
    let labels = "{com.openfaas.scale.zero: 'true', com.openfaas.scale.zero-duration: 1s}";
    let hello = "fprocess: perl examples/hello.pl, environment: {mode: http}";
    let up = Up::start(&format!("functions: {{hello: {{{hello}, labels: {labels}}}}}")).await;
    crate::support::eventually("it sleeps", async || {
        let status = Wire::connect(up.gateway).await.ask(get("/system/function/hello")).await;
        status.json()["replicas"] == 0
    })
    .await;
    let answer = Wire::connect(up.gateway).await.ask(post("/function/hello/x", "me")).await;
    assert_eq!(answer.status(), 200, "{answer}");
    assert!(answer.text().contains("you said: me"), "{answer}");
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
        let mut client = Wire::connect(address).await;
        let mut head;
        loop {
            client.send(get("/function/hints")).await;
            head = client.head().await;
            if head.status() != 503 {
                break;
            }
            // The provider itself does not wait for the server to listen.
            client.body(&head).await.unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!((head.status(), head.header("link")), (103, Some("</style.css>")));
        assert_eq!(head.header("keep-alive"), None);
        std::fs::write(&gate, "").unwrap();
        assert_eq!(client.answer().await.text(), "final");
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
            let mut client = Wire::connect(address).await;
            let answer = client.ask(format!("{start}\r\n{host}{lines}\r\n{body}")).await;
            assert_eq!(answer.status(), expect, "{address} {start} {lines}: {answer}");
            assert!(expect == 200 || !answer.text().is_empty(), "{answer}");
        }
        let mut client = Wire::connect(address).await;
        let lines = "Host: localhost\r\nConnection: keep-alive\r\n";
        client.send(format!("GET /function/large HTTP/1.0\r\n{lines}\r\n")).await;
        let head = client.head().await;
        assert_eq!(
            (head.header("content-length"), head.header("connection")),
            (None, Some("close"))
        );
        assert_eq!(client.closed().await.len(), 3_000_000);
        let mut client = Wire::connect(address).await;
        let answer = client.ask("OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
        assert!(answer.header("allow").is_some_and(|allow| allow.contains("OPTIONS")), "{answer}");
    }
}
