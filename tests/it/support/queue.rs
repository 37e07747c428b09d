//! Queued calls: gateways with a queue, and requests about calls.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use serde_json::Value;
use tokio::sync::watch;

use crate::support::connection::{Head, Response, request};
use crate::support::eventually;
use crate::support::gateway::{Builder, Gateway};
use crate::support::provider::{self, Invocation, Provider};

/// A gateway with its queue in `state`, and callbacks to this machine allowed.
pub(crate) fn with_embedded_queue(provider: &Provider, state: &Path) -> Builder {
    Gateway::builder()
        .provider(provider)
        .var("queue", "embedded")
        .var("state_dir", state.display())
        .var("callback_allowlist", "loopback")
}

/// A provider whose functions, except for `unknown`, allow three attempts at short intervals.
pub(crate) fn fast_retry() -> provider::Builder {
    Provider::builder().api(|head, _| function_status(head))
}

/// A provider whose functions respond with `response` once `open` is true.
pub(crate) fn replying_when_open(
    response: impl Into<Arc<[u8]>>,
    open: &watch::Sender<bool>,
) -> Provider {
    let (response, gate) = (response.into(), open.subscribe());
    fast_retry()
        .handler(move |mut call| {
            let (response, mut gate) = (Arc::clone(&response), gate.clone());
            async move {
                call.read_body().await.ok()?;
                gate.wait_for(|open| *open).await.ok()?;
                call.send_response(200, &response).await;
                Some(call.connection)
            }
        })
        .start()
}

/// Status of a function with such a retry policy.
pub(crate) fn function_status(head: &Head) -> Option<(u16, String)> {
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

/// A provider whose functions respond with `statuses` in turn and the body `text`; the last status is repeated.
pub(crate) fn replying_with(statuses: &'static [u16], text: &'static str) -> Provider {
    let come = AtomicUsize::new(0);
    let handler = move |mut call: Invocation| {
        let status = statuses[come.fetch_add(1, SeqCst).min(statuses.len() - 1)];
        async move {
            call.respond(status, text).await;
            Some(call.connection)
        }
    };
    fast_retry().handler(handler).start()
}

impl Gateway {
    /// Sends a request with `headers` on a new connection.
    pub(crate) async fn request(&self, method: &str, target: &str, headers: &[&str]) -> Response {
        self.connect().await.exchange(request(method, target, headers, "")).await
    }

    /// Sends an asynchronous call of `function` with `headers` and `body`.
    pub(crate) async fn send_async(
        &self,
        function: &str,
        headers: &[&str],
        body: &str,
    ) -> Response {
        let target = format!("/async-function/{function}");
        self.connect().await.exchange(request("POST", &target, headers, body)).await
    }

    /// Enqueues a call, which must be accepted. Returns its id.
    pub(crate) async fn enqueue(&self, function: &str, headers: &[&str], body: &str) -> String {
        let response = self.send_async(function, headers, body).await;
        assert_eq!(response.status(), 202, "{response}");
        response.header("x-call-id").unwrap().to_owned()
    }

    /// State of a call.
    pub(crate) async fn state(&self, id: &str) -> Value {
        let response = self.get(&format!("/async-function/{id}")).await;
        assert_eq!(response.status(), 200, "{response}");
        response.json()
    }

    /// Waits until a call is in `state`. Returns its status.
    pub(crate) async fn wait_for_state(&self, id: &str, state: &str) -> Value {
        let mut call_status = Value::Null;
        let what = format!("the call is {state}");
        eventually(&what, async || {
            call_status = self.state(id).await;
            call_status["state"] == state
        })
        .await;
        call_status
    }

    /// Cancels a call.
    pub(crate) async fn cancel(&self, id: &str) -> Response {
        self.request("DELETE", &format!("/async-function/{id}"), &[]).await
    }

    /// The stored response of a call.
    pub(crate) async fn result(&self, id: &str) -> Response {
        self.get(&format!("/async-function/{id}/result")).await
    }
}
