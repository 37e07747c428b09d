//! `GET /system/calls`: the order of the list and its pages.

use futures_util::StreamExt;
use gateway_queue::embedded::Limits;
use gateway_queue::jetstream::Options;

use crate::jetstream::processes::{on_jetstream, wait_for_queue};
use crate::support::gateway::Gateway;
use crate::support::jetstream_queue::{self as jetstream, call_to};
use crate::support::nats::Nats;
use crate::support::queue::{replying_with, with_embedded_queue};

async fn page(gateway: &Gateway, query: &str) -> Vec<String> {
    let response = gateway.get(&format!("/system/calls?{query}")).await;
    assert_eq!(response.status(), 200, "{response}");
    let calls = response.json();
    let calls = calls.as_array().unwrap().iter();
    calls.map(|call| call["callId"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn pages_from_the_newest_call_cover_all_calls() {
    let (state, provider) = (tempfile::tempdir().unwrap(), replying_with(&[200], "done"));
    let gateway = with_embedded_queue(&provider, state.path()).start().await;
    let mut ids = Vec::new();
    for number in 0..77 {
        let function = if number % 7 == 0 { "seventh" } else { "echo" };
        ids.push(gateway.enqueue(function, &[], "").await);
    }
    assert_eq!(page(&gateway, "limit=50").await, ids[..50], "oldest first by default");
    assert_eq!(page(&gateway, "limit=50&order=oldest").await, ids[..50]);
    ids.reverse();
    assert_eq!(page(&gateway, "order=newest&limit=50").await, ids[..50]);
    let rest = page(&gateway, &format!("order=newest&limit=50&after={}", ids[49])).await;
    assert_eq!(rest, ids[50..]);
    let behind = page(&gateway, &format!("order=newest&limit=50&after={}", ids[76])).await;
    assert_eq!(behind, [""; 0]);
    let sevenths: Vec<_> = ids.iter().rev().step_by(7).cloned().rev().collect();
    assert_eq!(page(&gateway, "order=newest&function=seventh").await, sevenths);
    let refused = gateway.get("/system/calls?order=random").await;
    assert_eq!(refused.status(), 400);
    assert!(refused.text().contains("order is neither oldest nor newest"), "{refused}");
}

#[tokio::test]
async fn an_incomplete_list_is_marked() {
    /// More than a list on JetStream examines.
    const CALLS: usize = 10_100;
    let nats = Nats::start();
    let options = jetstream::options(&nats);
    let limits = Limits { max_pending: 2 * CALLS, ..jetstream::LIMITS };
    let queue = jetstream::TestQueue::open(Options { limits, ..options }).await;
    let provider = replying_with(&[200], "done");
    let builder =
        on_jetstream(&nats, Gateway::builder()).provider(&provider).var("with_worker", "false");
    let gateway = builder.start().await;
    wait_for_queue(&gateway).await;
    queue.publish(call_to("other", "other")).await;
    let calls = (0..CALLS).map(|number| queue.publish(call_to("echo", &format!("call-{number}"))));
    futures_util::stream::iter(calls)
        .buffer_unordered(256)
        .for_each(|_| std::future::ready(()))
        .await;
    let list = async |query: &str| gateway.get(&format!("/system/calls?limit=1&{query}")).await;
    let all = list("function=echo").await;
    assert_eq!((all.status(), all.header("x-truncated")), (200, Some("true")), "{all}");
    assert_eq!(all.json().as_array().unwrap().len(), 1);
    let other = list("function=other").await;
    assert_eq!((other.status(), other.header("x-truncated")), (200, None), "{other}");
    assert_eq!(other.json()[0]["callId"], "other");
}
