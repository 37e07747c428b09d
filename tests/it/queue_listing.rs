//! `GET /system/calls`: the order of the list and its pages.

use crate::support::gateway::Gateway;
use crate::support::queue::{answering, queueing};

async fn page(gateway: &Gateway, query: &str) -> Vec<String> {
    let answer = gateway.get(&format!("/system/calls?{query}")).await;
    assert_eq!(answer.status(), 200, "{answer}");
    let calls = answer.json();
    let calls = calls.as_array().unwrap().iter();
    calls.map(|call| call["callId"].as_str().unwrap().to_owned()).collect()
}

#[tokio::test]
async fn every_call_can_be_reached_from_the_newest_on() {
    let (state, provider) = (tempfile::tempdir().unwrap(), answering(&[200], "done"));
    let gateway = queueing(&provider, state.path()).start().await;
    let mut ids = Vec::new();
    for number in 0..77 {
        let function = if number % 7 == 0 { "seventh" } else { "echo" };
        ids.push(gateway.queued(function, &[], "").await);
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
