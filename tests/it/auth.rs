//! Who may use the API, and with which credentials the provider is asked.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tempfile::TempDir;

use crate::support::eventually;
use crate::support::gateway::{Builder, Gateway};
use crate::support::provider::Provider;
use crate::support::wire::Answer;

fn basic(pair: &str) -> String {
    format!("Basic {}", STANDARD.encode(pair))
}

fn secrets(user: &str, password: &str) -> TempDir {
    let secrets = tempfile::tempdir().unwrap();
    write(&secrets, "basic-auth-user", user);
    write(&secrets, "basic-auth-password", password);
    secrets
}

fn write(secrets: &TempDir, name: &str, text: &str) {
    std::fs::write(secrets.path().join(name), text).unwrap();
}

fn with_secrets(provider: &Provider, secrets: &TempDir) -> Builder {
    Gateway::builder()
        .provider(provider)
        .var("basic_auth", "true")
        .var("secret_mount_path", secrets.path().display())
}

async fn get_as(gateway: &Gateway, pair: &str, target: &str) -> Answer {
    let authorization = basic(pair);
    let request =
        format!("GET {target} HTTP/1.1\r\nHost: g\r\nAuthorization: {authorization}\r\n\r\n");
    gateway.connect().await.ask(request).await
}

#[tokio::test]
async fn credentials_that_change_on_disk_change_in_use() {
    let provider = Provider::by_hand();
    let secrets = secrets("admin\n", "old\n");
    let gateway = with_secrets(&provider, &secrets).start().await;
    assert_eq!(get_as(&gateway, "admin:old", "/system/functions").await.status(), 200);
    assert_eq!(get_as(&gateway, "admin:new", "/system/functions").await.status(), 401);

    write(&secrets, "basic-auth-password", "new\n");
    eventually("the new one is let in", async || {
        get_as(&gateway, "admin:new", "/system/functions").await.status() == 200
    })
    .await;
    assert_eq!(get_as(&gateway, "admin:old", "/system/functions").await.status(), 401);
    let asked = provider.asked();
    let given: Vec<_> = asked.iter().map(|(head, _)| head.header("authorization")).collect();
    assert_eq!(given.first().unwrap(), &Some(basic("admin:old").as_str()));
    assert_eq!(given.last().unwrap(), &Some(basic("admin:new").as_str()));

    // Files that go away for a moment, or are being written, take nothing away.
    write(&secrets, "basic-auth-password", "");
    gateway.logs("Cannot read the credentials").await;
    assert_eq!(get_as(&gateway, "admin:new", "/system/functions").await.status(), 200);
}

#[tokio::test]
async fn the_provider_is_polled_with_the_credentials() {
    let provider = Provider::builder()
        .api(|head, _| {
            let admitted = head.header("authorization") == Some(basic("admin:s3cret").as_str());
            (!admitted).then(|| (401, String::new()))
        })
        .start();
    let secrets = secrets("admin", "s3cret");
    let gateway = with_secrets(&provider, &secrets).start().await;
    eventually("ready", async || gateway.is_ready().await).await;
}

#[tokio::test]
async fn functions_get_their_callers_authorization_and_never_the_gateways() {
    let mut provider = Provider::by_hand();
    let secrets = secrets("admin", "s3cret");
    let gateway = with_secrets(&provider, &secrets).start().await;
    let mut caller = gateway.connect().await;
    caller
        .send("GET /function/echo HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer theirs\r\n\r\n")
        .await;
    let mut call = provider.call().await;
    assert_eq!(call.head.header("authorization"), Some("Bearer theirs"));
    call.answer(200, "").await;
    caller.answer().await;
    caller.send(crate::support::wire::get("/function/echo")).await;
    provider.keep(call);
    let mut call = provider.call().await;
    assert_eq!(call.head.header("authorization"), None);
    call.answer(200, "").await;
}

#[tokio::test]
async fn a_start_without_the_files_says_which_one_is_missing() {
    let provider = Provider::by_hand();
    let secrets = tempfile::tempdir().unwrap();
    write(&secrets, "basic-auth-user", "admin");
    for content in [None, Some(" \n")] {
        if let Some(content) = content {
            write(&secrets, "basic-auth-password", content);
        }
        let output = with_secrets(&provider, &secrets).var("log_level", "error").output(&[]).await;
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.contains("basic_auth") && said.contains("basic-auth-password"), "{said}");
    }
}

/// A gateway that asks a service, and the service, which answers `status` with `body`.
async fn asking(status: u16, body: &'static str, path: &str) -> (Provider, Provider, Builder) {
    let judge = Provider::builder().api(move |_, _| Some((status, body.to_owned()))).start();
    let provider = Provider::by_hand();
    let gateway = Gateway::builder()
        .provider(&provider)
        .var("auth_proxy_url", format!("{}{path}", judge.url()));
    (provider, judge, gateway)
}

#[tokio::test]
async fn a_service_that_is_sent_bodies_leaves_them_to_the_provider_too() {
    let (provider, judge, gateway) = asking(200, "fine", "").await;
    let gateway = gateway.var("auth_proxy_pass_body", "true").start().await;
    gateway.post("/system/functions", "{\"service\":\"echo\"}").await;
    gateway
        .connect()
        .await
        .ask(
            "PUT /system/functions HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n\
             4\r\n{\"a\"\r\n4\r\n: 1}\r\n0\r\n\r\n",
        )
        .await;
    for asked in [judge.asked(), provider.asked()] {
        let bodies: Vec<_> = asked.iter().map(|(_, body)| body.as_slice()).collect();
        assert_eq!(bodies, [b"{\"service\":\"echo\"}".as_slice(), b"{\"a\": 1}"]);
    }
    let large = "x".repeat((1 << 20) + 1);
    assert_eq!(gateway.post("/system/functions", &large).await.status(), 413);
    assert_eq!(judge.asked().len(), 2);
}

#[tokio::test]
async fn a_service_that_refuses_is_heard() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let provider = Provider::by_hand();
    let gateway = Gateway::builder().provider(&provider).var("auth_proxy_url", url).start().await;
    let mut caller = gateway.connect().await;
    caller.send(crate::support::wire::get("/system/functions")).await;
    let (tcp, _) = listener.accept().await.unwrap();
    let mut judge = crate::support::wire::Wire::new(tcp);
    assert_eq!(judge.head().await.target(), "/");
    judge
        .send(
            "HTTP/1.1 401 X\r\nWWW-Authenticate: Bearer realm=\"x\"\r\nX-Internal: secret\r\n\
             Content-Type: text/html\r\nContent-Length: 4\r\n\r\nwho?",
        )
        .await;
    let answer = caller.answer().await;
    assert_eq!((answer.status(), answer.text()), (401, "who?"));
    assert_eq!(answer.header("www-authenticate"), Some("Bearer realm=\"x\""));
    assert_eq!(answer.header("content-type"), Some("text/html"));
    assert_eq!(answer.header("x-internal"), None);
    assert!(provider.asked().is_empty());
}

#[tokio::test]
async fn without_the_service_nobody_is_let_in() {
    let (provider, judge, gateway) = asking(200, "", "").await;
    let gateway = gateway.start().await;
    let address = judge.address;
    assert_eq!(gateway.get("/system/functions").await.status(), 200);
    let before = provider.asked().len();
    drop(judge);
    eventually("it is away", async || tokio::net::TcpStream::connect(address).await.is_err()).await;
    for target in ["/system/functions", "/system/secrets", "/ui/"] {
        let answer = gateway.get(target).await;
        assert_eq!(answer.status(), 502, "{target}: {answer}");
    }
    assert_eq!(provider.asked().len(), before);
}

#[tokio::test]
async fn a_service_that_agrees_lets_calls_of_the_api_pass() {
    let (provider, judge, gateway) = asking(204, "", "/validate").await;
    let gateway = gateway.start().await;
    let answer = gateway.post("/system/functions?x=1", "{\"service\":\"echo\"}").await;
    assert_eq!(answer.status(), 200, "{answer}");
    let asked = judge.asked();
    assert_eq!(asked.len(), 1);
    let (question, body) = &asked[0];
    // At the very URL that was set: a server may tell it from one with a slash behind it.
    assert_eq!((question.method(), question.target()), ("POST", "/validate"));
    assert!(body.is_empty());
    let passed = provider.asked();
    assert_eq!(passed.last().unwrap().0.target(), "/system/functions?x=1");
    assert_eq!(passed.last().unwrap().1, b"{\"service\":\"echo\"}");
    assert_eq!(gateway.get("/_/healthz").await.status(), 200);
    assert_eq!(judge.asked().len(), 1);
}
