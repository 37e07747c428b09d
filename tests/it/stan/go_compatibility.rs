//! Messages on NATS Streaming have the same format for this gateway and for a Go gateway.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use prost::Message as _;
use serde_json::Value;

use crate::support::fake_stan::proto::PubMsg;
use crate::support::fake_stan::{CHANNEL, FakeStan};
use crate::support::gateway::Gateway;
use crate::support::nats::Nats;
use crate::support::provider::Provider;
use crate::support::queue::fast_retry;
use crate::support::stan_queue::{host_id, on_stan, start_gateway, wait_until_acknowledged};

/// The messages that the recorded Go gateway published.
fn recorded() -> Vec<String> {
    let lines = include_str!("../../stan/transcript.jsonl").lines();
    let rows = lines.map(|line| serde_json::from_str::<Value>(line).unwrap());
    let published = rows.filter(|row| row["line"].as_str().unwrap().starts_with("PUB _STAN.pub."));
    published
        .map(|row| STANDARD.decode(row["payload_base64"].as_str().unwrap()).unwrap())
        .map(|message| PubMsg::decode(message.as_slice()).unwrap().data)
        .map(|data| String::from_utf8(data.to_vec()).unwrap())
        .collect()
}

#[tokio::test]
async fn a_call_is_enqueued_in_the_format_of_the_go_gateway() {
    let (nats, mut provider) = (Nats::start(), fast_retry().start());
    let stan = FakeStan::start(&nats).await;
    let gateway = start_gateway(&nats, &provider).await;
    let headers = ["X-Multi: a", "X-Multi: b", "X-Gateway-Max-Attempts: 9"];
    let response = gateway.send_async("echo/p/q?a=1&b=%20", &headers, "first job").await;
    assert_eq!(response.status(), 202, "{response}");
    let id = response.header("x-call-id").unwrap();
    let mut call = provider.next_call().await;
    assert_eq!(call.head.target(), "/function/echo.fn/p/q?a=1&b=%20");
    assert_eq!(call.head.header("x-call-id"), Some(id));
    assert_eq!(call.head.header("x-gateway-max-attempts"), None);
    assert_eq!(call.read_body().await.unwrap(), b"first job");
    assert_eq!(stan.deliveries_and_pending(CHANNEL), (1, 1));
    call.send_response(200, b"").await;
    wait_until_acknowledged(&stan, CHANNEL).await;
    let [message] = &stan.messages(CHANNEL)[..] else { panic!("one message") };
    for (member, expect) in [
        ("/Body", "Zmlyc3Qgam9i"),
        ("/Method", "POST"),
        ("/Path", "/p/q"),
        ("/QueryString", "a=1&b=%20"),
        ("/Function", "echo.fn"),
        ("/Host", "gateway.test"),
        ("/Header/X-Call-Id/0", id),
        ("/Header/X-Multi/1", "b"),
        ("/Header/Content-Length/0", "9"),
    ] {
        assert_eq!(
            message.pointer(member).and_then(|value| value.as_str()),
            Some(expect),
            "{member}"
        );
    }
    assert_eq!(message.get("CallbackUrl"), None);
    assert!(gateway.terminate().await.success());
    assert_eq!(stan.client_ids(), [""; 0]);
}

#[tokio::test]
async fn calls_enqueued_by_a_go_gateway_are_executed_with_callbacks() {
    let (nats, mut receiver) = (Nats::start(), Provider::manual());
    let stan = FakeStan::start(&nats).await;
    let address = receiver.address.to_string();
    for job in recorded() {
        stan.store_message(CHANNEL, job.replace("127.0.0.1:8081", &address));
    }
    let mut provider = Provider::builder().start();
    let worker = on_stan(&nats, Gateway::worker()).provider(&provider).start().await;
    let mut targets = Vec::new();
    for _ in 0..3 {
        let mut call = provider.next_call().await;
        let body = call.read_body().await.unwrap();
        targets.push((call.head.target().to_owned(), body.clone()));
        call.send_response(200, &body).await;
    }
    targets.sort();
    let expect = [
        ("/function/echo.fn/", &b""[..]),
        ("/function/echo.fn/p/q?a=1&b=%20", b"first job"),
        ("/function/echo.openfaas-fn", b"\x00\x01\xff\xfe"),
    ];
    assert_eq!(targets, expect.map(|(target, body)| (target.to_owned(), body.to_vec())));
    let mut called = receiver.next_call().await;
    assert_eq!(called.head.target(), "/function/callback?x=1");
    assert_eq!(called.head.header("authorization"), Some("Basic dXNlcjpwdw=="));
    assert_eq!(called.head.header("x-call-id"), Some("10a17e36-996d-4dcd-a42f-e6984d2f1364"));
    assert_eq!(called.head.header("x-function-status"), Some("200"));
    called.respond(200, "").await;
    wait_until_acknowledged(&stan, CHANNEL).await;
    assert_eq!(stan.client_ids(), [format!("faas-worker-{}", host_id())]);
    assert!(worker.terminate().await.success());
}
