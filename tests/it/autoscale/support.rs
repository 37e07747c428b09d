//! A provider whose functions have replicas, and that records the scale requests.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::support::connection::{Connection, Head, request};
use crate::support::gateway::{self, Gateway};
use crate::support::provider::{Invocation, Provider};
use crate::support::within;

/// The provider's functions and its scripted failures.
#[derive(Default)]
pub(super) struct ScalingProvider {
    functions: Mutex<BTreeMap<&'static str, Function>>,
    /// Every response is a 500.
    pub(super) failing: AtomicBool,
    /// The function list is empty.
    pub(super) lists_nothing: AtomicBool,
    /// Scale requests to refuse before one is accepted.
    pub(super) refusals: AtomicUsize,
    /// CPU usage of every function, in millicores.
    pub(super) cpu: AtomicU64,
    /// Number of function lists sent.
    pub(super) lists: AtomicUsize,
}

struct Function {
    labels: Value,
    replicas: u64,
    scale_requests: Vec<u64>,
}

impl ScalingProvider {
    /// Starts a provider with functions of these names and `com.openfaas.scale.*` labels, each with one replica.
    pub(super) fn start(functions: &[(&'static str, Value)]) -> (Arc<Self>, Provider) {
        let script = Self::with_functions(functions);
        let provider = script.builder().start();
        (script, provider)
    }

    pub(super) fn with_functions(functions: &[(&'static str, Value)]) -> Arc<Self> {
        let script = Arc::new(Self::default());
        for (name, short) in functions {
            let labels: BTreeMap<_, _> = short
                .as_object()
                .unwrap()
                .iter()
                .map(|(label, value)| (format!("com.openfaas.scale.{label}"), value.clone()))
                .collect();
            let function =
                Function { labels: json!(labels), replicas: 1, scale_requests: Vec::new() };
            script.functions.lock().unwrap().insert(name, function);
        }
        script
    }

    /// A provider whose function calls are handed to the test.
    pub(super) fn builder(self: &Arc<Self>) -> crate::support::provider::Builder {
        let script = Arc::clone(self);
        Provider::builder().api(move |head, body| script.api_response(head, body))
    }

    /// Replica counts requested for `function`, in order.
    pub(super) fn scale_requests(&self, function: &str) -> Vec<u64> {
        self.functions.lock().unwrap()[function].scale_requests.clone()
    }

    /// Fails if `function` was scaled.
    #[track_caller]
    pub(super) fn assert_not_scaled(&self, function: &str) {
        let scale_requests = self.scale_requests(function);
        assert!(scale_requests.is_empty(), "{function} was scaled to {scale_requests:?}");
    }

    /// Resets the function to one replica and no scale requests.
    pub(super) fn reset(&self, function: &str) {
        let mut functions = self.functions.lock().unwrap();
        let entry = functions.get_mut(function).unwrap();
        entry.replicas = 1;
        entry.scale_requests.clear();
    }

    /// Sets the replica count as an operator would.
    pub(super) fn set_replicas(&self, function: &str, replicas: u64) {
        self.functions.lock().unwrap().get_mut(function).unwrap().replicas = replicas;
    }

    pub(super) fn replicas(&self, function: &str) -> u64 {
        self.functions.lock().unwrap()[function].replicas
    }

    pub(super) fn list_count(&self) -> usize {
        self.lists.load(SeqCst)
    }

    fn api_response(&self, head: &Head, body: &[u8]) -> Option<(u16, String)> {
        let path = head.target().split('?').next()?;
        if path.starts_with("/system/") && self.failing.load(SeqCst) {
            return Some((500, "broken".to_owned()));
        }
        if path == "/system/functions" && self.lists_nothing.load(SeqCst) {
            return Some((200, "[]".to_owned()));
        }
        let mut functions = self.functions.lock().unwrap();
        if path == "/system/functions" {
            self.lists.fetch_add(1, SeqCst);
            let all: Vec<Value> =
                functions.iter().map(|(name, function)| function.status(name)).collect();
            return Some((200, json!(all).to_string()));
        }
        if let Some(name) = path.strip_prefix("/system/function/") {
            let mut status = functions.get(name)?.status(name);
            let cpu = self.cpu.load(SeqCst);
            if cpu > 0 && head.target().contains("usage=true") {
                status["usage"] = json!({"cpu": cpu, "totalMemoryBytes": 1});
            }
            return Some((200, status.to_string()));
        }
        let function = functions.get_mut(path.strip_prefix("/system/scale-function/")?)?;
        let refuse = |left: usize| left.checked_sub(1);
        if self.refusals.fetch_update(SeqCst, SeqCst, refuse).is_ok() {
            return Some((500, "not now".to_owned()));
        }
        let request: Value = serde_json::from_slice(body).unwrap();
        function.replicas = request["replicas"].as_u64().unwrap();
        function.scale_requests.push(function.replicas);
        Some((202, String::new()))
    }
}

impl Function {
    fn status(&self, name: &str) -> Value {
        json!({
            "name": name, "namespace": "fn", "image": "i", "labels": self.labels,
            "replicas": self.replicas, "availableReplicas": self.replicas,
        })
    }
}

/// A gateway with autoscaling and a window of 2 seconds.
pub(super) fn autoscaling_gateway(provider: &Provider) -> gateway::Builder {
    Gateway::builder()
        .provider(provider)
        .var("autoscale", "true")
        .var("autoscale_window", "2s")
        .var("scale_from_zero", "true")
}

/// Calls that run until they are released.
#[derive(Default)]
pub(super) struct HeldCalls(Vec<(Connection, Invocation)>);

impl HeldCalls {
    /// Starts `count` calls of `function`, and waits until each has reached the provider.
    pub(super) async fn hold(
        &mut self,
        gateway: &Gateway,
        provider: &mut Provider,
        function: &str,
        count: usize,
    ) {
        for _ in 0..count {
            let mut client = gateway.connect().await;
            client.send(request("GET", &format!("/function/{function}"), &[], "")).await;
            self.0.push((client, provider.next_call().await));
        }
    }

    /// Responds to all of them.
    pub(super) async fn release(&mut self) {
        for (mut client, mut call) in self.0.drain(..) {
            call.respond(200, "done").await;
            let response = within("the response of a held call", client.read_response()).await;
            assert_eq!(response.status(), 200);
        }
    }
}

/// Waits until the autoscaler of `gateway` manages `function`.
pub(super) async fn wait_until_scaled(gateway: &Gateway, function: &str) {
    let labels = [("function_name", function)];
    gateway
        .wait_for_metric("the autoscaler manages the function", |metrics| {
            metrics.get("gateway_autoscale_desired_replicas", &labels).is_some()
        })
        .await;
}

/// Number of log lines that contain `text`.
pub(super) fn log_count(gateway: &Gateway, text: &str) -> usize {
    gateway.log().iter().filter(|line| line.contains(text)).count()
}

/// Returns whether each number is greater than the one before it.
pub(super) fn is_increasing(counts: &[u64]) -> bool {
    counts.windows(2).all(|pair| pair[0] < pair[1])
}
