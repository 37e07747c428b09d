//! Authentication for the API, and the credentials that the provider is sent.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tempfile::TempDir;

use crate::support::connection::Response;
use crate::support::eventually;
use crate::support::gateway::{Builder, Gateway};
use crate::support::provider::Provider;

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

async fn get_as(gateway: &Gateway, pair: &str, target: &str) -> Response {
    let authorization = basic(pair);
    let request =
        format!("GET {target} HTTP/1.1\r\nHost: g\r\nAuthorization: {authorization}\r\n\r\n");
    gateway.connect().await.exchange(request).await
}

#[tokio::test]
async fn changed_credential_files_are_reloaded() {
    let provider = Provider::manual();
    let secrets = secrets("admin\n", "old\n");
    let gateway = with_secrets(&provider, &secrets).start().await;
    assert_eq!(get_as(&gateway, "admin:old", "/system/functions").await.status(), 200);
    assert_eq!(get_as(&gateway, "admin:new", "/system/functions").await.status(), 401);

    write(&secrets, "basic-auth-password", "new\n");
    eventually("the new password is accepted", async || {
        get_as(&gateway, "admin:new", "/system/functions").await.status() == 200
    })
    .await;
    assert_eq!(get_as(&gateway, "admin:old", "/system/functions").await.status(), 401);
    let requests = provider.api_requests();
    let given: Vec<_> = requests.iter().map(|(head, _)| head.header("authorization")).collect();
    assert_eq!(given.first().unwrap(), &Some(basic("admin:old").as_str()));
    assert_eq!(given.last().unwrap(), &Some(basic("admin:new").as_str()));

    // Missing or incomplete files change nothing.
    write(&secrets, "basic-auth-password", "");
    gateway.wait_for_log("Cannot read the credentials").await;
    assert_eq!(get_as(&gateway, "admin:new", "/system/functions").await.status(), 200);
}

#[tokio::test]
async fn the_provider_is_polled_with_credentials() {
    let provider = Provider::builder()
        .api(|head, _| {
            let admitted = head.header("authorization") == Some(basic("admin:s3cret").as_str());
            (!admitted).then(|| (401, String::new()))
        })
        .start();
    let secrets = secrets("admin", "s3cret");
    let gateway = with_secrets(&provider, &secrets).start().await;
    eventually("the gateway is ready", async || gateway.is_ready().await).await;
}

#[tokio::test]
async fn functions_receive_the_clients_authorization_and_never_the_gateways() {
    let mut provider = Provider::manual();
    let secrets = secrets("admin", "s3cret");
    let gateway = with_secrets(&provider, &secrets).start().await;
    let mut client = gateway.connect().await;
    client
        .send("GET /function/echo HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer theirs\r\n\r\n")
        .await;
    let mut call = provider.next_call().await;
    assert_eq!(call.head.header("authorization"), Some("Bearer theirs"));
    call.respond(200, "").await;
    client.read_response().await;
    client.send(crate::support::connection::get("/function/echo")).await;
    provider.reuse_connection(call);
    let mut call = provider.next_call().await;
    assert_eq!(call.head.header("authorization"), None);
    call.respond(200, "").await;
}

#[tokio::test]
async fn a_missing_credential_file_is_named_at_startup() {
    let provider = Provider::manual();
    let secrets = tempfile::tempdir().unwrap();
    write(&secrets, "basic-auth-user", "admin");
    for content in [None, Some(" \n")] {
        if let Some(content) = content {
            write(&secrets, "basic-auth-password", content);
        }
        let output =
            with_secrets(&provider, &secrets).var("log_level", "error").run_to_exit(&[]).await;
        let error_text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{error_text}");
        assert_eq!(error_text.lines().count(), 1, "{error_text}");
        assert!(
            error_text.contains("basic_auth") && error_text.contains("basic-auth-password"),
            "{error_text}"
        );
    }
}

/// A gateway with an auth service that responds with `status` and `body`.
async fn with_auth_service(
    status: u16,
    body: &'static str,
    path: &str,
) -> (Provider, Provider, Builder) {
    let auth_service = Provider::builder().api(move |_, _| Some((status, body.to_owned()))).start();
    let provider = Provider::manual();
    let gateway = Gateway::builder()
        .provider(&provider)
        .var("auth_proxy_url", format!("{}{path}", auth_service.url()));
    (provider, auth_service, gateway)
}

#[tokio::test]
async fn request_bodies_reach_the_auth_service_and_the_provider() {
    let (provider, auth_service, gateway) = with_auth_service(200, "fine", "").await;
    let gateway = gateway.var("auth_proxy_pass_body", "true").start().await;
    gateway.post("/system/functions", "{\"service\":\"echo\"}").await;
    gateway
        .connect()
        .await
        .exchange(
            "PUT /system/functions HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n\
             4\r\n{\"a\"\r\n4\r\n: 1}\r\n0\r\n\r\n",
        )
        .await;
    for requests in [auth_service.api_requests(), provider.api_requests()] {
        let bodies: Vec<_> = requests.iter().map(|(_, body)| body.as_slice()).collect();
        assert_eq!(bodies, [b"{\"service\":\"echo\"}".as_slice(), b"{\"a\": 1}"]);
    }
    let large = "x".repeat((1 << 20) + 1);
    assert_eq!(gateway.post("/system/functions", &large).await.status(), 413);
    assert_eq!(auth_service.api_requests().len(), 2);
}

#[tokio::test]
async fn a_refusal_by_the_auth_service_reaches_the_client() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    let provider = Provider::manual();
    let gateway = Gateway::builder().provider(&provider).var("auth_proxy_url", url).start().await;
    let mut client = gateway.connect().await;
    client.send(crate::support::connection::get("/system/functions")).await;
    let (tcp, _) = listener.accept().await.unwrap();
    let mut auth_service = crate::support::connection::Connection::new(tcp);
    assert_eq!(auth_service.read_head().await.target(), "/");
    auth_service
        .send(
            "HTTP/1.1 401 X\r\nWWW-Authenticate: Bearer realm=\"x\"\r\nX-Internal: secret\r\n\
             Content-Type: text/html\r\nContent-Length: 4\r\n\r\nwho?",
        )
        .await;
    let response = client.read_response().await;
    assert_eq!((response.status(), response.text()), (401, "who?"));
    assert_eq!(response.header("www-authenticate"), Some("Bearer realm=\"x\""));
    assert_eq!(response.header("content-type"), Some("text/html"));
    assert_eq!(response.header("x-internal"), None);
    assert!(provider.api_requests().is_empty());
}

#[tokio::test]
async fn requests_are_refused_while_the_auth_service_is_unavailable() {
    let (provider, auth_service, gateway) = with_auth_service(200, "", "").await;
    let gateway = gateway.start().await;
    let address = auth_service.address;
    assert_eq!(gateway.get("/system/functions").await.status(), 200);
    let before = provider.api_requests().len();
    drop(auth_service);
    eventually("the server is unavailable", async || {
        tokio::net::TcpStream::connect(address).await.is_err()
    })
    .await;
    for target in ["/system/functions", "/system/secrets", "/ui/"] {
        let response = gateway.get(target).await;
        assert_eq!(response.status(), 502, "{target}: {response}");
    }
    assert_eq!(provider.api_requests().len(), before);
}

#[tokio::test]
async fn requests_that_the_auth_service_allows_reach_the_provider() {
    let (provider, auth_service, gateway) = with_auth_service(204, "", "/validate").await;
    let gateway = gateway.start().await;
    let response = gateway.post("/system/functions?x=1", "{\"service\":\"echo\"}").await;
    assert_eq!(response.status(), 200, "{response}");
    let requests = auth_service.api_requests();
    assert_eq!(requests.len(), 1);
    let (question, body) = &requests[0];
    // Exactly the configured URL: a server may treat a trailing slash differently.
    assert_eq!((question.method(), question.target()), ("POST", "/validate"));
    assert!(body.is_empty());
    let passed = provider.api_requests();
    assert_eq!(passed.last().unwrap().0.target(), "/system/functions?x=1");
    assert_eq!(passed.last().unwrap().1, b"{\"service\":\"echo\"}");
    assert_eq!(gateway.get("/_/healthz").await.status(), 200);
    assert_eq!(auth_service.api_requests().len(), 1);
}
