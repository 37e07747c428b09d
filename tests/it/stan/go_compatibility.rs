//! What this gateway and a Go gateway write to and read from NATS Streaming is the same.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use prost::Message as _;
use serde_json::Value;

use crate::support::fake_stan::proto::PubMsg;
use crate::support::fake_stan::{CHANNEL, Stan};
use crate::support::gateway::Gateway;
use crate::support::nats::Nats;
use crate::support::provider::Provider;
use crate::support::queue::patient;
use crate::support::stan_queue::{all_done, gateway, host, on};

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
async fn a_call_is_taken_in_as_the_go_gateway_does_and_made() {
    let (nats, mut provider) = (Nats::start(), patient().start());
    let stan = Stan::start(&nats).await;
    let gateway = gateway(&nats, &provider).await;
    let headers = ["X-Multi: a", "X-Multi: b", "X-Gateway-Max-Attempts: 9"];
    let answer = gateway.queue("echo/p/q?a=1&b=%20", &headers, "first job").await;
    assert_eq!(answer.status(), 202, "{answer}");
    let id = answer.header("x-call-id").unwrap();
    let mut call = provider.call().await;
    assert_eq!(call.head.target(), "/function/echo.fn/p/q?a=1&b=%20");
    assert_eq!(call.head.header("x-call-id"), Some(id));
    assert_eq!(call.head.header("x-gateway-max-attempts"), None);
    assert_eq!(call.body().await.unwrap(), b"first job");
    assert_eq!(stan.sent(CHANNEL), (1, 1));
    call.answer_with(200, b"").await;
    all_done(&stan, CHANNEL).await;
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
        assert_eq!(message.pointer(member).and_then(|it| it.as_str()), Some(expect), "{member}");
    }
    assert_eq!(message.get("CallbackUrl"), None);
    assert!(gateway.terminate().await.success());
    assert_eq!(stan.clients(), [""; 0]);
}

#[tokio::test]
async fn what_a_go_gateway_queued_is_made_and_called_back() {
    let (nats, mut receiver) = (Nats::start(), Provider::by_hand());
    let stan = Stan::start(&nats).await;
    let address = receiver.address.to_string();
    for job in recorded() {
        stan.store_message(CHANNEL, job.replace("127.0.0.1:8081", &address));
    }
    let mut provider = Provider::builder().start();
    let worker = on(&nats, Gateway::worker()).provider(&provider).start().await;
    let mut targets = Vec::new();
    for _ in 0..3 {
        let mut call = provider.call().await;
        let body = call.body().await.unwrap();
        targets.push((call.head.target().to_owned(), body.clone()));
        call.answer_with(200, &body).await;
    }
    targets.sort();
    let expect = [
        ("/function/echo.fn/", &b""[..]),
        ("/function/echo.fn/p/q?a=1&b=%20", b"first job"),
        ("/function/echo.openfaas-fn", b"\x00\x01\xff\xfe"),
    ];
    assert_eq!(targets, expect.map(|(target, body)| (target.to_owned(), body.to_vec())));
    let mut called = receiver.call().await;
    assert_eq!(called.head.target(), "/function/callback?x=1");
    assert_eq!(called.head.header("authorization"), Some("Basic dXNlcjpwdw=="));
    assert_eq!(called.head.header("x-call-id"), Some("10a17e36-996d-4dcd-a42f-e6984d2f1364"));
    assert_eq!(called.head.header("x-function-status"), Some("200"));
    called.answer(200, "").await;
    all_done(&stan, CHANNEL).await;
    assert_eq!(stan.clients(), [format!("faas-worker-{}", host())]);
    assert!(worker.terminate().await.success());
}
