//! A provider whose functions have replicas, and that remembers how it was told to change them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::support::gateway::{self, Gateway};
use crate::support::provider::{Call, Provider};
use crate::support::wire::{Head, Wire, request};
use crate::support::within;

/// What the provider knows and was told.
#[derive(Default)]
pub(super) struct Script {
    functions: Mutex<BTreeMap<&'static str, Function>>,
    /// It answers nothing but 500.
    pub(super) broken: AtomicBool,
    /// It lists no functions.
    pub(super) silent: AtomicBool,
    /// Requests to scale that it refuses before it takes one.
    pub(super) refusals: AtomicUsize,
    /// Millicores that every function uses.
    pub(super) cpu: AtomicU64,
    /// How often it has listed its functions.
    pub(super) lists: AtomicUsize,
}

struct Function {
    labels: Value,
    replicas: u64,
    asked: Vec<u64>,
}

impl Script {
    /// A provider with functions of these names and `com.openfaas.scale.*` labels, each with one replica.
    pub(super) fn start(functions: &[(&'static str, Value)]) -> (Arc<Self>, Provider) {
        let script = Self::of(functions);
        let provider = script.builder().start();
        (script, provider)
    }

    pub(super) fn of(functions: &[(&'static str, Value)]) -> Arc<Self> {
        let script = Arc::new(Self::default());
        for (name, short) in functions {
            let labels: BTreeMap<_, _> = short
                .as_object()
                .unwrap()
                .iter()
                .map(|(label, value)| (format!("com.openfaas.scale.{label}"), value.clone()))
                .collect();
            let function = Function { labels: json!(labels), replicas: 1, asked: Vec::new() };
            script.functions.lock().unwrap().insert(name, function);
        }
        script
    }

    /// One whose calls are handed to the test.
    pub(super) fn builder(self: &Arc<Self>) -> crate::support::provider::Builder {
        let script = Arc::clone(self);
        Provider::builder().api(move |head, body| script.answer(head, body))
    }

    /// What it was told for `function`, in order.
    pub(super) fn asked(&self, function: &str) -> Vec<u64> {
        self.functions.lock().unwrap()[function].asked.clone()
    }

    /// Fails if it was told anything for `function`.
    #[track_caller]
    pub(super) fn untouched(&self, function: &str) {
        let asked = self.asked(function);
        assert!(asked.is_empty(), "{function} was scaled to {asked:?}");
    }

    /// As if it had one replica, and nobody had ever asked for another count.
    pub(super) fn reset(&self, function: &str) {
        let mut functions = self.functions.lock().unwrap();
        let it = functions.get_mut(function).unwrap();
        it.replicas = 1;
        it.asked.clear();
    }

    /// As if an operator had scaled it.
    pub(super) fn scaled_by_hand(&self, function: &str, replicas: u64) {
        self.functions.lock().unwrap().get_mut(function).unwrap().replicas = replicas;
    }

    pub(super) fn replicas(&self, function: &str) -> u64 {
        self.functions.lock().unwrap()[function].replicas
    }

    pub(super) fn lists(&self) -> usize {
        self.lists.load(SeqCst)
    }

    fn answer(&self, head: &Head, body: &[u8]) -> Option<(u16, String)> {
        let path = head.target().split('?').next()?;
        if path.starts_with("/system/") && self.broken.load(SeqCst) {
            return Some((500, "broken".to_owned()));
        }
        if path == "/system/functions" && self.silent.load(SeqCst) {
            return Some((200, "[]".to_owned()));
        }
        let mut functions = self.functions.lock().unwrap();
        if path == "/system/functions" {
            self.lists.fetch_add(1, SeqCst);
            let all: Vec<Value> = functions.iter().map(|(name, it)| it.status(name)).collect();
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
        function.asked.push(function.replicas);
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

/// A gateway that scales, with windows of 2 seconds.
pub(super) fn scaling(provider: &Provider) -> gateway::Builder {
    Gateway::builder()
        .provider(provider)
        .var("autoscale", "true")
        .var("autoscale_window", "2s")
        .var("scale_from_zero", "true")
}

/// Calls that run until they are let go.
#[derive(Default)]
pub(super) struct Held(Vec<(Wire, Call)>);

impl Held {
    /// Makes `count` calls of `function`, and waits until each has reached the provider.
    pub(super) async fn hold(
        &mut self,
        gateway: &Gateway,
        provider: &mut Provider,
        function: &str,
        count: usize,
    ) {
        for _ in 0..count {
            let mut caller = gateway.connect().await;
            caller.send(request("GET", &format!("/function/{function}"), &[], "")).await;
            self.0.push((caller, provider.call().await));
        }
    }

    /// Answers them all.
    pub(super) async fn release(&mut self) {
        for (mut caller, mut call) in self.0.drain(..) {
            call.answer(200, "done").await;
            let answer = within("the answer of a held call", caller.answer()).await;
            assert_eq!(answer.status(), 200);
        }
    }
}

/// Waits until `gateway` scales `function`.
pub(super) async fn scales(gateway: &Gateway, function: &str) {
    let labels = [("function_name", function)];
    gateway
        .metrics_show("it scales the function", |metrics| {
            metrics.get("gateway_autoscale_desired_replicas", &labels).is_some()
        })
        .await;
}

/// How often a line of the log has `text`.
pub(super) fn said(gateway: &Gateway, text: &str) -> usize {
    gateway.log().iter().filter(|line| line.contains(text)).count()
}

/// Whether each is above the one before it.
pub(super) fn rises(counts: &[u64]) -> bool {
    counts.windows(2).all(|pair| pair[0] < pair[1])
}
