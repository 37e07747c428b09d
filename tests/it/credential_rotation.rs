//! Credentials that change while everything runs: gateway and provider read the change at different times.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::support::eventually;
use crate::support::gateway::{Builder, Gateway};
use crate::support::provider::{self, Provider};
use crate::support::replicas::Replicas;
use crate::support::wire::{Answer, Wire, get, post, request};

/// A Secret as the kubelet mounts it: all files change at once, when a link is moved.
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

/// A function that can be called.
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

    /// A provider that answers all others with `status`, and calls of functions in any case.
    fn provider(&self, status: u16) -> provider::Builder {
        let accepted = self.clone();
        let api = move |head: &crate::support::wire::Head, _: &[u8]| {
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
        Provider::builder().lists(&format!("[{ECHO}]")).api(api).answering(echo)
    }
}

async fn echo(mut call: provider::Call) -> Option<Wire> {
    let body = call.body().await.ok()?;
    call.answer_with(200, &body).await;
    Some(call.wire)
}

async fn with_password(gateway: &Gateway, password: &str, asked: &str) -> Answer {
    let (line, rest) = asked.split_once("\r\n").unwrap();
    let authorization = basic(password);
    let asked = format!("{line}\r\nAuthorization: {authorization}\r\n{rest}");
    gateway.connect().await.ask(asked).await
}

/// What `/_/ready` says: its status, what is degraded, and why.
async fn ready(gateway: &Gateway) -> (u16, String, String) {
    let answer = gateway.get("/_/ready").await;
    let state = answer.json();
    (answer.status(), state["degraded"].to_string(), state["reasons"].to_string())
}

/// Calls `echo`, and asks whether the gateway is ready, again and again until told to stop: what was refused.
async fn keep_calling(gateway: &Gateway, stop: CancellationToken) -> (usize, Vec<String>) {
    let (mut calls, mut refused) = (0, Vec::new());
    while !stop.is_cancelled() {
        for asked in [get("/_/ready"), post("/function/echo", "hello")] {
            let answer = gateway.connect().await.ask(asked).await;
            if answer.status() != 200 {
                refused.push(answer.to_string());
            }
        }
        calls += 1;
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    (calls, refused)
}

#[tokio::test]
async fn a_changed_password_that_the_provider_reads_later_refuses_no_call() {
    let (accepted, secret) = (Accepted::only("old"), Mounted::with("old"));
    let provider = accepted.provider(401).start();
    let builder = Gateway::builder().provider(&provider).var("scale_from_zero", "true");
    let gateway = secret.settings(builder).start().await;
    eventually("ready", async || gateway.is_ready().await).await;
    let stop = CancellationToken::new();
    let change = async {
        secret.change("admin", "new");
        gateway.logs("Credentials changed").await;
        eventually("the provider is behind", async || {
            let (status, degraded, reasons) = ready(&gateway).await;
            assert_eq!(status, 200, "{reasons}");
            degraded == r#"["credentials"]"# && reasons.contains("previous credentials")
        })
        .await;
        // Clients of the gateway's own API need the new one at once.
        assert_eq!(with_password(&gateway, "old", &get("/system/functions")).await.status(), 401);
        let long = format!(r#"{{"service":"echo","image":"{}"}}"#, "x".repeat(2 << 20));
        for body in [r#"{"service":"echo"}"#, &long] {
            let asked = request("PUT", "/system/functions", &[], body);
            let answer = with_password(&gateway, "new", &asked).await;
            assert_eq!(answer.status(), 200, "{answer}");
        }
        let chunked = "PUT /system/functions HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n\
                       2\r\n{}\r\n0\r\n\r\n";
        for asked in [chunked, &get("/system/logs?name=echo"), &get("/system/functions")] {
            let answer = with_password(&gateway, "new", asked).await;
            assert_eq!(answer.status(), 200, "{answer}");
        }
        accepted.set(&["new"]);
        eventually("all is well", async || ready(&gateway).await.1 == "[]").await;
        let asked = request("PUT", "/system/functions", &[], "last");
        assert_eq!(with_password(&gateway, "new", &asked).await.status(), 200);
        stop.cancel();
    };
    let ((calls, refused), ()) = tokio::join!(keep_calling(&gateway, stop.clone()), change);
    assert!(calls > 0 && refused.is_empty(), "of {calls}: {refused:#?}");
    // Whatever was accepted was accepted once, with its whole body.
    let asked = provider.asked();
    let bodies = |password: &str| {
        let given = basic(password);
        let accepted =
            asked.iter().filter(|(head, _)| head.header("authorization") == Some(&given));
        let puts = accepted.filter(|(head, _)| head.method() == "PUT");
        puts.map(|(_, body)| body.len()).collect::<Vec<_>>()
    };
    let long = (2 << 20) + r#"{"service":"echo","image":""}"#.len();
    assert_eq!(bodies("old"), [18, long, 2]);
    assert!(bodies("new").ends_with(&[4]), "{:?}", bodies("new"));
}

#[tokio::test]
async fn a_provider_that_refuses_the_credentials_can_be_called_all_the_same() {
    for (status, scales) in [(401, "true"), (403, "true"), (401, "false")] {
        let provider = Accepted::only("another").provider(status).start();
        let secret = Mounted::with("s3cret");
        let builder = Gateway::builder().provider(&provider).var("scale_from_zero", scales);
        let gateway = secret.settings(builder).start().await;
        eventually("ready", async || gateway.is_ready().await).await;
        let (_, degraded, reasons) = ready(&gateway).await;
        assert_eq!(degraded, r#"["credentials"]"#);
        assert!(reasons.contains("rejects the gateway's credentials"), "{reasons}");
        assert!(reasons.contains(&status.to_string()), "{reasons}");
        for number in 0..3 {
            let answer = gateway.post("/function/echo", &number.to_string()).await;
            assert_eq!((answer.status(), answer.text()), (200, &*number.to_string()));
        }
        assert_eq!(provider.calls(), 3);
        // Functions without replicas get what the provider says, once.
        assert_eq!(gateway.post("/function/made-up", "x").await.status(), 200);
        assert_eq!(provider.calls(), 4);
    }
}

#[tokio::test]
async fn a_function_at_zero_is_called_once_while_nobody_says_how_it_is() {
    let replicas = Replicas::at(0, 0);
    let inner = replicas.provider().start();
    // The API refuses; calls go to a function without replicas.
    let target = inner.address;
    let provider = Provider::builder()
        .api(|_, _| Some((401, String::new())))
        .answering(move |mut call| async move {
            let body = String::from_utf8(call.body().await.ok()?).unwrap();
            let answer = Wire::connect(target).await.ask(post("/function/echo", &body)).await;
            let head = format!(
                "HTTP/1.1 {} X\r\nX-OpenFaaS-Internal: proxy\r\nContent-Length: 0\r\n\r\n",
                answer.status()
            );
            call.wire.send(head).await;
            Some(call.wire)
        })
        .start();
    let secret = Mounted::with("s3cret");
    let builder = Gateway::builder().provider(&provider).var("scale_from_zero", "true");
    let gateway = secret.settings(builder).start().await;
    let answer = gateway.post("/function/echo", "hello").await;
    assert_eq!(answer.status(), 503, "{answer}");
    assert_eq!((provider.calls(), replicas.with(|it| it.calls.len())), (1, 1));
}

#[tokio::test]
async fn a_name_that_the_provider_refuses_to_answer_for_leads_to_no_host() {
    let provider = Accepted::only("another").provider(401).start();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:8080").await.ok();
    for scales in ["true", "false"] {
        let secret = Mounted::with("s3cret");
        let builder = Gateway::builder()
            .provider(&provider)
            .var("scale_from_zero", scales)
            .var("direct_functions", "true");
        let gateway = secret.settings(builder).start().await;
        let answer = gateway.get("/function/localhost").await;
        assert!([500, 503].contains(&answer.status()), "{answer}");
        assert!(answer.text().contains("rejects the gateway's credentials"), "{answer}");
    }
    if let Some(listener) = listener {
        use futures_util::FutureExt;
        assert!(listener.accept().now_or_never().is_none());
    }
}

#[tokio::test]
async fn a_provider_that_answers_with_an_error_can_be_called() {
    let provider = Provider::builder()
        .api(|_, _| Some((500, "the cluster is away".to_owned())))
        .answering(echo)
        .start();
    let gateway = Gateway::before(&provider).await;
    eventually("ready", async || gateway.is_ready().await).await;
    let (_, degraded, reasons) = ready(&gateway).await;
    assert_eq!(degraded, r#"["provider"]"#);
    assert!(reasons.contains("500"), "{reasons}");
    assert_eq!(gateway.post("/function/echo", "hello").await.text(), "hello");
}

#[tokio::test]
async fn files_that_are_being_replaced_are_not_believed() {
    let (accepted, secret) = (Accepted::only("old"), Mounted::with("old"));
    let provider = accepted.provider(401).start();
    let gateway = secret.settings(Gateway::builder().provider(&provider)).start().await;
    eventually("ready", async || gateway.is_ready().await).await;
    let data = secret.directory.path().join("..data");
    std::fs::remove_file(&data).unwrap();
    gateway.logs("Cannot read the credentials").await;
    assert_eq!(with_password(&gateway, "old", &get("/system/functions")).await.status(), 200);
    secret.change("admin", "");
    secret.change("admin", "new");
    accepted.set(&["new"]);
    eventually("the new one is let in", async || {
        with_password(&gateway, "new", &get("/system/functions")).await.status() == 200
    })
    .await;
    assert_eq!(with_password(&gateway, "old", &get("/system/functions")).await.status(), 401);
}

/// Changes `first` and then `second`, with a gateway before a real process provider: what is refused meanwhile.
async fn changed_one_after_the_other(gateway_first: bool) {
    let (ours, theirs) = (Mounted::with("old"), Mounted::with("old"));
    let state = tempfile::tempdir().unwrap();
    let provider = theirs.settings(Gateway::process_provider(state.path())).start().await;
    let builder = Gateway::builder()
        .var("functions_provider_url", format!("http://{}", provider.address))
        .var("scale_from_zero", "true")
        .var("function_namespace", "openfaas-fn");
    let gateway = ours.settings(builder).start().await;
    let deployment = json!({ "service": "echo", "image": "", "envProcess": "cat" }).to_string();
    let deploy = request("POST", "/system/functions", &[], &deployment);
    let answer = with_password(&gateway, "old", &deploy).await;
    assert_eq!(answer.status(), 202, "{answer}");
    eventually("it is ready", async || {
        gateway.is_ready().await && gateway.post("/function/echo", "x").await.status() == 200
    })
    .await;
    let stop = CancellationToken::new();
    let change = async {
        let (first, second) = match gateway_first {
            true => ((&ours, &gateway), (&theirs, &provider)),
            false => ((&theirs, &provider), (&ours, &gateway)),
        };
        for (step, (secret, process)) in [first, second].into_iter().enumerate() {
            secret.change("admin", "new");
            process.logs("Credentials changed").await;
            let password = if gateway_first || step == 1 { "new" } else { "old" };
            let update = request("PUT", "/system/functions", &[], &deployment);
            let scale = json!({ "serviceName": "echo", "replicas": 1 }).to_string();
            let scale = post("/system/scale-function/echo", &scale);
            for asked in [update, scale, get("/system/function/echo"), get("/system/functions")] {
                let answer = with_password(&gateway, password, &asked).await;
                assert!(answer.status() < 300, "{asked}\n{answer}");
            }
        }
        eventually("all is well", async || ready(&gateway).await.1 == "[]").await;
        stop.cancel();
    };
    let ((calls, refused), ()) = tokio::join!(keep_calling(&gateway, stop.clone()), change);
    assert!(calls > 0 && refused.is_empty(), "of {calls}: {refused:#?}");
    let asked = with_password(&provider, "wrong", &get("/system/functions")).await;
    assert_eq!(asked.status(), 401);
}

#[tokio::test]
async fn a_process_provider_that_reads_the_change_after_its_gateway_refuses_nothing() {
    changed_one_after_the_other(true).await;
}

#[tokio::test]
async fn a_process_provider_that_reads_the_change_before_its_gateway_refuses_nothing() {
    changed_one_after_the_other(false).await;
}
