//! What was accepted is not lost: not when the process ends, however it does, nor while the provider is away.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use futures_util::future::join_all;

use crate::support::eventually;
use crate::support::gateway::Gateway;
use crate::support::provider::Provider;
use crate::support::queue::{answering, patient, queueing};
use crate::support::wire::post;

/// The call ids that have reached a provider.
type Seen = Arc<Mutex<Vec<String>>>;

/// A provider that notes the ids of calls, answers those of `echo`, and lets all others hang.
fn noting(seen: &Seen) -> Provider {
    let seen = Arc::clone(seen);
    patient()
        .answering(move |mut call| {
            let seen = Arc::clone(&seen);
            async move {
                let body = call.body().await.ok()?;
                let id = call.head.header("x-call-id").unwrap_or_default().to_owned();
                seen.lock().unwrap().push(id);
                if !call.head.target().contains("/echo") {
                    std::future::pending::<()>().await;
                }
                call.answer_with(200, &body).await;
                Some(call.wire)
            }
        })
        .start()
}

/// Has callers queue calls one after the other until the gateway is gone; the ids that were accepted.
async fn accepted_until_the_end(gateway: &Gateway, name: &str) -> Vec<String> {
    let mut accepted = Vec::new();
    let address = gateway.address;
    while let Ok(tcp) = tokio::net::TcpStream::connect(address).await {
        let mut caller = crate::support::wire::Wire::new(tcp);
        let request = post("/async-function/echo", name);
        if caller.try_send(request).await.is_err() {
            break;
        }
        let Some(head) = caller.try_head().await else { break };
        if head.status() == 202 {
            accepted.push(head.header("x-call-id").unwrap().to_owned());
        }
    }
    accepted
}

#[tokio::test]
async fn no_accepted_call_is_lost_when_the_process_is_killed() {
    let (state, seen) = (tempfile::tempdir().unwrap(), Seen::default());
    let mut accepted = Vec::new();
    {
        let provider = noting(&seen);
        let gateway = queueing(&provider, state.path()).start().await;
        let finished = gateway.queued("echo", &[], "finished").await;
        gateway.becomes(&finished, "succeeded").await;
        let running = gateway.queued("stuck", &[], "").await;
        gateway.becomes(&running, "running").await;
        let delayed = gateway.queued("echo", &["X-Delay-Seconds: 4"], "").await;
        let cancelled = gateway.queued("echo", &["X-Delay-Seconds: 3"], "").await;
        assert_eq!(gateway.cancel(&cancelled).await.status(), 204);
        accepted.extend([finished, running, delayed, cancelled]);
        let (a, b, ()) = tokio::join!(
            accepted_until_the_end(&gateway, "a"),
            accepted_until_the_end(&gateway, "b"),
            async {
                eventually("calls are made", async || provider.calls() > 20).await;
                gateway.signal(rustix::process::Signal::KILL);
            }
        );
        assert!(a.len() + b.len() > 10);
        accepted.extend(a.into_iter().chain(b));
        gateway.kill().await;
    }
    let [finished, running, _, cancelled] = [0, 1, 2, 3].map(|at| accepted[at].clone());
    let before: Vec<String> = seen.lock().unwrap().clone();
    let provider = noting(&seen);
    let gateway = queueing(&provider, state.path()).start().await;
    let result = gateway.result(&finished).await;
    assert_eq!((result.text(), result.header("x-function-status")), ("finished", Some("200")));
    assert_eq!(gateway.state(&finished).await["state"], "succeeded");
    let ids: HashSet<String> =
        accepted.iter().filter(|id| **id != cancelled && **id != running).cloned().collect();
    for id in &ids {
        gateway.becomes(id, "succeeded").await;
    }
    gateway.becomes(&running, "running").await;
    let seen = seen.lock().unwrap().clone();
    for id in ids.iter().chain([&running]) {
        assert!(seen.contains(id), "{id} was not made");
    }
    assert!(!seen.contains(&cancelled));
    assert_eq!(gateway.state(&cancelled).await["state"], "cancelled");
    let again = |id: &String| seen[before.len()..].contains(id);
    assert!(again(&running) && !again(&finished));
    // An id is given to one call only.
    assert_eq!(accepted.iter().collect::<HashSet<_>>().len(), accepted.len());
}

#[tokio::test]
async fn dead_calls_and_what_is_known_of_repeated_ones_outlive_the_process() {
    let (state, provider) =
        (tempfile::tempdir().unwrap(), answering(&[500, 500, 500, 200], "said"));
    let gateway = queueing(&provider, state.path()).start().await;
    let id = gateway.queued("echo", &["X-Call-Id: mine", "Idempotency-Key: key"], "").await;
    gateway.becomes(&id, "failed").await;
    gateway.kill().await;

    let gateway = queueing(&provider, state.path()).start().await;
    assert_eq!(gateway.state(&id).await["dead"], true);
    assert_eq!(gateway.queued("echo", &["Idempotency-Key: key"], "").await, id);
    assert_eq!(gateway.queued("echo", &["X-Call-Id: mine"], "").await, id);
    assert_eq!(gateway.get("/system/queues").await.json()[0]["dead"], 1);
    assert_eq!(gateway.post(&format!("/system/calls/{id}/retry"), "").await.status(), 204);
    gateway.becomes(&id, "succeeded").await;
    assert_eq!(provider.calls(), 4);
}

#[tokio::test]
async fn attempts_are_counted_on_after_a_restart() {
    let (state, mut provider) = (tempfile::tempdir().unwrap(), patient().start());
    let gateway = queueing(&provider, state.path()).start().await;
    let id = gateway.queued("echo", &[], "").await;
    let mut call = provider.call().await;
    call.body().await.unwrap();
    call.wire.send("HTTP/1.1 503 X\r\nRetry-After: 2\r\nContent-Length: 0\r\n\r\n").await;
    // The gateway asks on it how the function wants to be retried.
    provider.keep(call);
    let told = gateway.becomes(&id, "retrying").await;
    assert_eq!((&told["attempts"], &told["status"]), (&1.into(), &503.into()));
    assert!(told["nextAttemptAt"].is_string(), "{told}");
    gateway.kill().await;

    let gateway = queueing(&provider, state.path()).start().await;
    let told = gateway.state(&id).await;
    assert_eq!((&told["state"], &told["attempts"]), (&"retrying".into(), &1.into()));
    provider.call().await.answer(200, "").await;
    assert_eq!(gateway.becomes(&id, "succeeded").await["attempts"], 2);
}

#[tokio::test]
async fn a_call_that_runs_is_finished_within_the_grace() {
    let (state, mut provider) = (tempfile::tempdir().unwrap(), patient().start());
    let mut gateway = queueing(&provider, state.path()).start().await;
    let id = gateway.queued("echo", &[], "").await;
    let mut call = provider.call().await;
    gateway.signal(rustix::process::Signal::TERM);
    gateway.logs("Stopping").await;
    call.answer(200, "done").await;
    assert!(gateway.ended().await.success());

    let gateway = queueing(&provider, state.path()).start().await;
    assert_eq!(gateway.state(&id).await["state"], "succeeded");
    assert_eq!(gateway.result(&id).await.text(), "done");
    assert_eq!(provider.calls(), 1);
}

#[tokio::test]
async fn a_call_that_hangs_is_cut_at_the_end_and_made_again_after_it() {
    let (state, mut provider) = (tempfile::tempdir().unwrap(), patient().start());
    let mut gateway =
        queueing(&provider, state.path()).var("shutdown_grace", "300ms").start().await;
    let id = gateway.queued("echo", &[], "body").await;
    let mut hangs = provider.call().await;
    gateway.signal(rustix::process::Signal::TERM);
    assert!(gateway.ended().await.success());
    hangs.body().await.unwrap();
    hangs.wire.closed().await;

    let gateway = queueing(&provider, state.path()).start().await;
    let mut call = provider.call().await;
    assert_eq!(call.head.header("x-call-id"), Some(id.as_str()));
    assert_eq!(call.body().await.unwrap(), b"body");
    call.answer_with(200, b"").await;
    gateway.becomes(&id, "succeeded").await;
}

#[tokio::test]
async fn a_call_waits_for_a_provider_that_is_away() {
    let (state, provider) = (tempfile::tempdir().unwrap(), Provider::by_hand());
    let (address, away) = (provider.address, queueing(&provider, state.path()));
    drop(provider);
    let gateway = away.start().await;
    let id = gateway.queued("echo", &[], "").await;
    // It has been made once; nobody says how it is to be retried.
    gateway.logs("The retry policy of a queued call is not known yet").await;
    assert_eq!(gateway.state(&id).await["state"], "running");
    let provider = patient().at(address).answering(async |mut call| {
        call.answer(200, "back").await;
        Some(call.wire)
    });
    let _provider = provider.start();
    assert_eq!(gateway.becomes(&id, "succeeded").await["attempts"], 2);
    assert_eq!(gateway.result(&id).await.text(), "back");
}

#[tokio::test]
async fn so_many_names_that_nobody_knows_are_queued_while_the_provider_is_away() {
    const NAMES: usize = 1000;
    let (state, provider) = (tempfile::tempdir().unwrap(), patient().start());
    let (address, builder) = (provider.address, queueing(&provider, state.path()));
    let gateway = builder.var("with_worker", "false").start().await;
    gateway.queued("known", &[], "").await;
    drop(provider);
    let callers = (0..10).map(async |caller| {
        let mut wire = gateway.connect().await;
        for name in (caller..NAMES).step_by(10) {
            let answer = wire.ask(post(&format!("/async-function/made-up-{name}"), "")).await;
            assert_eq!(answer.status(), 202, "{answer}");
        }
    });
    join_all(callers).await;
    let answer = gateway.queue("another", &[], "").await;
    assert_eq!((answer.status(), answer.header("retry-after")), (503, Some("1")), "{answer}");
    assert!(answer.text().contains("the provider has not confirmed"), "{answer}");
    // Neither one that it has answered for nor one that was taken is another name.
    gateway.queued("known", &[], "").await;
    gateway.queued("made-up-0", &[], "").await;
    let provider = patient().at(address).start();
    gateway.queued("another", &[], "").await;
    drop(provider);
    gateway.queued("one-more", &[], "").await;
}

#[tokio::test]
async fn a_provider_that_says_nothing_keeps_no_caller_waiting() {
    let state = tempfile::tempdir().unwrap();
    // Connections to it are made, and never accepted.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let provider = Provider::by_hand();
    let gateway = queueing(&provider, state.path())
        .var("functions_provider_url", format!("http://{}", silent.local_addr().unwrap()))
        .start()
        .await;
    // Its upstream_timeout of 60 s is longer than this waits.
    let id = gateway.queued("echo", &[], "").await;
    gateway.becomes(&id, "running").await;
}

#[tokio::test]
async fn a_queue_belongs_to_one_process() {
    let (state, provider) = (tempfile::tempdir().unwrap(), patient().start());
    let gateway = queueing(&provider, state.path()).start().await;
    let ended = queueing(&provider, state.path()).output(&[]).await;
    assert_eq!(ended.status.code(), Some(1));
    let said = String::from_utf8_lossy(&ended.stderr);
    let file = state.path().join("queue.redb").display().to_string();
    assert!(said.contains(&file), "{said}");
    // The first one does not mind.
    gateway.queued("echo", &[], "").await;
}
