//! Who may see and cancel a queued call: the client that knows an id which the gateway made, or a user of the API.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tempfile::TempDir;

use crate::support::eventually;
use crate::support::gateway::{Builder, Gateway};
use crate::support::provider::Provider;
use crate::support::queue::{answering, queueing};
use crate::support::wire::Answer;

/// What guards the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guard {
    Nothing,
    BasicAuth,
    Service,
    Both,
}

struct Parts {
    _provider: Provider,
    /// Lets those pass who have the right credentials.
    judge: Provider,
    _state: TempDir,
    gateway: Gateway,
}

const UNGUESSABLE: &str = "6f1f3a66-3f43-4a0d-9c7b-0f4f0a9f2f10";

fn authorization() -> String {
    format!("Authorization: Basic {}", STANDARD.encode("admin:s3cret"))
}

async fn start(guard: Guard, change: impl FnOnce(Builder) -> Builder) -> Parts {
    let (provider, state) = (answering(&[200], "done"), tempfile::tempdir().unwrap());
    let judge = Provider::builder().api(|head, _| {
        let given = head.header("authorization").map(|value| format!("Authorization: {value}"));
        let status = if given == Some(authorization()) { 200 } else { 403 };
        Some((status, "the judge's own words".to_owned()))
    });
    let judge = judge.start();
    std::fs::write(state.path().join("basic-auth-user"), "admin").unwrap();
    std::fs::write(state.path().join("basic-auth-password"), "s3cret").unwrap();
    let mut builder =
        queueing(&provider, state.path()).var("secret_mount_path", state.path().display());
    if matches!(guard, Guard::BasicAuth | Guard::Both) {
        builder = builder.var("basic_auth", "true");
    }
    if matches!(guard, Guard::Service | Guard::Both) {
        builder = builder.var("auth_proxy_url", judge.url());
    }
    let gateway = change(builder).start().await;
    Parts { _provider: provider, judge, _state: state, gateway }
}

/// All that can be asked of the call `id`, with `headers`.
async fn asked(gateway: &Gateway, id: &str, headers: &[&str]) -> Vec<Answer> {
    let (state, result) = (format!("/async-function/{id}"), format!("/async-function/{id}/result"));
    let requests = [("GET", &state), ("HEAD", &state), ("GET", &result), ("DELETE", &state)];
    let mut answers = Vec::new();
    for (method, target) in requests {
        // HEAD has no body, whatever its length says.
        let mut wire = gateway.connect().await;
        wire.send(crate::support::wire::request(method, target, headers, "")).await;
        answers.push(match method {
            "HEAD" => Answer { head: wire.head().await, body: Vec::new() },
            _ => wire.answer().await,
        });
    }
    answers
}

/// An answer without what differs from one request to the next.
fn comparable(answer: &Answer) -> (u16, Vec<(String, String)>, Vec<u8>) {
    let headers = answer.head.headers.iter().filter(|(name, _)| name != "date");
    (answer.status(), headers.cloned().collect(), answer.body.clone())
}

/// Calls whose ids were chosen, waiting and finished, and one under an idempotency key.
async fn chosen(gateway: &Gateway) -> Vec<String> {
    let later = "X-Delay-Seconds: 600";
    let mut ids = vec![gateway.queued("echo", &["X-Call-Id: order-42", later], "").await];
    ids.push(gateway.queued("echo", &[&format!("X-Call-Id: {UNGUESSABLE}"), later], "").await);
    ids.push(gateway.queued("echo", &["Idempotency-Key: k", later], "").await);
    let finished = gateway.queued("echo", &["X-Call-Id: order-41"], "").await;
    let credentials = authorization();
    eventually("one is over", async || {
        let target = format!("/async-function/{finished}");
        gateway.ask("GET", &target, &[&credentials]).await.json()["state"] == "succeeded"
    })
    .await;
    ids.push(finished);
    ids
}

#[tokio::test]
async fn a_guarded_api_says_the_same_of_every_id_that_opens_nothing() {
    for guard in [Guard::BasicAuth, Guard::Service, Guard::Both] {
        let parts = start(guard, |it| it).await;
        let gateway = &parts.gateway;
        let ids = chosen(gateway).await;
        let wrong = format!("Authorization: Basic {}", STANDARD.encode("admin:wrong"));
        for headers in [&[][..], &[wrong.as_str()]] {
            let expect: Vec<_> =
                asked(gateway, "no-such-call", headers).await.iter().map(comparable).collect();
            let status = if guard == Guard::BasicAuth { 401 } else { 403 };
            assert!(expect.iter().all(|(got, ..)| *got == status), "{guard:?}: {expect:?}");
            let missing = ["f3b1cb1e-8e1a-4d0c-8d64-2f6a3a7f7b11".to_owned()];
            for id in ids.iter().chain(&missing) {
                let got: Vec<_> =
                    asked(gateway, id, headers).await.iter().map(comparable).collect();
                assert_eq!(got, expect, "{guard:?}: {id}");
            }
        }
        // Nothing was cancelled, and a user of the API sees and cancels all of it.
        let credentials = authorization();
        for (id, statuses) in ids.iter().zip([
            [200, 200, 409, 204],
            [200, 200, 409, 204],
            [200, 200, 409, 204],
            [200, 200, 200, 409],
        ]) {
            let got = asked(gateway, id, &[&credentials]).await;
            let got: Vec<_> = got.iter().map(Answer::status).collect();
            assert_eq!(got, statuses, "{guard:?}: {id}");
        }
        let missing = asked(gateway, "no-such-call", &[&credentials]).await;
        assert!(missing.iter().all(|answer| answer.status() == 404), "{guard:?}");
    }
}

#[tokio::test]
async fn an_id_that_the_gateway_made_opens_its_call_while_it_is_known() {
    for guard in [Guard::BasicAuth, Guard::Service, Guard::Both, Guard::Nothing] {
        let parts = start(guard, |it| it.var("result_ttl", "1s")).await;
        let gateway = &parts.gateway;
        let waits = gateway.queued("echo", &["X-Delay-Seconds: 600"], "").await;
        let got: Vec<_> = asked(gateway, &waits, &[]).await.iter().map(Answer::status).collect();
        assert_eq!(got, [200, 200, 409, 204], "{guard:?}");
        assert!(parts.judge.asked().is_empty(), "{guard:?}");
        // When it has been forgotten it opens nothing, as if it had never been.
        let status = match guard {
            Guard::Nothing => 404,
            Guard::BasicAuth => 401,
            Guard::Service | Guard::Both => 403,
        };
        eventually("it is forgotten", async || {
            gateway.get(&format!("/async-function/{waits}")).await.status() == status
        })
        .await;
    }
}

#[tokio::test]
async fn an_open_api_shows_calls_whatever_their_ids() {
    let parts = start(Guard::Nothing, |it| it).await;
    for id in chosen(&parts.gateway).await {
        assert_eq!(parts.gateway.get(&format!("/async-function/{id}")).await.status(), 200);
    }
    assert_eq!(parts.gateway.get("/async-function/no-such-call").await.status(), 404);
}

#[tokio::test]
async fn a_service_that_is_away_shows_nothing() {
    let parts = start(Guard::Service, |it| it).await;
    parts.gateway.queued("echo", &["X-Call-Id: mine", "X-Delay-Seconds: 600"], "").await;
    let address = parts.judge.address;
    drop(parts.judge);
    eventually("it is away", async || tokio::net::TcpStream::connect(address).await.is_err()).await;
    let [known, missing] = ["mine", "other"].map(|id| format!("/async-function/{id}"));
    let known = parts.gateway.get(&known).await;
    let missing = parts.gateway.get(&missing).await;
    assert_eq!(comparable(&known), comparable(&missing));
    assert_eq!(known.status(), 502, "{known}");
}

#[tokio::test]
async fn an_id_that_can_be_guessed_is_not_looked_up_before_its_client_is_admitted() {
    // No queue answers there.
    let away = |builder: Builder| {
        let builder = builder.var("queue", "jetstream").var("faas_nats_address", "127.0.0.1");
        builder.var("faas_nats_port", "1")
    };
    let parts = start(Guard::BasicAuth, away).await;
    let target = "/async-function/order-42";
    assert_eq!(parts.gateway.get(target).await.status(), 401);
    let credentials = authorization();
    assert_eq!(parts.gateway.ask("GET", target, &[&credentials]).await.status(), 503);
    let made = format!("/async-function/{UNGUESSABLE}");
    assert_eq!(parts.gateway.get(&made).await.status(), 503);
}
