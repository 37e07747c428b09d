//! Functions that are not ready: woken, waited for, and called as if nothing had been.

use std::time::{Duration, Instant};

use crate::support::gateway::{Builder, Gateway};
use crate::support::provider::Provider;
use crate::support::queue::queueing;
use crate::support::replicas::Replicas;
use crate::support::wire::{Wire, get, post, request};
use crate::support::{eventually, within};

pub(crate) fn waking(provider: &Provider) -> Builder {
    Gateway::builder().provider(provider).var("scale_from_zero", "true")
}

/// A gateway that has seen the list of functions.
pub(crate) async fn informed(provider: &Provider) -> Gateway {
    let gateway = waking(provider).start().await;
    gateway.metrics_show("listed", |m| m.text.contains("gateway_service_count{")).await;
    gateway
}

#[tokio::test]
async fn a_thousand_callers_of_a_function_at_zero_are_answered_after_one_scale_request() {
    gateway::serve::raise_file_limit();
    let replicas = Replicas::at(0, 0);
    replicas.with(|it| it.starts_after = 5);
    let provider = replicas.provider().start();
    let gateway = informed(&provider).await;
    let mut callers = tokio::task::JoinSet::new();
    for number in 0..1000 {
        let mut caller = gateway.connect().await;
        callers.spawn(async move {
            let answer = caller.ask(post("/function/echo", &format!("caller {number}"))).await;
            (number, answer)
        });
    }
    while let Some(answered) = within("all are answered", callers.join_next()).await {
        let (number, answer) = answered.unwrap();
        assert_eq!((answer.status(), answer.text()), (200, &*format!("caller {number}")));
    }
    assert_eq!(replicas.with(|it| it.scaled.clone()), [1]);
    assert_eq!((provider.calls(), replicas.with(|it| it.calls.len())), (1000, 1000));
    // One for each look until it is ready, and few for those who came later; not one for each caller.
    let questions = replicas.with(|it| it.questions);
    assert!(questions < 50, "{questions}");
    gateway.metrics_show("counted", |m| m.calls("echo.fn", "200") == 1000).await;
}

#[tokio::test]
async fn a_warm_function_costs_no_question() {
    let replicas = Replicas::at(1, 1);
    let provider = replicas.provider().start();
    let gateway = informed(&provider).await;
    let mut caller = gateway.connect().await;
    for _ in 0..500 {
        assert_eq!(caller.get("/function/echo").await.status(), 200);
    }
    assert_eq!((replicas.with(|it| it.questions), provider.calls()), (0, 500));
    assert!(replicas.with(|it| it.scaled.is_empty()));
}

#[tokio::test]
async fn without_the_setting_nobody_is_asked_or_woken() {
    let replicas = Replicas::at(0, 0);
    let provider = replicas.provider().start();
    let gateway = Gateway::before(&provider).await;
    let answer = gateway.get("/function/echo").await;
    assert_eq!(answer.status(), 503);
    assert_eq!(answer.header("x-openfaas-internal"), Some("proxy"));
    assert_eq!(replicas.with(|it| (it.questions, it.calls.len(), it.scaled.len())), (0, 1, 0));
}

#[tokio::test]
async fn a_function_that_nobody_knows_is_not_found() {
    let provider = Replicas::at(1, 1).provider().start();
    let gateway = waking(&provider).start().await;
    let answer = gateway.get("/function/made-up").await;
    assert_eq!(answer.status(), 404, "{answer}");
    assert!(answer.text().contains("made-up.fn not found"), "{answer}");
    assert_eq!(provider.calls(), 0);
    gateway.metrics_show("a stranger", |m| m.calls("unknown", "404") == 1).await;
}

#[tokio::test]
async fn a_provider_that_goes_away_during_a_cold_start_is_named_and_all_heals_when_it_is_back() {
    let replicas = Replicas::at(0, 0);
    replicas.with(|it| it.starts_after = usize::MAX);
    let provider = replicas.provider().start();
    let address = provider.address;
    let gateway = informed(&provider).await;
    let mut caller = gateway.connect().await;
    caller.send(get("/function/echo")).await;
    eventually("it is scaled", async || replicas.with(|it| it.scaled == [1])).await;
    drop(provider);
    let answer = caller.answer().await;
    assert_eq!(answer.status(), 503, "{answer}");
    assert!(answer.text().contains("provider"), "{answer}");
    assert!(answer.text().contains("connection refused"), "{answer}");
    assert!(!answer.text().contains("127.0.0.1"), "{answer}");
    assert!(answer.header("retry-after").is_some());

    replicas.with(|it| it.starts_after = 0);
    let provider = replicas.provider().at(address).start();
    let answer = caller.ask(post("/function/echo", "again")).await;
    assert_eq!((answer.status(), answer.text()), (200, "again"));
    assert_eq!((provider.calls(), replicas.with(|it| it.scaled.len())), (1, 1));
}

#[tokio::test]
async fn a_function_that_is_not_ready_in_time_is_unavailable() {
    let replicas = Replicas::at(1, 0);
    replicas.with(|it| it.starts_after = usize::MAX);
    let provider = replicas.provider().start();
    // Times that run out during the wait, were they not to begin after it.
    let gateway = waking(&provider)
        .var("cold_start_timeout", "2s")
        .var("upstream_timeout", "100ms")
        .var("read_timeout", "300ms")
        .start()
        .await;
    let mut caller = gateway.connect().await;
    for request in [get("/function/echo"), post("/function/echo", "hello")] {
        let answer = caller.ask(request).await;
        assert_eq!(answer.status(), 503, "{answer}");
        assert!(answer.text().contains("no replica that can be called"), "{answer}");
        assert!(answer.text().contains(answer.header("x-call-id").unwrap()), "{answer}");
        assert!(answer.header("retry-after").is_some());
    }
    assert_eq!(provider.calls(), 0);
    replicas.with(|it| it.starts_after = 8);
    let answer = caller.ask(post("/function/echo", "hello")).await;
    assert_eq!((answer.status(), answer.text()), (200, "hello"));
}

/// Whether `client` gets a response about as soon as others do. A request that waits for a replica does not.
async fn is_answered_soon(gateway: &Gateway, client: &Wire) -> bool {
    let mut other = gateway.connect().await;
    let begun = Instant::now();
    for _ in 0..10 {
        assert_eq!(other.get("/_/healthz").await.status(), 200);
    }
    // On a busy machine all responses are late.
    let soon = begun.elapsed() + Duration::from_millis(300);
    tokio::time::timeout(soon, client.readable()).await.is_ok()
}

#[tokio::test]
async fn a_full_line_turns_callers_away_and_one_who_leaves_frees_a_place() {
    let body = "x".repeat(10_000);
    let chunked =
        "POST /function/echo HTTP/1.1\r\nHost: g\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n";
    for request in [get("/function/echo"), post("/function/echo", &body), chunked.to_owned()] {
        let replicas = Replicas::at(1, 0);
        replicas.with(|it| it.starts_after = usize::MAX);
        let provider = replicas.provider().start();
        let gateway = waking(&provider).var("cold_start_queue_limit", "1").start().await;
        let mut first = gateway.connect().await;
        first.send(&request).await;
        eventually("the first waits", async || replicas.with(|it| it.questions > 0)).await;
        let answer = gateway.get("/function/echo").await;
        assert_eq!(answer.status(), 503, "{answer}");
        assert!(answer.text().contains("cold_start_queue_limit"), "{answer}");
        assert!(answer.header("retry-after").is_some());
        drop(first);
        let mut second = gateway.connect().await;
        eventually("the place is free", async || {
            second.send(get("/function/echo")).await;
            let waits = !is_answered_soon(&gateway, &second).await;
            if !waits {
                second.answer().await;
            }
            waits
        })
        .await;
        replicas.with(|it| it.starts_after = 0);
        assert_eq!(second.answer().await.status(), 200);
        assert_eq!(provider.calls(), 1);
    }
}

#[tokio::test]
async fn a_function_that_went_to_zero_is_noticed_by_the_poll() {
    let replicas = Replicas::at(1, 1);
    let provider = replicas.provider().start();
    let gateway = informed(&provider).await;
    replicas.with(|it| (it.wanted, it.available) = (0, 0));
    let count = |m: &crate::support::metrics::Metrics| {
        m.get("gateway_service_count", &[("function_name", "echo.fn")])
    };
    gateway.metrics_show("it is noticed", |m| count(m) == Some(0.0)).await;
    // Too long to be sent twice: it must not be sent before the function is ready.
    let answer = gateway.post("/function/echo", &"z".repeat(200_000)).await;
    assert_eq!((answer.status(), answer.body.len()), (200, 200_000));
    assert_eq!(replicas.with(|it| (it.calls.len(), it.scaled.len())), (1, 1));
}

#[tokio::test]
async fn what_is_scaled_through_the_gateway_is_asked_for_at_once() {
    let replicas = Replicas::at(1, 1);
    let provider = replicas.provider().start();
    let gateway = informed(&provider).await;
    let long = "z".repeat(200_000);
    for round in 1..=3 {
        let scale = r#"{"serviceName":"echo","replicas":0}"#;
        assert_eq!(gateway.post("/system/scale-function/echo", scale).await.status(), 202);
        assert_eq!(gateway.post("/function/echo", &long).await.status(), 200);
        assert_eq!(replicas.with(|it| it.calls.len()), round, "it was called while it was at zero");
    }
    assert_eq!(replicas.with(|it| it.scaled.clone()), [0, 1, 0, 1, 0, 1]);
}

#[tokio::test]
async fn what_is_deleted_through_the_gateway_is_gone_at_once() {
    let replicas = Replicas::at(1, 1);
    let provider = replicas.provider().start();
    let gateway = informed(&provider).await;
    assert_eq!(gateway.get("/function/echo").await.status(), 200);
    let named = r#"{"functionName":"echo"}"#;
    let delete = request("DELETE", "/system/functions", &[], named);
    assert_eq!(gateway.connect().await.ask(delete).await.status(), 202);
    assert_eq!(gateway.get("/function/echo").await.status(), 404);
    assert_eq!(provider.calls(), 1);
}

#[tokio::test]
async fn a_function_that_is_not_listed_is_asked_for_and_called() {
    let replicas = Replicas::at(1, 1);
    replicas.with(|it| it.unlisted = true);
    let provider = replicas.provider().start();
    let gateway = waking(&provider).start().await;
    let mut caller = gateway.connect().await;
    for _ in 0..100 {
        assert_eq!(caller.get("/function/echo").await.status(), 200);
    }
    // Once, and again whenever the list has come without it.
    let questions = replicas.with(|it| it.questions);
    assert!(questions < 10, "{questions}");
    assert_eq!(provider.calls(), 100);
    gateway.metrics_show("counted", |m| m.calls("echo.fn", "200") == 100).await;
}

#[tokio::test]
async fn a_call_that_waits_counts_as_one_of_its_function() {
    let replicas = Replicas::at(0, 0);
    replicas.with(|it| (it.unlisted, it.starts_after) = (true, usize::MAX));
    let provider = replicas.provider().start();
    let gateway = waking(&provider).start().await;
    let mut caller = gateway.connect().await;
    caller.send(get("/function/echo")).await;
    gateway.metrics_show("it is in flight", |m| m.in_flight("echo.fn") == 1.0).await;
    assert_eq!(provider.calls(), 0);
    replicas.with(|it| it.starts_after = 0);
    assert_eq!(caller.answer().await.status(), 200);
    gateway.metrics_show("it has ended", |m| m.in_flight("echo.fn") == 0.0).await;
}

#[tokio::test]
async fn a_queued_call_waits_for_its_function_and_is_made_once() {
    let state = tempfile::tempdir().unwrap();
    let replicas = Replicas::at(0, 0);
    replicas.with(|it| (it.starts_after, it.deaf, it.falls) = (5, 2, true));
    let provider = replicas.provider().start();
    let gateway = queueing(&provider, state.path()).var("scale_from_zero", "true").start().await;
    let id = gateway.queued("echo", &[], "hello").await;
    let told = gateway.becomes(&id, "succeeded").await;
    assert_eq!((&told["attempts"], &told["status"]), (&1.into(), &200.into()));
    assert_eq!(gateway.result(&id).await.text(), "hello");
    assert_eq!(replicas.with(|it| it.scaled.clone()), [1]);
    assert_eq!(replicas.with(|it| it.calls.clone()), [(5, 503), (5, 503), (5, 200)]);
}

#[tokio::test]
async fn those_who_wait_may_finish_when_the_gateway_stops() {
    let replicas = Replicas::at(1, 0);
    replicas.with(|it| it.starts_after = usize::MAX);
    let provider = replicas.provider().start();
    let gateway = waking(&provider).var("shutdown_grace", "20s").start().await;
    let mut caller = gateway.connect().await;
    caller.send(get("/function/echo")).await;
    eventually("it waits", async || replicas.with(|it| it.questions > 0)).await;
    let stopping = tokio::spawn(gateway.terminate());
    // A stop lets calls in flight finish, those that wait among them.
    tokio::time::sleep(Duration::from_millis(300)).await;
    replicas.with(|it| it.starts_after = 0);
    assert_eq!(caller.answer().await.status(), 200);
    assert!(within("it ends", stopping).await.unwrap().success());
}
