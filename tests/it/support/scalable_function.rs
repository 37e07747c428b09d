//! A provider with one function whose replicas change.

use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::json;

use crate::support::connection::{Connection, Head};
use crate::support::provider::{self, Invocation, Provider};

/// The function `echo`; its provider has no other.
#[derive(Clone, Default)]
pub(crate) struct ScalableFunction(Arc<Mutex<State>>);

#[derive(Default)]
pub(crate) struct State {
    pub(crate) wanted: u64,
    pub(crate) available: u64,
    /// Number of status queries before the desired replicas are available.
    pub(crate) queries_until_ready: usize,
    /// Number of received status queries.
    pub(crate) status_queries: usize,
    /// The requested replica counts.
    pub(crate) scale_requests: Vec<u64>,
    /// Number of calls that reach a replica that does not listen yet, and receive this status.
    pub(crate) calls_to_refuse: usize,
    pub(crate) refusal_status: u16,
    /// After each of these calls the provider reports no available replica, until it is queried again.
    pub(crate) unavailable_after_refusal: bool,
    /// Lengths of the bodies of calls, with the status of each response.
    pub(crate) calls: Vec<(usize, u16)>,
    pub(crate) deleted: bool,
    /// Whether the function is missing from the list.
    pub(crate) unlisted: bool,
}

impl ScalableFunction {
    pub(crate) fn with_replicas(wanted: u64, available: u64) -> Self {
        let replicas = Self::default();
        *replicas.state() = State { wanted, available, refusal_status: 503, ..State::default() };
        replicas
    }

    /// Reads or changes the state.
    pub(crate) fn with<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        look(&mut self.state())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// A provider that has the function.
    pub(crate) fn provider(&self) -> provider::Builder {
        let (api, calls) = (self.clone(), self.clone());
        Provider::builder().api(move |head, body| api.api(head, body)).handler(move |call| {
            let replicas = calls.clone();
            async move { replicas.call(call).await }
        })
    }

    fn api(&self, head: &Head, body: &[u8]) -> Option<(u16, String)> {
        let mut state = self.state();
        let path = head.target().split('?').next().unwrap_or_default();
        match (head.method(), path) {
            ("GET", "/system/functions") if state.unlisted => Some((200, "[]".to_owned())),
            ("GET", "/system/functions") => Some((200, format!("[{}]", state.json()))),
            ("GET", "/system/function/echo") if !state.deleted => {
                state.status_queries += 1;
                if state.available < state.wanted {
                    match state.queries_until_ready {
                        0 => state.available = state.wanted,
                        _ => state.queries_until_ready -= 1,
                    }
                }
                Some((200, state.json()))
            }
            ("POST", "/system/scale-function/echo") => {
                let wanted: serde_json::Value = serde_json::from_slice(body).unwrap();
                let wanted = wanted["replicas"].as_u64().unwrap();
                state.scale_requests.push(wanted);
                (state.wanted, state.available) = (wanted, state.available.min(wanted));
                Some((202, String::new()))
            }
            ("DELETE", "/system/functions") => {
                (state.deleted, state.unlisted) = (true, true);
                Some((202, String::new()))
            }
            _ => None,
        }
    }

    /// Responds with the body of the call, or with an error if no replica is available.
    async fn call(&self, mut call: Invocation) -> Option<Connection> {
        let body = call.read_body().await.ok()?;
        let status = {
            let mut state = self.state();
            let status = match state.calls_to_refuse {
                0 if state.available > 0 => 200,
                0 => 503,
                _ => {
                    state.calls_to_refuse -= 1;
                    if state.unavailable_after_refusal {
                        state.available = 0;
                        state.queries_until_ready = 1;
                    }
                    state.refusal_status
                }
            };
            state.calls.push((body.len(), status));
            status
        };
        if status == 200 {
            call.send_response(200, &body).await;
        } else {
            let head = format!(
                "HTTP/1.1 {status} X\r\nX-OpenFaaS-Internal: proxy\r\nContent-Length: 0\r\n\r\n"
            );
            call.connection.try_send(head).await.ok()?;
        }
        Some(call.connection)
    }
}

impl State {
    fn json(&self) -> String {
        json!({
            "name": "echo", "namespace": "fn", "image": "i",
            "replicas": self.wanted, "availableReplicas": self.available,
        })
        .to_string()
    }
}
