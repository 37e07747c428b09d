//! Functions that are found not to be ready after a request was sent to them.

use crate::cold_start::{informed, waking};
use crate::support::eventually;
use crate::support::replicas::Replicas;
use crate::support::wire::request;

#[tokio::test]
async fn a_replica_that_does_not_listen_yet_is_called_again() {
    for (method, status, length) in
        [("PUT", 502, 0), ("POST", 503, 0), ("PUT", 502, 60_000), ("POST", 503, 60_000)]
    {
        let replicas = Replicas::at(0, 0);
        replicas.with(|it| (it.deaf, it.deaf_status, it.falls) = (2, status, status == 503));
        let provider = replicas.provider().start();
        let gateway = informed(&provider).await;
        let body = "y".repeat(length);
        let answer =
            gateway.connect().await.ask(request(method, "/function/echo", &[], &body)).await;
        assert!(answer.status() == 200 && answer.text() == body, "{status}, {length}");
        let times = [(length, status), (length, status), (length, 200)];
        assert_eq!(replicas.with(|it| it.calls.clone()), times);
        assert_eq!(replicas.with(|it| it.scaled.clone()), [1]);
        gateway.metrics_show("counted once", |m| m.calls("echo.fn", "200") == 1).await;
    }
}

#[tokio::test]
async fn what_a_starting_function_may_have_seen_is_not_sent_twice() {
    let replicas = Replicas::at(0, 0);
    replicas.with(|it| (it.deaf, it.deaf_status) = (1, 502));
    let provider = replicas.provider().start();
    let gateway = informed(&provider).await;
    assert_eq!(gateway.post("/function/echo", "pay").await.status(), 502);
    assert_eq!(gateway.post("/function/echo", "pay").await.status(), 200);
    assert_eq!(replicas.with(|it| it.calls.clone()), [(3, 502), (3, 200)]);
}

#[tokio::test]
async fn a_provider_that_refuses_all_calls_after_a_start_is_believed_in_the_end() {
    let replicas = Replicas::at(0, 0);
    replicas.with(|it| it.deaf = usize::MAX);
    let provider = replicas.provider().start();
    // Were it repeated for as long as a call may wait, nobody would see the end.
    let gateway = waking(&provider).var("cold_start_timeout", "10m").start().await;
    let answer = gateway.get("/function/echo").await;
    assert_eq!(answer.status(), 503, "{answer}");
    assert_eq!(answer.header("x-openfaas-internal"), Some("proxy"));
    assert_eq!(provider.calls(), 3);
}

#[tokio::test]
async fn a_long_body_is_not_sent_twice() {
    let replicas = Replicas::at(0, 0);
    replicas.with(|it| it.deaf = 1);
    let provider = replicas.provider().start();
    let gateway = informed(&provider).await;
    let answer = gateway.post("/function/echo", &"z".repeat(200_000)).await;
    assert_eq!(answer.status(), 503, "{answer}");
    assert_eq!(replicas.with(|it| it.calls.clone()), [(200_000, 503)]);
    let answer = gateway.post("/function/echo", &"z".repeat(200_000)).await;
    assert_eq!((answer.status(), answer.body.len()), (200, 200_000));
}

#[tokio::test]
async fn a_bad_gateway_of_a_warm_function_is_passed_on() {
    let replicas = Replicas::at(1, 1);
    replicas.with(|it| (it.deaf, it.deaf_status) = (1, 502));
    let provider = replicas.provider().start();
    let gateway = informed(&provider).await;
    assert_eq!(gateway.get("/function/echo").await.status(), 502);
    assert_eq!(gateway.get("/function/echo").await.status(), 200);
    assert_eq!(provider.calls(), 2);
}

#[tokio::test]
async fn a_provider_that_is_overloaded_is_not_taken_for_a_cold_start() {
    let replicas = Replicas::at(1, 1);
    replicas.with(|it| it.deaf = 1);
    let provider = replicas.provider().start();
    let gateway = informed(&provider).await;
    assert_eq!(gateway.get("/function/echo").await.status(), 503);
    assert_eq!(replicas.with(|it| (it.calls.len(), it.questions)), (1, 1));
    assert_eq!(gateway.get("/function/echo").await.status(), 200);
}

#[tokio::test]
async fn a_function_that_went_to_zero_unseen_is_woken_by_the_call_that_finds_out() {
    let replicas = Replicas::at(1, 1);
    let provider = replicas.provider().start();
    let gateway = informed(&provider).await;
    assert_eq!(gateway.get("/function/echo").await.status(), 200);
    replicas.with(|it| (it.wanted, it.available) = (0, 0));
    let answer = gateway.post("/function/echo", "hello").await;
    assert_eq!((answer.status(), answer.text()), (200, "hello"));
    assert_eq!(replicas.with(|it| it.scaled.clone()), [1]);
    assert_eq!(replicas.with(|it| it.calls.clone()), [(0, 200), (5, 503), (5, 200)]);
}

#[tokio::test]
async fn a_call_that_cannot_be_repeated_has_the_function_asked_for_right_after_a_start_too() {
    let replicas = Replicas::at(0, 0);
    let provider = replicas.provider().start();
    let gateway = informed(&provider).await;
    assert_eq!(gateway.get("/function/echo").await.status(), 200);
    // It goes again at once, and the poll cannot know.
    replicas.with(|it| (it.wanted, it.available) = (0, 0));
    let long = "z".repeat(200_000);
    let before = replicas.with(|it| it.questions);
    assert_eq!(gateway.post("/function/echo", &long).await.status(), 503);
    eventually("it is asked for", async || replicas.with(|it| it.questions > before)).await;
    assert_eq!(gateway.post("/function/echo", &long).await.status(), 200);
    assert_eq!(replicas.with(|it| it.scaled.clone()), [1, 1]);
}
