//! Accepted calls are not lost: neither when the process ends in any way, nor while the provider is unavailable.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use futures_util::future::join_all;

use crate::support::connection::post;
use crate::support::eventually;
use crate::support::gateway::Gateway;
use crate::support::provider::Provider;
use crate::support::queue::{fast_retry, replying_with, with_embedded_queue};

/// The call ids that have reached a provider.
type Seen = Arc<Mutex<Vec<String>>>;

/// A provider that records the ids of calls, responds to those of `echo`, and lets all others hang.
fn recording_provider(seen: &Seen) -> Provider {
    let seen = Arc::clone(seen);
    fast_retry()
        .handler(move |mut call| {
            let seen = Arc::clone(&seen);
            async move {
                let body = call.read_body().await.ok()?;
                let id = call.head.header("x-call-id").unwrap_or_default().to_owned();
                seen.lock().unwrap().push(id);
                if !call.head.target().contains("/echo") {
                    std::future::pending::<()>().await;
                }
                call.send_response(200, &body).await;
                Some(call.connection)
            }
        })
        .start()
}

/// Clients enqueue calls sequentially until the gateway is gone. Returns the accepted ids.
async fn accepted_until_the_end(gateway: &Gateway, name: &str) -> Vec<String> {
    let mut accepted = Vec::new();
    let address = gateway.address;
    while let Ok(tcp) = tokio::net::TcpStream::connect(address).await {
        let mut client = crate::support::connection::Connection::new(tcp);
        let request = post("/async-function/echo", name);
        if client.try_send(request).await.is_err() {
            break;
        }
        let Some(head) = client.try_read_head().await else { break };
        if head.status() == 202 {
            accepted.push(head.header("x-call-id").unwrap().to_owned());
        }
    }
    accepted
}

#[tokio::test]
async fn accepted_calls_survive_a_kill() {
    let (state, seen) = (tempfile::tempdir().unwrap(), Seen::default());
    let mut accepted = Vec::new();
    {
        let provider = recording_provider(&seen);
        let gateway = with_embedded_queue(&provider, state.path()).start().await;
        let finished = gateway.enqueue("echo", &[], "finished").await;
        gateway.wait_for_state(&finished, "succeeded").await;
        let running = gateway.enqueue("stuck", &[], "").await;
        gateway.wait_for_state(&running, "running").await;
        let delayed = gateway.enqueue("echo", &["X-Delay-Seconds: 4"], "").await;
        let cancelled = gateway.enqueue("echo", &["X-Delay-Seconds: 3"], "").await;
        assert_eq!(gateway.cancel(&cancelled).await.status(), 204);
        accepted.extend([finished, running, delayed, cancelled]);
        let (a, b, ()) = tokio::join!(
            accepted_until_the_end(&gateway, "a"),
            accepted_until_the_end(&gateway, "b"),
            async {
                eventually("calls are executed", async || provider.call_count() > 20).await;
                gateway.signal(rustix::process::Signal::KILL);
            }
        );
        assert!(a.len() + b.len() > 10);
        accepted.extend(a.into_iter().chain(b));
        gateway.kill().await;
    }
    let [finished, running, _, cancelled] = [0, 1, 2, 3].map(|at| accepted[at].clone());
    let before: Vec<String> = seen.lock().unwrap().clone();
    let provider = recording_provider(&seen);
    let gateway = with_embedded_queue(&provider, state.path()).start().await;
    let result = gateway.result(&finished).await;
    assert_eq!((result.text(), result.header("x-function-status")), ("finished", Some("200")));
    assert_eq!(gateway.state(&finished).await["state"], "succeeded");
    let ids: HashSet<String> =
        accepted.iter().filter(|id| **id != cancelled && **id != running).cloned().collect();
    for id in &ids {
        gateway.wait_for_state(id, "succeeded").await;
    }
    gateway.wait_for_state(&running, "running").await;
    let seen = seen.lock().unwrap().clone();
    for id in ids.iter().chain([&running]) {
        assert!(seen.contains(id), "{id} was not made");
    }
    assert!(!seen.contains(&cancelled));
    assert_eq!(gateway.state(&cancelled).await["state"], "cancelled");
    let again = |id: &String| seen[before.len()..].contains(id);
    assert!(again(&running) && !again(&finished));
    // Every id is given to one call only.
    assert_eq!(accepted.iter().collect::<HashSet<_>>().len(), accepted.len());
}

#[tokio::test]
async fn dead_letters_and_idempotency_keys_survive_a_restart() {
    let (state, provider) =
        (tempfile::tempdir().unwrap(), replying_with(&[500, 500, 500, 200], "said"));
    let gateway = with_embedded_queue(&provider, state.path()).start().await;
    let id = gateway.enqueue("echo", &["X-Call-Id: mine", "Idempotency-Key: key"], "").await;
    gateway.wait_for_state(&id, "failed").await;
    gateway.kill().await;

    let gateway = with_embedded_queue(&provider, state.path()).start().await;
    assert_eq!(gateway.state(&id).await["dead"], true);
    assert_eq!(gateway.enqueue("echo", &["Idempotency-Key: key"], "").await, id);
    assert_eq!(gateway.enqueue("echo", &["X-Call-Id: mine"], "").await, id);
    assert_eq!(gateway.get("/system/queues").await.json()[0]["dead"], 1);
    assert_eq!(gateway.post(&format!("/system/calls/{id}/retry"), "").await.status(), 204);
    gateway.wait_for_state(&id, "succeeded").await;
    assert_eq!(provider.call_count(), 4);
}

#[tokio::test]
async fn attempt_counts_survive_a_restart() {
    let (state, mut provider) = (tempfile::tempdir().unwrap(), fast_retry().start());
    let gateway = with_embedded_queue(&provider, state.path()).start().await;
    let id = gateway.enqueue("echo", &[], "").await;
    let mut call = provider.next_call().await;
    call.read_body().await.unwrap();
    call.connection.send("HTTP/1.1 503 X\r\nRetry-After: 2\r\nContent-Length: 0\r\n\r\n").await;
    // The gateway queries the retry policy on this connection.
    provider.reuse_connection(call);
    let call_status = gateway.wait_for_state(&id, "retrying").await;
    assert_eq!((&call_status["attempts"], &call_status["status"]), (&1.into(), &503.into()));
    assert!(call_status["nextAttemptAt"].is_string(), "{call_status}");
    gateway.kill().await;

    let gateway = with_embedded_queue(&provider, state.path()).start().await;
    let call_status = gateway.state(&id).await;
    assert_eq!((&call_status["state"], &call_status["attempts"]), (&"retrying".into(), &1.into()));
    provider.next_call().await.respond(200, "").await;
    assert_eq!(gateway.wait_for_state(&id, "succeeded").await["attempts"], 2);
}

#[tokio::test]
async fn a_running_call_finishes_within_the_grace_period() {
    let (state, mut provider) = (tempfile::tempdir().unwrap(), fast_retry().start());
    let mut gateway = with_embedded_queue(&provider, state.path()).start().await;
    let id = gateway.enqueue("echo", &[], "").await;
    let mut call = provider.next_call().await;
    gateway.signal(rustix::process::Signal::TERM);
    gateway.wait_for_log("Stopping").await;
    call.respond(200, "done").await;
    assert!(gateway.wait_for_exit().await.success());

    let gateway = with_embedded_queue(&provider, state.path()).start().await;
    assert_eq!(gateway.state(&id).await["state"], "succeeded");
    assert_eq!(gateway.result(&id).await.text(), "done");
    assert_eq!(provider.call_count(), 1);
}

#[tokio::test]
async fn a_hanging_call_is_aborted_at_shutdown_and_executed_again_later() {
    let (state, mut provider) = (tempfile::tempdir().unwrap(), fast_retry().start());
    let mut gateway =
        with_embedded_queue(&provider, state.path()).var("shutdown_grace", "300ms").start().await;
    let id = gateway.enqueue("echo", &[], "body").await;
    let mut hangs = provider.next_call().await;
    gateway.signal(rustix::process::Signal::TERM);
    assert!(gateway.wait_for_exit().await.success());
    hangs.read_body().await.unwrap();
    hangs.connection.read_to_close().await;

    let gateway = with_embedded_queue(&provider, state.path()).start().await;
    let mut call = provider.next_call().await;
    assert_eq!(call.head.header("x-call-id"), Some(id.as_str()));
    assert_eq!(call.read_body().await.unwrap(), b"body");
    call.send_response(200, b"").await;
    gateway.wait_for_state(&id, "succeeded").await;
}

#[tokio::test]
async fn a_call_waits_for_an_unavailable_provider() {
    let (state, provider) = (tempfile::tempdir().unwrap(), Provider::manual());
    let (address, builder) = (provider.address, with_embedded_queue(&provider, state.path()));
    drop(provider);
    let gateway = builder.start().await;
    let id = gateway.enqueue("echo", &[], "").await;
    // The call has been executed once; its retry policy is unknown.
    gateway.wait_for_log("The retry policy of a queued call is not known yet").await;
    assert_eq!(gateway.state(&id).await["state"], "running");
    let provider = fast_retry().listen_on(address).handler(async |mut call| {
        call.respond(200, "back").await;
        Some(call.connection)
    });
    let _provider = provider.start();
    assert_eq!(gateway.wait_for_state(&id, "succeeded").await["attempts"], 2);
    assert_eq!(gateway.result(&id).await.text(), "back");
}

#[tokio::test]
async fn unconfirmed_function_names_are_limited_while_the_provider_is_unavailable() {
    const NAMES: usize = 1000;
    let (state, provider) = (tempfile::tempdir().unwrap(), fast_retry().start());
    let (address, builder) = (provider.address, with_embedded_queue(&provider, state.path()));
    let gateway = builder.var("with_worker", "false").start().await;
    gateway.enqueue("known", &[], "").await;
    drop(provider);
    let clients = (0..10).map(async |client| {
        let mut connection = gateway.connect().await;
        for name in (client..NAMES).step_by(10) {
            let response =
                connection.exchange(post(&format!("/async-function/made-up-{name}"), "")).await;
            assert_eq!(response.status(), 202, "{response}");
        }
    });
    join_all(clients).await;
    let response = gateway.send_async("another", &[], "").await;
    assert_eq!((response.status(), response.header("retry-after")), (503, Some("1")), "{response}");
    assert!(response.text().contains("the provider has not confirmed"), "{response}");
    // Neither a function that has responded nor a name that is already queued counts as another name.
    gateway.enqueue("known", &[], "").await;
    gateway.enqueue("made-up-0", &[], "").await;
    let provider = fast_retry().listen_on(address).start();
    gateway.enqueue("another", &[], "").await;
    drop(provider);
    gateway.enqueue("one-more", &[], "").await;
}

#[tokio::test]
async fn an_unresponsive_provider_does_not_delay_enqueueing() {
    let state = tempfile::tempdir().unwrap();
    // Connections to it are established, and never accepted.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let provider = Provider::manual();
    let gateway = with_embedded_queue(&provider, state.path())
        .var("functions_provider_url", format!("http://{}", silent.local_addr().unwrap()))
        .start()
        .await;
    // Its upstream_timeout of 60 s is longer than this waits.
    let id = gateway.enqueue("echo", &[], "").await;
    gateway.wait_for_state(&id, "running").await;
}

#[tokio::test]
async fn a_queue_file_is_locked_by_one_process() {
    let (state, provider) = (tempfile::tempdir().unwrap(), fast_retry().start());
    let gateway = with_embedded_queue(&provider, state.path()).start().await;
    let ended = with_embedded_queue(&provider, state.path()).run_to_exit(&[]).await;
    assert_eq!(ended.status.code(), Some(1));
    let stderr = String::from_utf8_lossy(&ended.stderr);
    let file = state.path().join("queue.redb").display().to_string();
    assert!(stderr.contains(&file), "{stderr}");
    // The first gateway is not affected.
    gateway.enqueue("echo", &[], "").await;
}
