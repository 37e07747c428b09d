//! Web pages that try to reach the API: by callbacks, by headers that only non-browser clients can send, and from pages
//! that functions serve.

use std::net::SocketAddr;

use serde_json::{Value, json};

use crate::support::connection::{Connection, Response};
use crate::support::eventually;
use crate::support::gateway::Gateway;
use crate::support::provider::Provider;
use crate::support::queue::{replying_with, with_embedded_queue};
use crate::support::up::Up;

/// A function that an attacker tries to deploy.
const DEPLOYMENT: &str = r#"{"service":"evil","envProcess":"sh -c 'id'"}"#;

/// Sends `headers` and `body` with the host name of this machine.
async fn ask(address: SocketAddr, start: &str, headers: &[&str], body: &str) -> Response {
    let length = body.len();
    let headers: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
    let request = format!(
        "{start} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {length}\r\n\r\n{body}"
    );
    Connection::connect(address).await.exchange(request).await
}

/// Names of the deployed functions.
async fn functions(gateway: SocketAddr) -> Vec<String> {
    let listed = ask(gateway, "GET /system/functions", &[], "").await.json();
    let names = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|function| function["name"].as_str().unwrap().to_owned());
    names.collect()
}

/// Enqueues a call of `echo` whose callback deploys a function at `target`, and returns its final state.
async fn state_after_callback(gateway: SocketAddr, target: &str) -> Value {
    let callback = format!("X-Callback-Url: {target}");
    let accepted = ask(gateway, "POST /async-function/echo", &[&callback], DEPLOYMENT).await;
    assert_eq!(accepted.status(), 202, "{accepted}");
    let state = format!("GET /async-function/{}", accepted.header("x-call-id").unwrap());
    let mut call_status = json!({});
    eventually("the call has finished", async || {
        call_status = ask(gateway, &state, &[], "").await.json();
        call_status["state"] == "succeeded"
    })
    .await;
    call_status
}

/// Notations of the address of this machine.
fn hosts(port: u16) -> Vec<String> {
    let hosts = ["127.0.0.1", "localhost", "0.0.0.0", "[::ffff:127.0.0.1]", "127.1", "2130706433"];
    hosts.iter().map(|host| format!("http://{host}:{port}")).collect()
}

#[tokio::test]
async fn a_web_page_cannot_deploy_a_function_by_a_callback() {
    let up = Up::start("functions: {echo: {fprocess: cat}}").await;
    let page = "Origin: https://evil.example";
    let preflight = [
        page,
        "Access-Control-Request-Method: POST",
        "Access-Control-Request-Headers: x-callback-url, content-type",
    ];
    let allowed = ask(up.gateway, "OPTIONS /async-function/echo", &preflight, "").await;
    let allowed = allowed.header("access-control-allow-headers").unwrap_or_default();
    assert!(!allowed.to_ascii_lowercase().contains("callback"), "{allowed}");
    let callback = format!("X-Callback-Url: http://{}/system/functions", up.gateway);
    for site in [page, "Sec-Fetch-Site: cross-site", "Sec-Fetch-Site: same-site"] {
        let headers = [site, &callback];
        let refused = ask(up.gateway, "POST /async-function/echo", &headers, DEPLOYMENT).await;
        assert_eq!(refused.status(), 403, "{site}: {refused}");
        assert!(refused.text().contains("x-callback-url"), "{refused}");
    }
    // A host name rebound to this address counts as the page's own site.
    let rebound = format!(
        "POST /async-function/echo HTTP/1.1\r\nHost: rebind.evil\r\nSec-Fetch-Site: same-origin\r\n\
         {callback}\r\nContent-Length: 0\r\n\r\n"
    );
    assert_eq!(Connection::connect(up.gateway).await.exchange(rebound).await.status(), 403);
    assert_eq!(functions(up.gateway).await, ["echo"]);
}

#[tokio::test]
async fn callbacks_do_not_reach_the_ports_of_up() {
    let up = Up::start("functions: {echo: {fprocess: cat}}").await;
    let targets = [(up.gateway, "/system/functions"), (up.provider, "/system/functions")];
    let others = [(up.metrics, "/metrics"), (up.provider, "/function/echo"), (up.gateway, "/")];
    for (address, path) in targets.into_iter().chain(others) {
        for base in hosts(address.port()) {
            let call_status = state_after_callback(up.gateway, &format!("{base}{path}")).await;
            let reason = call_status["reason"].as_str().unwrap_or_default();
            assert!(reason.contains("not allowed"), "{base}{path}: {call_status}");
        }
    }
    assert_eq!(functions(up.gateway).await, ["echo"]);
    assert!(ask(up.gateway, "POST /function/evil", &[], "").await.status() >= 400);
}

#[tokio::test]
async fn callbacks_do_not_reach_the_guarded_api_with_any_allowlist() {
    let provider = Provider::builder()
        .api(|head, _| crate::support::queue::function_status(head))
        .handler(|call| crate::support::provider::respond_ok(call, DEPLOYMENT))
        .start();
    let logs = Provider::manual();
    let state = tempfile::tempdir().unwrap();
    // Listens on all addresses of this machine, the default.
    let gateway = with_embedded_queue(&provider, state.path())
        .var("callback_allowlist", "*")
        .var("listen_address", "0.0.0.0")
        .var("logs_provider_url", logs.url())
        .start()
        .await;
    let local = |port| SocketAddr::from(([127, 0, 0, 1], port));
    let public = local(gateway.address.port());
    let guarded = [public, local(gateway.metrics_address.port()), provider.address, logs.address];
    for address in guarded {
        for base in hosts(address.port()) {
            let call_status =
                state_after_callback(public, &format!("{base}/system/functions")).await;
            let reason = call_status["reason"].as_str().unwrap_or_default();
            assert!(reason.contains("not allowed"), "{base}: {call_status}");
        }
    }
    let deployed = |(head, _): &(crate::support::connection::Head, Vec<u8>)| {
        head.target().starts_with("/system/functions") && head.method() == "POST"
    };
    assert!(!provider.api_requests().iter().any(deployed));
    assert_eq!(logs.connection_count(), 0);
}

#[tokio::test]
async fn the_api_refuses_callback_requests() {
    let up = Up::start("functions: {echo: {fprocess: cat}}").await;
    let provider = Provider::replying("done");
    let gateway = Gateway::in_front_of(&provider).await;
    for address in [up.gateway, up.provider, gateway.address] {
        for start in ["POST /system/functions", "GET /system/functions", "POST /system/alert"] {
            let refused = ask(address, start, &["X-Gateway-Callback: 1"], DEPLOYMENT).await;
            assert_eq!(refused.status(), 403, "{start}: {refused}");
            assert!(refused.text().contains("callback"), "{refused}");
        }
    }
    assert_eq!(functions(up.gateway).await, ["echo"]);
    assert!(provider.api_requests().is_empty());
    let called = ask(gateway.address, "POST /function/echo", &["X-Gateway-Callback: 1"], "").await;
    assert_eq!(called.status(), 200);
}

#[tokio::test]
async fn cross_origin_pages_can_enqueue_calls_with_safe_headers_only() {
    let (state, provider) = (tempfile::tempdir().unwrap(), replying_with(&[200], "done"));
    let gateway = with_embedded_queue(&provider, state.path()).start().await;
    let preflight = [
        "Origin: https://a.example",
        "Access-Control-Request-Method: POST",
        "Access-Control-Request-Headers: x-anything",
    ];
    let allowed = gateway.request("OPTIONS", "/async-function/echo", &preflight).await;
    assert_eq!(allowed.status(), 204, "{allowed}");
    assert_eq!(allowed.header("access-control-allow-origin"), Some("*"));
    let headers = allowed.header("access-control-allow-headers").unwrap().to_ascii_lowercase();
    let mut headers: Vec<_> = headers.split(',').map(str::trim).collect();
    headers.sort_unstable();
    let expect = [
        "content-type",
        "idempotency-key",
        "x-call-id",
        "x-delay-seconds",
        "x-expires-seconds",
        "x-max-attempts",
    ];
    assert_eq!(headers, expect);
    let page = "Origin: https://a.example";
    let harmless = [page, "Content-Type: a/b", "X-Max-Attempts: 1", "X-Expires-Seconds: 60"];
    assert_eq!(gateway.send_async("echo", &harmless, "").await.status(), 202);
    for header in ["X-Callback-Url: http://h.example/", "X-Gateway-Callbacks: 0"] {
        let refused = gateway.send_async("echo", &[page, header], "").await;
        assert_eq!(refused.status(), 403, "{header}: {refused}");
        assert_eq!(refused.header("access-control-allow-origin"), Some("*"));
    }
    let own = ["Origin: http://gateway.test", "X-Callback-Url: http://h.example/"];
    assert_eq!(gateway.send_async("echo", &own, "").await.status(), 202);
}

#[tokio::test]
async fn a_page_served_by_a_function_cannot_change_functions() {
    let up = Up::start("functions: {echo: {fprocess: cat}}").await;
    // A form on another site sends this, the function returns it, and a browser would execute it.
    let form = ["Origin: https://evil.example", "Content-Type: text/plain"];
    let page = ask(up.gateway, "POST /function/echo", &form, "<script>deploy()</script>").await;
    assert_eq!(page.text(), "<script>deploy()</script>");
    for own in ["Sec-Fetch-Site: same-origin", "Origin: http://localhost"] {
        for start in [
            "POST /system/functions",
            "PUT /system/functions",
            "DELETE /system/functions",
            "POST /system/scale-function/echo",
            "POST /system/secrets",
            "POST /system/alert",
        ] {
            let refused = ask(up.gateway, start, &[own], DEPLOYMENT).await;
            assert_eq!(refused.status(), 403, "{start}: {refused}");
            assert!(refused.text().contains("page"), "{refused}");
        }
        // The requests of the page under /ui/.
        for (start, status) in [
            ("GET /system/functions", 200),
            ("GET /system/queues", 200),
            ("POST /system/calls/none/retry", 404),
            ("DELETE /system/calls/none", 404),
        ] {
            assert_eq!(ask(up.gateway, start, &[own], "").await.status(), status, "{start}");
        }
    }
    assert_eq!(functions(up.gateway).await, ["echo"]);
}

#[tokio::test]
async fn the_provider_of_up_accepts_requests_from_its_gateway_only() {
    let up = Up::start("functions: {env: {fprocess: env}, echo: {fprocess: cat}}").await;
    for start in ["POST /system/functions", "GET /system/functions", "DELETE /system/functions"] {
        assert_eq!(ask(up.provider, start, &[], DEPLOYMENT).await.status(), 401, "{start}");
        let guessed = ["Authorization: Basic Z2F0ZXdheTo="];
        assert_eq!(ask(up.provider, start, &guessed, DEPLOYMENT).await.status(), 401, "{start}");
    }
    assert_eq!(ask(up.provider, "POST /function/echo", &[], "hi").await.text(), "hi");
    // The gateway's own API stays open to this machine.
    assert_eq!(ask(up.gateway, "POST /system/functions", &[], DEPLOYMENT).await.status(), 202);
    let environment = ask(up.gateway, "POST /function/env", &[], "").await;
    assert!(!environment.text().to_ascii_lowercase().contains("authorization"), "{environment}");
}

#[tokio::test]
async fn a_gateway_without_credentials_logs_one_warning() {
    let provider = Provider::manual();
    let open = Gateway::in_front_of(&provider).await;
    let warns = |gateway: &Gateway| {
        let log = gateway.log();
        log.iter().filter(|line| line.contains("basic_auth") && line.contains("WARN")).count()
    };
    assert_eq!(warns(&open), 1, "{:?}", open.log());
    let judged = Gateway::builder().provider(&provider).var("auth_proxy_url", provider.url());
    assert_eq!(warns(&judged.start().await), 0);
}
