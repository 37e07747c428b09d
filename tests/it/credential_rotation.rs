//! Credentials that change at runtime: gateway and provider read the change at different times.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::support::connection::{Connection, Response, get, post, request};
use crate::support::eventually;
use crate::support::gateway::{Builder, Gateway};
use crate::support::provider::{self, Provider};
use crate::support::scalable_function::ScalableFunction;

/// A Secret as the kubelet mounts it: all files change together when a symbolic link is replaced.
struct Mounted {
    directory: TempDir,
    versions: AtomicUsize,
}

impl Mounted {
    fn with(password: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        for name in ["basic-auth-user", "basic-auth-password"] {
            let target = Path::new("..data").join(name);
            std::os::unix::fs::symlink(target, directory.path().join(name)).unwrap();
        }
        let mounted = Self { directory, versions: AtomicUsize::new(0) };
        mounted.change("admin", password);
        mounted
    }

    fn change(&self, user: &str, password: &str) {
        let version = format!("..version-{}", self.versions.fetch_add(1, SeqCst));
        let path = |name: &str| self.directory.path().join(name);
        std::fs::create_dir(path(&version)).unwrap();
        std::fs::write(path(&version).join("basic-auth-user"), user).unwrap();
        std::fs::write(path(&version).join("basic-auth-password"), password).unwrap();
        std::os::unix::fs::symlink(&version, path("..data_tmp")).unwrap();
        std::fs::rename(path("..data_tmp"), path("..data")).unwrap();
    }

    fn settings(&self, builder: Builder) -> Builder {
        builder.var("basic_auth", "true").var("secret_mount_path", self.directory.path().display())
    }
}

fn basic(password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("admin:{password}")))
}

/// A function with a replica.
const ECHO: &str = r#"{"name":"echo","namespace":"fn","replicas":1,"availableReplicas":1}"#;

/// The passwords that a provider accepts.
#[derive(Clone)]
struct Accepted(Arc<Mutex<Vec<&'static str>>>);

impl Accepted {
    fn only(password: &'static str) -> Self {
        Self(Arc::new(Mutex::new(vec![password])))
    }

    fn set(&self, passwords: &[&'static str]) {
        passwords.clone_into(&mut self.0.lock().unwrap());
    }

    /// A provider that responds to other passwords with `status`, and to function calls always.
    fn provider(&self, status: u16) -> provider::Builder {
        let accepted = self.clone();
        let api = move |head: &crate::support::connection::Head, _: &[u8]| {
            let given = head.header("authorization");
            let is_one = |password: &&str| given == Some(basic(password).as_str());
            let is_accepted = accepted.0.lock().unwrap().iter().any(is_one);
            let open = head.target() == "/healthz";
            match head.target().split('?').next() {
                _ if !is_accepted && !open => Some((status, "who?".to_owned())),
                Some("/system/function/echo") => Some((200, ECHO.to_owned())),
                Some("/system/logs") => Some((200, "{}".to_owned())),
                Some("/system/info") => Some((200, "{}".to_owned())),
                _ => None,
            }
        };
        Provider::builder().listing(&format!("[{ECHO}]")).api(api).handler(echo)
    }
}

async fn echo(mut call: provider::Invocation) -> Option<Connection> {
    let body = call.read_body().await.ok()?;
    call.send_response(200, &body).await;
    Some(call.connection)
}

async fn with_password(gateway: &Gateway, password: &str, api_request: &str) -> Response {
    let (line, rest) = api_request.split_once("\r\n").unwrap();
    let authorization = basic(password);
    let api_request = format!("{line}\r\nAuthorization: {authorization}\r\n{rest}");
    gateway.connect().await.exchange(api_request).await
}

/// The response of `/_/ready`: its status, the degraded parts, and the reason.
async fn ready(gateway: &Gateway) -> (u16, String, String) {
    let response = gateway.get("/_/ready").await;
    let state = response.json();
    (response.status(), state["degraded"].to_string(), state["reasons"].to_string())
}

/// Calls `echo` and queries readiness until it is stopped. Returns the number of calls and what was refused.
async fn keep_calling(gateway: &Gateway, stop: CancellationToken) -> (usize, Vec<String>) {
    let (mut calls, mut refused) = (0, Vec::new());
    while !stop.is_cancelled() {
        for api_request in [get("/_/ready"), post("/function/echo", "hello")] {
            let response = gateway.connect().await.exchange(api_request).await;
            if response.status() != 200 {
                refused.push(response.to_string());
            }
        }
        calls += 1;
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    (calls, refused)
}

#[tokio::test]
async fn no_call_fails_while_the_provider_still_has_the_old_password() {
    let (accepted, secret) = (Accepted::only("old"), Mounted::with("old"));
    let provider = accepted.provider(401).start();
    let builder = Gateway::builder().provider(&provider).var("scale_from_zero", "true");
    let gateway = secret.settings(builder).start().await;
    eventually("the gateway is ready", async || gateway.is_ready().await).await;
    let stop = CancellationToken::new();
    let change = async {
        secret.change("admin", "new");
        gateway.wait_for_log("Credentials changed").await;
        eventually("the provider still has the old password", async || {
            let (status, degraded, reasons) = ready(&gateway).await;
            assert_eq!(status, 200, "{reasons}");
            degraded == r#"["credentials"]"# && reasons.contains("previous credentials")
        })
        .await;
        // Clients of the gateway's own API need the new password immediately.
        assert_eq!(with_password(&gateway, "old", &get("/system/functions")).await.status(), 401);
        let long = format!(r#"{{"service":"echo","image":"{}"}}"#, "x".repeat(2 << 20));
        for body in [r#"{"service":"echo"}"#, &long] {
            let api_request = request("PUT", "/system/functions", &[], body);
            let response = with_password(&gateway, "new", &api_request).await;
            assert_eq!(response.status(), 200, "{response}");
        }
        let chunked = "PUT /system/functions HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n\
                       2\r\n{}\r\n0\r\n\r\n";
        for api_request in [chunked, &get("/system/logs?name=echo"), &get("/system/functions")] {
            let response = with_password(&gateway, "new", api_request).await;
            assert_eq!(response.status(), 200, "{response}");
        }
        accepted.set(&["new"]);
        eventually("readiness reports no problem", async || ready(&gateway).await.1 == "[]").await;
        let api_request = request("PUT", "/system/functions", &[], "last");
        assert_eq!(with_password(&gateway, "new", &api_request).await.status(), 200);
        stop.cancel();
    };
    let ((calls, refused), ()) = tokio::join!(keep_calling(&gateway, stop.clone()), change);
    assert!(calls > 0 && refused.is_empty(), "of {calls}: {refused:#?}");
    // Every accepted request was accepted once, with its complete body.
    let requests = provider.api_requests();
    let bodies = |password: &str| {
        let given = basic(password);
        let accepted =
            requests.iter().filter(|(head, _)| head.header("authorization") == Some(&given));
        let puts = accepted.filter(|(head, _)| head.method() == "PUT");
        puts.map(|(_, body)| body.len()).collect::<Vec<_>>()
    };
    let long = (2 << 20) + r#"{"service":"echo","image":""}"#.len();
    assert_eq!(bodies("old"), [18, long, 2]);
    assert!(bodies("new").ends_with(&[4]), "{:?}", bodies("new"));
}

#[tokio::test]
async fn functions_can_be_called_while_the_provider_refuses_the_credentials() {
    for (status, scales) in [(401, "true"), (403, "true"), (401, "false")] {
        let provider = Accepted::only("another").provider(status).start();
        let secret = Mounted::with("s3cret");
        let builder = Gateway::builder().provider(&provider).var("scale_from_zero", scales);
        let gateway = secret.settings(builder).start().await;
        eventually("the gateway is ready", async || gateway.is_ready().await).await;
        let (_, degraded, reasons) = ready(&gateway).await;
        assert_eq!(degraded, r#"["credentials"]"#);
        assert!(reasons.contains("rejects the gateway's credentials"), "{reasons}");
        assert!(reasons.contains(&status.to_string()), "{reasons}");
        for number in 0..3 {
            let response = gateway.post("/function/echo", &number.to_string()).await;
            assert_eq!((response.status(), response.text()), (200, &*number.to_string()));
        }
        assert_eq!(provider.call_count(), 3);
        // For functions without replicas, the provider's response is passed on once.
        assert_eq!(gateway.post("/function/made-up", "x").await.status(), 200);
        assert_eq!(provider.call_count(), 4);
    }
}

#[tokio::test]
async fn a_function_at_zero_is_called_once_while_its_status_is_unknown() {
    let replicas = ScalableFunction::with_replicas(0, 0);
    let inner = replicas.provider().start();
    // The API refuses; calls go to a function without replicas.
    let target = inner.address;
    let provider = Provider::builder()
        .api(|_, _| Some((401, String::new())))
        .handler(move |mut call| async move {
            let body = String::from_utf8(call.read_body().await.ok()?).unwrap();
            let response =
                Connection::connect(target).await.exchange(post("/function/echo", &body)).await;
            let head = format!(
                "HTTP/1.1 {} X\r\nX-OpenFaaS-Internal: proxy\r\nContent-Length: 0\r\n\r\n",
                response.status()
            );
            call.connection.send(head).await;
            Some(call.connection)
        })
        .start();
    let secret = Mounted::with("s3cret");
    let builder = Gateway::builder().provider(&provider).var("scale_from_zero", "true");
    let gateway = secret.settings(builder).start().await;
    let response = gateway.post("/function/echo", "hello").await;
    assert_eq!(response.status(), 503, "{response}");
    assert_eq!((provider.call_count(), replicas.with(|state| state.calls.len())), (1, 1));
}

#[tokio::test]
async fn a_function_name_without_a_status_is_not_used_as_a_host_name() {
    let provider = Accepted::only("another").provider(401).start();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:8080").await.ok();
    for scales in ["true", "false"] {
        let secret = Mounted::with("s3cret");
        let builder = Gateway::builder()
            .provider(&provider)
            .var("scale_from_zero", scales)
            .var("direct_functions", "true");
        let gateway = secret.settings(builder).start().await;
        let response = gateway.get("/function/localhost").await;
        assert!([500, 503].contains(&response.status()), "{response}");
        assert!(response.text().contains("rejects the gateway's credentials"), "{response}");
    }
    if let Some(listener) = listener {
        use futures_util::FutureExt;
        assert!(listener.accept().now_or_never().is_none());
    }
}

#[tokio::test]
async fn functions_can_be_called_while_status_queries_fail() {
    let provider = Provider::builder()
        .api(|_, _| Some((500, "the cluster is away".to_owned())))
        .handler(echo)
        .start();
    let gateway = Gateway::in_front_of(&provider).await;
    eventually("the gateway is ready", async || gateway.is_ready().await).await;
    let (_, degraded, reasons) = ready(&gateway).await;
    assert_eq!(degraded, r#"["provider"]"#);
    assert!(reasons.contains("500"), "{reasons}");
    assert_eq!(gateway.post("/function/echo", "hello").await.text(), "hello");
}

#[tokio::test]
async fn incomplete_credential_files_are_ignored() {
    let (accepted, secret) = (Accepted::only("old"), Mounted::with("old"));
    let provider = accepted.provider(401).start();
    let gateway = secret.settings(Gateway::builder().provider(&provider)).start().await;
    eventually("the gateway is ready", async || gateway.is_ready().await).await;
    let data = secret.directory.path().join("..data");
    std::fs::remove_file(&data).unwrap();
    gateway.wait_for_log("Cannot read the credentials").await;
    assert_eq!(with_password(&gateway, "old", &get("/system/functions")).await.status(), 200);
    secret.change("admin", "");
    secret.change("admin", "new");
    accepted.set(&["new"]);
    eventually("the new password is accepted", async || {
        with_password(&gateway, "new", &get("/system/functions")).await.status() == 200
    })
    .await;
    assert_eq!(with_password(&gateway, "old", &get("/system/functions")).await.status(), 401);
}

/// Changes the credentials of gateway and process provider one after the other. No request may be refused meanwhile.
async fn change_one_after_the_other(gateway_first: bool) {
    let (gateway_secret, provider_secret) = (Mounted::with("old"), Mounted::with("old"));
    let state = tempfile::tempdir().unwrap();
    let provider = provider_secret.settings(Gateway::process_provider(state.path())).start().await;
    let builder = Gateway::builder()
        .var("functions_provider_url", format!("http://{}", provider.address))
        .var("scale_from_zero", "true")
        .var("function_namespace", "openfaas-fn");
    let gateway = gateway_secret.settings(builder).start().await;
    let deployment = json!({ "service": "echo", "image": "", "envProcess": "cat" }).to_string();
    let deploy = request("POST", "/system/functions", &[], &deployment);
    let response = with_password(&gateway, "old", &deploy).await;
    assert_eq!(response.status(), 202, "{response}");
    eventually("the function is ready", async || {
        gateway.is_ready().await && gateway.post("/function/echo", "x").await.status() == 200
    })
    .await;
    let stop = CancellationToken::new();
    let change = async {
        let (first, second) = match gateway_first {
            true => ((&gateway_secret, &gateway), (&provider_secret, &provider)),
            false => ((&provider_secret, &provider), (&gateway_secret, &gateway)),
        };
        for (step, (secret, process)) in [first, second].into_iter().enumerate() {
            secret.change("admin", "new");
            process.wait_for_log("Credentials changed").await;
            let password = if gateway_first || step == 1 { "new" } else { "old" };
            let update = request("PUT", "/system/functions", &[], &deployment);
            let scale = json!({ "serviceName": "echo", "replicas": 1 }).to_string();
            let scale = post("/system/scale-function/echo", &scale);
            for api_request in
                [update, scale, get("/system/function/echo"), get("/system/functions")]
            {
                let response = with_password(&gateway, password, &api_request).await;
                assert!(response.status() < 300, "{api_request}\n{response}");
            }
        }
        eventually("readiness reports no problem", async || ready(&gateway).await.1 == "[]").await;
        stop.cancel();
    };
    let ((calls, refused), ()) = tokio::join!(keep_calling(&gateway, stop.clone()), change);
    assert!(calls > 0 && refused.is_empty(), "of {calls}: {refused:#?}");
    let response = with_password(&provider, "wrong", &get("/system/functions")).await;
    assert_eq!(response.status(), 401);
}

#[tokio::test]
async fn no_call_fails_when_the_process_provider_reloads_after_its_gateway() {
    change_one_after_the_other(true).await;
}

#[tokio::test]
async fn no_call_fails_when_the_process_provider_reloads_before_its_gateway() {
    change_one_after_the_other(false).await;
}
