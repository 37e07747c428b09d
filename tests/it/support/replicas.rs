//! A function whose replicas come and go, as a provider keeps it.

use std::sync::{Arc, Mutex, MutexGuard};

use serde_json::json;

use crate::support::provider::{self, Call, Provider};
use crate::support::wire::{Head, Wire};

/// The function `echo`, of a provider that answers for no other.
#[derive(Clone, Default)]
pub(crate) struct Replicas(Arc<Mutex<State>>);

#[derive(Default)]
pub(crate) struct State {
    pub(crate) wanted: u64,
    pub(crate) available: u64,
    /// So many questions are answered before what is wanted is available.
    pub(crate) starts_after: usize,
    /// How often the provider was asked how the function is.
    pub(crate) questions: usize,
    /// What it was scaled to.
    pub(crate) scaled: Vec<u64>,
    /// So many calls meet a replica that does not listen yet, with this status.
    pub(crate) deaf: usize,
    pub(crate) deaf_status: u16,
    /// After each of them the provider reports no available replica, until it is asked again.
    pub(crate) falls: bool,
    /// The bodies of calls, with the status that each was answered with.
    pub(crate) calls: Vec<(usize, u16)>,
    pub(crate) deleted: bool,
    /// Whether the list has it.
    pub(crate) unlisted: bool,
}

impl Replicas {
    pub(crate) fn at(wanted: u64, available: u64) -> Self {
        let replicas = Self::default();
        *replicas.state() = State { wanted, available, deaf_status: 503, ..State::default() };
        replicas
    }

    /// Looks at it, or changes it.
    pub(crate) fn with<T>(&self, look: impl FnOnce(&mut State) -> T) -> T {
        look(&mut self.state())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// A provider that has the function.
    pub(crate) fn provider(&self) -> provider::Builder {
        let (api, calls) = (self.clone(), self.clone());
        Provider::builder().api(move |head, body| api.api(head, body)).answering(move |call| {
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
                state.questions += 1;
                if state.available < state.wanted {
                    match state.starts_after {
                        0 => state.available = state.wanted,
                        _ => state.starts_after -= 1,
                    }
                }
                Some((200, state.json()))
            }
            ("POST", "/system/scale-function/echo") => {
                let wanted: serde_json::Value = serde_json::from_slice(body).unwrap();
                let wanted = wanted["replicas"].as_u64().unwrap();
                state.scaled.push(wanted);
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

    /// Answers with the body of the call, or says that there is nobody to do so.
    async fn call(&self, mut call: Call) -> Option<Wire> {
        let body = call.body().await.ok()?;
        let status = {
            let mut state = self.state();
            let status = match state.deaf {
                0 if state.available > 0 => 200,
                0 => 503,
                _ => {
                    state.deaf -= 1;
                    if state.falls {
                        state.available = 0;
                        state.starts_after = 1;
                    }
                    state.deaf_status
                }
            };
            state.calls.push((body.len(), status));
            status
        };
        if status == 200 {
            call.answer_with(200, &body).await;
        } else {
            let head = format!(
                "HTTP/1.1 {status} X\r\nX-OpenFaaS-Internal: proxy\r\nContent-Length: 0\r\n\r\n"
            );
            call.wire.try_send(head).await.ok()?;
        }
        Some(call.wire)
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
