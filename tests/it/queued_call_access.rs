//! Access to a queued call: for clients that have its generated id, and for users of the API.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tempfile::TempDir;

use crate::support::connection::Response;
use crate::support::eventually;
use crate::support::gateway::{Builder, Gateway};
use crate::support::provider::Provider;
use crate::support::queue::{replying_with, with_embedded_queue};

/// What guards the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guard {
    Nothing,
    BasicAuth,
    Service,
    Both,
}

struct Setup {
    _provider: Provider,
    /// Allows requests with the right credentials.
    auth_service: Provider,
    _state: TempDir,
    gateway: Gateway,
}

const UNGUESSABLE: &str = "6f1f3a66-3f43-4a0d-9c7b-0f4f0a9f2f10";

fn authorization() -> String {
    format!("Authorization: Basic {}", STANDARD.encode("admin:s3cret"))
}

async fn start(guard: Guard, change: impl FnOnce(Builder) -> Builder) -> Setup {
    let (provider, state) = (replying_with(&[200], "done"), tempfile::tempdir().unwrap());
    let auth_service = Provider::builder().api(|head, _| {
        let given = head.header("authorization").map(|value| format!("Authorization: {value}"));
        let status = if given == Some(authorization()) { 200 } else { 403 };
        Some((status, "the auth service's own text".to_owned()))
    });
    let auth_service = auth_service.start();
    std::fs::write(state.path().join("basic-auth-user"), "admin").unwrap();
    std::fs::write(state.path().join("basic-auth-password"), "s3cret").unwrap();
    let mut builder = with_embedded_queue(&provider, state.path())
        .var("secret_mount_path", state.path().display());
    if matches!(guard, Guard::BasicAuth | Guard::Both) {
        builder = builder.var("basic_auth", "true");
    }
    if matches!(guard, Guard::Service | Guard::Both) {
        builder = builder.var("auth_proxy_url", auth_service.url());
    }
    let gateway = change(builder).start().await;
    Setup { _provider: provider, auth_service, _state: state, gateway }
}

/// Sends every request about the call `id`, with `headers`.
async fn request_all(gateway: &Gateway, id: &str, headers: &[&str]) -> Vec<Response> {
    let (state, result) = (format!("/async-function/{id}"), format!("/async-function/{id}/result"));
    let requests = [("GET", &state), ("HEAD", &state), ("GET", &result), ("DELETE", &state)];
    let mut responses = Vec::new();
    for (method, target) in requests {
        // A response to HEAD has no body, whatever its content length.
        let mut connection = gateway.connect().await;
        connection.send(crate::support::connection::request(method, target, headers, "")).await;
        responses.push(match method {
            "HEAD" => Response { head: connection.read_head().await, body: Vec::new() },
            _ => connection.read_response().await,
        });
    }
    responses
}

/// A response without the parts that differ from one request to the next.
fn comparable(response: &Response) -> (u16, Vec<(String, String)>, Vec<u8>) {
    let headers = response.head.headers.iter().filter(|(name, _)| name != "date");
    (response.status(), headers.cloned().collect(), response.body.clone())
}

/// Enqueues calls with chosen ids, pending and finished, and one with an idempotency key.
async fn enqueue_with_chosen_ids(gateway: &Gateway) -> Vec<String> {
    let later = "X-Delay-Seconds: 600";
    let mut ids = vec![gateway.enqueue("echo", &["X-Call-Id: order-42", later], "").await];
    ids.push(gateway.enqueue("echo", &[&format!("X-Call-Id: {UNGUESSABLE}"), later], "").await);
    ids.push(gateway.enqueue("echo", &["Idempotency-Key: k", later], "").await);
    let finished = gateway.enqueue("echo", &["X-Call-Id: order-41"], "").await;
    let credentials = authorization();
    eventually("one call has finished", async || {
        let target = format!("/async-function/{finished}");
        gateway.request("GET", &target, &[&credentials]).await.json()["state"] == "succeeded"
    })
    .await;
    ids.push(finished);
    ids
}

#[tokio::test]
async fn a_guarded_api_responds_equally_to_unknown_and_forbidden_ids() {
    for guard in [Guard::BasicAuth, Guard::Service, Guard::Both] {
        let setup = start(guard, |builder| builder).await;
        let gateway = &setup.gateway;
        let ids = enqueue_with_chosen_ids(gateway).await;
        let wrong = format!("Authorization: Basic {}", STANDARD.encode("admin:wrong"));
        for headers in [&[][..], &[wrong.as_str()]] {
            let expect: Vec<_> = request_all(gateway, "no-such-call", headers)
                .await
                .iter()
                .map(comparable)
                .collect();
            let status = if guard == Guard::BasicAuth { 401 } else { 403 };
            assert!(expect.iter().all(|(got, ..)| *got == status), "{guard:?}: {expect:?}");
            let missing = ["f3b1cb1e-8e1a-4d0c-8d64-2f6a3a7f7b11".to_owned()];
            for id in ids.iter().chain(&missing) {
                let got: Vec<_> =
                    request_all(gateway, id, headers).await.iter().map(comparable).collect();
                assert_eq!(got, expect, "{guard:?}: {id}");
            }
        }
        // Nothing was cancelled, and a user of the API can see and cancel all of it.
        let credentials = authorization();
        for (id, statuses) in ids.iter().zip([
            [200, 200, 409, 204],
            [200, 200, 409, 204],
            [200, 200, 409, 204],
            [200, 200, 200, 409],
        ]) {
            let got = request_all(gateway, id, &[&credentials]).await;
            let got: Vec<_> = got.iter().map(Response::status).collect();
            assert_eq!(got, statuses, "{guard:?}: {id}");
        }
        let missing = request_all(gateway, "no-such-call", &[&credentials]).await;
        assert!(missing.iter().all(|response| response.status() == 404), "{guard:?}");
    }
}

#[tokio::test]
async fn a_generated_id_gives_access_to_its_call() {
    for guard in [Guard::BasicAuth, Guard::Service, Guard::Both, Guard::Nothing] {
        let setup = start(guard, |builder| builder.var("result_ttl", "1s")).await;
        let gateway = &setup.gateway;
        let waits = gateway.enqueue("echo", &["X-Delay-Seconds: 600"], "").await;
        let got: Vec<_> =
            request_all(gateway, &waits, &[]).await.iter().map(Response::status).collect();
        assert_eq!(got, [200, 200, 409, 204], "{guard:?}");
        assert!(setup.auth_service.api_requests().is_empty(), "{guard:?}");
        // After its expiry the id is unknown, as if it had never existed.
        let status = match guard {
            Guard::Nothing => 404,
            Guard::BasicAuth => 401,
            Guard::Service | Guard::Both => 403,
        };
        eventually("the result expires", async || {
            gateway.get(&format!("/async-function/{waits}")).await.status() == status
        })
        .await;
    }
}

#[tokio::test]
async fn an_unguarded_api_gives_access_to_calls_with_any_id() {
    let setup = start(Guard::Nothing, |builder| builder).await;
    for id in enqueue_with_chosen_ids(&setup.gateway).await {
        assert_eq!(setup.gateway.get(&format!("/async-function/{id}")).await.status(), 200);
    }
    assert_eq!(setup.gateway.get("/async-function/no-such-call").await.status(), 404);
}

#[tokio::test]
async fn no_call_is_shown_while_the_auth_service_is_unavailable() {
    let setup = start(Guard::Service, |builder| builder).await;
    setup.gateway.enqueue("echo", &["X-Call-Id: mine", "X-Delay-Seconds: 600"], "").await;
    let address = setup.auth_service.address;
    drop(setup.auth_service);
    eventually("the server is unavailable", async || {
        tokio::net::TcpStream::connect(address).await.is_err()
    })
    .await;
    let [known, missing] = ["mine", "other"].map(|id| format!("/async-function/{id}"));
    let known = setup.gateway.get(&known).await;
    let missing = setup.gateway.get(&missing).await;
    assert_eq!(comparable(&known), comparable(&missing));
    assert_eq!(known.status(), 502, "{known}");
}

#[tokio::test]
async fn a_chosen_id_is_not_looked_up_before_its_client_is_authorized() {
    // This queue is unreachable.
    let with_unreachable_queue = |builder: Builder| {
        let builder = builder.var("queue", "jetstream").var("faas_nats_address", "127.0.0.1");
        builder.var("faas_nats_port", "1")
    };
    let setup = start(Guard::BasicAuth, with_unreachable_queue).await;
    let target = "/async-function/order-42";
    assert_eq!(setup.gateway.get(target).await.status(), 401);
    let credentials = authorization();
    assert_eq!(setup.gateway.request("GET", target, &[&credentials]).await.status(), 503);
    let executed = format!("/async-function/{UNGUESSABLE}");
    assert_eq!(setup.gateway.get(&executed).await.status(), 503);
}
