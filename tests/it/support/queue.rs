//! Queued calls: a gateway with a queue, and what is asked of it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use serde_json::Value;
use tokio::sync::watch;

use crate::support::eventually;
use crate::support::gateway::{Builder, Gateway};
use crate::support::provider::{self, Call, Provider};
use crate::support::wire::{Answer, Head, request};

/// A gateway that keeps its queue in `state`, and may call back to this machine.
pub(crate) fn queueing(provider: &Provider, state: &Path) -> Builder {
    Gateway::builder()
        .provider(provider)
        .var("queue", "embedded")
        .var("state_dir", state.display())
        .var("callback_allowlist", "loopback")
}

/// A provider whose functions, all but `unknown`, are made three times in quick succession if they fail.
pub(crate) fn patient() -> provider::Builder {
    Provider::builder().api(|head, _| function(head))
}

/// Functions that respond with `response` once `open` is.
pub(crate) fn responding(response: impl Into<Arc<[u8]>>, open: &watch::Sender<bool>) -> Provider {
    let (response, gate) = (response.into(), open.subscribe());
    patient()
        .answering(move |mut call| {
            let (response, mut gate) = (Arc::clone(&response), gate.clone());
            async move {
                call.body().await.ok()?;
                gate.wait_for(|open| *open).await.ok()?;
                call.answer_with(200, &response).await;
                Some(call.wire)
            }
        })
        .start()
}

/// What such a provider says of a function.
pub(crate) fn function(head: &Head) -> Option<(u16, String)> {
    let name = head.target().split('?').next()?.strip_prefix("/system/function/")?;
    if name == "unknown" {
        return Some((404, "no such function".to_owned()));
    }
    let status = serde_json::json!({
        "name": name, "namespace": "fn", "image": "i", "replicas": 1, "availableReplicas": 1,
        "annotations": {
            "com.openfaas.retry.attempts": "3",
            "com.openfaas.retry.min_wait": "100ms",
            "com.openfaas.retry.max_wait": "100ms",
        },
    });
    Some((200, status.to_string()))
}

/// One whose functions answer with `statuses` in turn, the last one for ever; the body is `text`.
pub(crate) fn answering(statuses: &'static [u16], text: &'static str) -> Provider {
    let come = AtomicUsize::new(0);
    let answering = move |mut call: Call| {
        let status = statuses[come.fetch_add(1, SeqCst).min(statuses.len() - 1)];
        async move {
            call.answer(status, text).await;
            Some(call.wire)
        }
    };
    patient().answering(answering).start()
}

impl Gateway {
    /// Makes a request with `headers` on a connection of its own.
    pub(crate) async fn ask(&self, method: &str, target: &str, headers: &[&str]) -> Answer {
        self.connect().await.ask(request(method, target, headers, "")).await
    }

    /// Queues a call of `function` with `headers` and `body`.
    pub(crate) async fn queue(&self, function: &str, headers: &[&str], body: &str) -> Answer {
        let target = format!("/async-function/{function}");
        self.connect().await.ask(request("POST", &target, headers, body)).await
    }

    /// Queues a call that is taken in; its id.
    pub(crate) async fn queued(&self, function: &str, headers: &[&str], body: &str) -> String {
        let answer = self.queue(function, headers, body).await;
        assert_eq!(answer.status(), 202, "{answer}");
        answer.header("x-call-id").unwrap().to_owned()
    }

    /// What is told of a call.
    pub(crate) async fn state(&self, id: &str) -> Value {
        let answer = self.get(&format!("/async-function/{id}")).await;
        assert_eq!(answer.status(), 200, "{answer}");
        answer.json()
    }

    /// Waits until a call is in `state`; what is then told of it.
    pub(crate) async fn becomes(&self, id: &str, state: &str) -> Value {
        let mut told = Value::Null;
        let what = format!("the call is {state}");
        eventually(&what, async || {
            told = self.state(id).await;
            told["state"] == state
        })
        .await;
        told
    }

    /// Takes a call back.
    pub(crate) async fn cancel(&self, id: &str) -> Answer {
        self.ask("DELETE", &format!("/async-function/{id}"), &[]).await
    }

    /// The answer that is kept of a call.
    pub(crate) async fn result(&self, id: &str) -> Answer {
        self.get(&format!("/async-function/{id}/result")).await
    }
}
