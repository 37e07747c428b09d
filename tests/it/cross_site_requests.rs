//! Web pages on their way to the API: by callbacks, by headers that only tools may send, and from a function's own page.

use std::net::SocketAddr;

use serde_json::{Value, json};

use crate::support::eventually;
use crate::support::gateway::Gateway;
use crate::support::provider::Provider;
use crate::support::queue::{answering, queueing};
use crate::support::up::Up;
use crate::support::wire::{Answer, Wire};

/// What an attacker wants to deploy.
const DEPLOYMENT: &str = r#"{"service":"evil","envProcess":"sh -c 'id'"}"#;

/// Sends `headers` and `body` as a request to this machine's own name.
async fn ask(address: SocketAddr, start: &str, headers: &[&str], body: &str) -> Answer {
    let length = body.len();
    let headers: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
    let request = format!(
        "{start} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {length}\r\n\r\n{body}"
    );
    Wire::connect(address).await.ask(request).await
}

/// The names of the functions that are deployed.
async fn functions(gateway: SocketAddr) -> Vec<String> {
    let listed = ask(gateway, "GET /system/functions", &[], "").await.json();
    let names = listed.as_array().unwrap().iter().map(|it| it["name"].as_str().unwrap().to_owned());
    names.collect()
}

/// What became of a queued call of `echo` whose callback deploys a function at `target`.
async fn called_back(gateway: SocketAddr, target: &str) -> Value {
    let callback = format!("X-Callback-Url: {target}");
    let accepted = ask(gateway, "POST /async-function/echo", &[&callback], DEPLOYMENT).await;
    assert_eq!(accepted.status(), 202, "{accepted}");
    let state = format!("GET /async-function/{}", accepted.header("x-call-id").unwrap());
    let mut told = json!({});
    eventually("the call is over", async || {
        told = ask(gateway, &state, &[], "").await.json();
        told["state"] == "succeeded"
    })
    .await;
    told
}

/// The ways to write an address of this machine.
fn hosts(port: u16) -> Vec<String> {
    let hosts = ["127.0.0.1", "localhost", "0.0.0.0", "[::ffff:127.0.0.1]", "127.1", "2130706433"];
    hosts.iter().map(|host| format!("http://{host}:{port}")).collect()
}

#[tokio::test]
async fn a_page_cannot_run_a_command_by_a_callback() {
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
    // One whose name was made to lead here counts as the page's own site.
    let rebound = format!(
        "POST /async-function/echo HTTP/1.1\r\nHost: rebind.evil\r\nSec-Fetch-Site: same-origin\r\n\
         {callback}\r\nContent-Length: 0\r\n\r\n"
    );
    assert_eq!(Wire::connect(up.gateway).await.ask(rebound).await.status(), 403);
    assert_eq!(functions(up.gateway).await, ["echo"]);
}

#[tokio::test]
async fn no_callback_reaches_the_ports_of_up() {
    let up = Up::start("functions: {echo: {fprocess: cat}}").await;
    let targets = [(up.gateway, "/system/functions"), (up.provider, "/system/functions")];
    let others = [(up.metrics, "/metrics"), (up.provider, "/function/echo"), (up.gateway, "/")];
    for (address, path) in targets.into_iter().chain(others) {
        for base in hosts(address.port()) {
            let told = called_back(up.gateway, &format!("{base}{path}")).await;
            let reason = told["reason"].as_str().unwrap_or_default();
            assert!(reason.contains("not allowed"), "{base}{path}: {told}");
        }
    }
    assert_eq!(functions(up.gateway).await, ["echo"]);
    assert!(ask(up.gateway, "POST /function/evil", &[], "").await.status() >= 400);
}

#[tokio::test]
async fn no_callback_reaches_what_serve_guards_whatever_is_allowed() {
    let provider = Provider::builder()
        .api(|head, _| crate::support::queue::function(head))
        .answering(|call| crate::support::provider::always(call, DEPLOYMENT))
        .start();
    let logs = Provider::by_hand();
    let state = tempfile::tempdir().unwrap();
    // On every address of this machine, as gateways mostly do.
    let gateway = queueing(&provider, state.path())
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
            let told = called_back(public, &format!("{base}/system/functions")).await;
            let reason = told["reason"].as_str().unwrap_or_default();
            assert!(reason.contains("not allowed"), "{base}: {told}");
        }
    }
    let deployed = |(head, _): &(crate::support::wire::Head, Vec<u8>)| {
        head.target().starts_with("/system/functions") && head.method() == "POST"
    };
    assert!(!provider.asked().iter().any(deployed));
    assert_eq!(logs.connections(), 0);
}

#[tokio::test]
async fn the_api_refuses_what_comes_by_a_callback() {
    let up = Up::start("functions: {echo: {fprocess: cat}}").await;
    let provider = Provider::saying("done");
    let gateway = Gateway::before(&provider).await;
    for address in [up.gateway, up.provider, gateway.address] {
        for start in ["POST /system/functions", "GET /system/functions", "POST /system/alert"] {
            let refused = ask(address, start, &["X-Gateway-Callback: 1"], DEPLOYMENT).await;
            assert_eq!(refused.status(), 403, "{start}: {refused}");
            assert!(refused.text().contains("callback"), "{refused}");
        }
    }
    assert_eq!(functions(up.gateway).await, ["echo"]);
    assert!(provider.asked().is_empty());
    let called = ask(gateway.address, "POST /function/echo", &["X-Gateway-Callback: 1"], "").await;
    assert_eq!(called.status(), 200);
}

#[tokio::test]
async fn pages_of_others_queue_calls_with_harmless_headers_alone() {
    let (state, provider) = (tempfile::tempdir().unwrap(), answering(&[200], "done"));
    let gateway = queueing(&provider, state.path()).start().await;
    let preflight = [
        "Origin: https://a.example",
        "Access-Control-Request-Method: POST",
        "Access-Control-Request-Headers: x-anything",
    ];
    let allowed = gateway.ask("OPTIONS", "/async-function/echo", &preflight).await;
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
    assert_eq!(gateway.queue("echo", &harmless, "").await.status(), 202);
    for header in ["X-Callback-Url: http://h.example/", "X-Gateway-Callbacks: 0"] {
        let refused = gateway.queue("echo", &[page, header], "").await;
        assert_eq!(refused.status(), 403, "{header}: {refused}");
        assert_eq!(refused.header("access-control-allow-origin"), Some("*"));
    }
    let own = ["Origin: http://gateway.test", "X-Callback-Url: http://h.example/"];
    assert_eq!(gateway.queue("echo", &own, "").await.status(), 202);
}

#[tokio::test]
async fn the_page_of_a_function_can_change_no_function() {
    let up = Up::start("functions: {echo: {fprocess: cat}}").await;
    // What a form of another site sends, the function says, and a browser would run.
    let form = ["Origin: https://evil.example", "Content-Type: text/plain"];
    let said = ask(up.gateway, "POST /function/echo", &form, "<script>deploy()</script>").await;
    assert_eq!(said.text(), "<script>deploy()</script>");
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
        // What the page under /ui/ does.
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
async fn the_provider_of_up_takes_orders_from_its_gateway_alone() {
    let up = Up::start("functions: {env: {fprocess: env}, echo: {fprocess: cat}}").await;
    for start in ["POST /system/functions", "GET /system/functions", "DELETE /system/functions"] {
        assert_eq!(ask(up.provider, start, &[], DEPLOYMENT).await.status(), 401, "{start}");
        let guessed = ["Authorization: Basic Z2F0ZXdheTo="];
        assert_eq!(ask(up.provider, start, &guessed, DEPLOYMENT).await.status(), 401, "{start}");
    }
    assert_eq!(ask(up.provider, "POST /function/echo", &[], "hi").await.text(), "hi");
    // The gateway's own API is open to this machine, as before.
    assert_eq!(ask(up.gateway, "POST /system/functions", &[], DEPLOYMENT).await.status(), 202);
    let environment = ask(up.gateway, "POST /function/env", &[], "").await;
    assert!(!environment.text().to_ascii_lowercase().contains("authorization"), "{environment}");
}

#[tokio::test]
async fn a_gateway_without_credentials_says_so_once() {
    let provider = Provider::by_hand();
    let open = Gateway::before(&provider).await;
    let warns = |gateway: &Gateway| {
        let log = gateway.log();
        log.iter().filter(|line| line.contains("basic_auth") && line.contains("WARN")).count()
    };
    assert_eq!(warns(&open), 1, "{:?}", open.log());
    let judged = Gateway::builder().provider(&provider).var("auth_proxy_url", provider.url());
    assert_eq!(warns(&judged.start().await), 0);
}
