//! A round: asks the provider what there is, decides for each function, and has the provider do it.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::stream;
use tokio::time::timeout;

use crate::async_api::QueueIngress;
use crate::autoscale::decide::{Millis, Rules, decide, may_sleep};
use crate::autoscale::policy::{Kind, Policy, owns};
use crate::autoscale::tended::{Change, Complaint, Tended};
use crate::autoscale::view::{View, panic_window};
use crate::function::Function;
use crate::metrics::autoscale::{AutoscaleMetrics, ScaleSample};
use crate::metrics::poller::ProviderPoller;

/// For the list of all functions.
const LIST: Duration = Duration::from_secs(5);
/// For what all of them use.
const USAGE: Duration = Duration::from_secs(2);
/// For a count of what the queue holds.
const COUNT: Duration = Duration::from_secs(2);
/// For all changes of a round.
const CHANGES: Duration = Duration::from_secs(10);
/// Functions that are remembered, beyond those that are listed.
const MOST_REMEMBERED: usize = 20_000;
/// Questions to the provider at a time.
const AT_ONCE: usize = 8;

/// What goes from one round to the next.
pub struct Rounds {
    pub poll: ProviderPoller,
    pub gauges: AutoscaleMetrics,
    pub ingress: Option<Arc<QueueIngress>>,
    pub rules: Rules,
    pub view: Arc<Mutex<View>>,
    pub began: Instant,
    functions: HashMap<Function, Tended>,
}

impl Rounds {
    pub fn new(
        poll: ProviderPoller,
        gauges: AutoscaleMetrics,
        ingress: Option<Arc<QueueIngress>>,
        rules: Rules,
        view: Arc<Mutex<View>>,
        began: Instant,
    ) -> Self {
        Self { poll, gauges, ingress, rules, view, began, functions: HashMap::new() }
    }

    /// Whether a function needs more replicas before the next round is due.
    pub fn is_urgent(&self) -> bool {
        let (view, now) = (self.view.lock().unwrap_or_else(PoisonError::into_inner), self.now());
        let by_calls = |it: &&Tended| it.is_present() && it.policy.kind != Kind::Cpu;
        self.functions.values().filter(by_calls).any(|it| {
            let seen = view.seen(it.subject(panic_window(self.rules.window), now), now);
            let (decision, _) = decide(self.rules, &it.policy, seen, it.memory.clone());
            decision.ask && decision.desired > it.wanted
        })
    }

    /// Another gateway acts. What is remembered here will be old when it is needed again.
    pub fn rest(&mut self) {
        if !self.functions.is_empty() {
            self.functions.clear();
            self.gauges.set_functions(&[]);
        }
    }

    /// Does all that is to be done now. Nothing is changed when the provider does not answer.
    pub async fn round(&mut self) {
        match timeout(LIST, self.poll.functions()).await {
            Ok(Ok(listed)) => {
                let listed: HashMap<Function, _> = listed
                    .into_iter()
                    .filter_map(|status| Some((self.poll.function_of(&status)?, status)))
                    .filter(|(_, status)| status.labels.as_ref().is_some_and(owns))
                    .collect();
                let now = self.now();
                let has_room = self.functions.len() < MOST_REMEMBERED;
                self.functions.retain(|function, it| {
                    listed.contains_key(function) || (it.is_missing(now) && has_room)
                });
                for (function, status) in listed {
                    let labels = status.labels.unwrap_or_default();
                    let (policy, bad) = Policy::from_labels(&labels);
                    let it = self.functions.entry(function.clone()).or_default();
                    (it.label, it.policy) = (function.to_string(), policy);
                    it.is_listed(status.replicas, now);
                    it.complain_of_labels(&function, bad, self.rules);
                }
            }
            // The poll that goes on anyway says so.
            Ok(Err(_)) | Err(_) => return,
        }
        self.ask_for_usage().await;
        let changes = self.decide();
        self.carry_out(changes).await;
    }

    /// Asks what those functions use that are scaled by it.
    async fn ask_for_usage(&mut self) {
        let by_cpu = |it: &&Tended| it.is_present() && it.policy.kind == Kind::Cpu && it.wanted > 0;
        let functions: Vec<Function> = self
            .functions
            .iter()
            .filter(|(_, it)| by_cpu(it))
            .map(|(function, _)| function.clone())
            .collect();
        if functions.is_empty() {
            return;
        }
        let ask = |function: Function| {
            let provider = self.poll.provider.clone();
            async move {
                let usage = provider.usage(&function).await;
                (function, usage)
            }
        };
        // What is not told in time is not known.
        let answers = together(functions.into_iter().map(ask), USAGE).await;
        let (now, window) = (self.now(), self.rules.window);
        for (function, answer) in answers {
            let Some(it) = self.functions.get_mut(&function) else { continue };
            match answer {
                Ok(Some(usage)) if usage.cpu.is_finite() && usage.cpu >= 0.0 => {
                    it.uses(usage.cpu, now);
                    it.complaints.remove(&Complaint::NoUsage);
                }
                Ok(_) => it.complain(Complaint::NoUsage, || {
                    tracing::warn!(
                        function = %function,
                        "{function} is not scaled by cpu: the provider does not tell what it uses"
                    );
                }),
                Err(error) => {
                    tracing::debug!(function = %function, %error, "No usage of {function}");
                }
            }
        }
        for it in self.functions.values_mut() {
            it.cpu.retain(|(at, _)| now.saturating_sub(*at) < window);
        }
    }

    /// Decides for every function; what the provider is to be asked for.
    fn decide(&mut self) -> Vec<Change> {
        let (rules, now) = (self.rules, self.now());
        let view = self.view.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut changes, mut shown) = (Vec::new(), Vec::new());
        for (function, it) in self.functions.iter_mut().filter(|(_, it)| it.is_present()) {
            let seen = view.seen(it.subject(panic_window(rules.window), now), now);
            let (decision, memory) =
                decide(rules, &it.policy, seen, std::mem::take(&mut it.memory));
            it.memory = memory;
            shown.push(ScaleSample {
                label: it.label.clone(),
                kind: it.policy.kind.word(),
                load: seen.stable,
                desired: decision.desired,
            });
            if decision.ask {
                it.expect(decision.desired);
                changes.push(Change { function: function.clone(), seen, decision });
            }
        }
        drop(view);
        self.gauges.set_functions(&shown);
        changes
    }

    /// Has the provider make `changes`.
    async fn carry_out(&mut self, changes: Vec<Change>) {
        let mut open: HashSet<Function> = changes.iter().map(|it| it.function.clone()).collect();
        let waiting = match changes.iter().any(|change| change.decision.desired == 0) {
            true => self.waiting().await,
            false => Some(Arc::default()),
        };
        let this = &*self;
        let make = |change: Change| {
            let waiting = waiting.clone();
            async move {
                let Change { function, decision, .. } = &change;
                let (provider, known) = (&this.poll.provider, &this.poll.metrics.function_registry);
                let sleeps = decision.desired == 0;
                if sleeps {
                    // A call that comes from here on asks before it goes, and is counted before it asks.
                    known.invalidate(Some(&function.name));
                    if this.is_called(function, waiting.as_deref()) {
                        return (change, None);
                    }
                }
                let result = provider.scale(function, decision.desired).await;
                if sleeps {
                    // What it was told meanwhile may be from before.
                    known.invalidate(Some(&function.name));
                }
                (change, Some(result))
            }
        };
        let made = together(changes.into_iter().map(make), CHANGES).await;
        let now = self.now();
        for (change, result) in made {
            let Some(it) = self.functions.get_mut(&change.function) else { continue };
            match result {
                Some(Ok(())) => {
                    self.gauges.record_decision(&it.label, change.decision.reason.word())
                }
                Some(Err(_)) => it.memory.failed(now),
                None => it.memory.dropped(),
            }
            if let Some(result) = result {
                it.log(&change, result);
            }
            open.remove(&change.function);
        }
        // What has not come to an end by now is tried again.
        for function in open {
            if let Some(it) = self.functions.get_mut(&function) {
                it.memory.failed(now);
            }
        }
    }

    /// Queued calls by function, counted now; `None`: they cannot be counted.
    async fn waiting(&self) -> Option<Arc<HashMap<Arc<str>, u64>>> {
        let Some(ingress) = &self.ingress else { return Some(Arc::default()) };
        match timeout(COUNT, ingress.update_depths()).await {
            Ok(Ok(())) => ingress.pending_by_function(),
            Ok(Err(_)) | Err(_) => None,
        }
    }

    /// Whether there may be a call of `function` at this moment, or was one since it was decided that it sleeps: others
    /// may have been changed before it.
    fn is_called(&self, function: &Function, waiting: Option<&HashMap<Arc<str>, u64>>) -> bool {
        let Some(it) = self.functions.get(function) else { return true };
        let (label, now) = (it.label.as_str(), self.now());
        let may_sleep = {
            let view = self.view.lock().unwrap_or_else(PoisonError::into_inner);
            let seen = view.seen(it.subject(panic_window(self.rules.window), now), now);
            may_sleep(self.rules, &it.policy, seen)
        };
        // One may have come since the last sample.
        !may_sleep
            || waiting.is_none_or(|waiting| waiting.contains_key(label))
            || self.poll.metrics.function_loads().get(label).is_some_and(|it| it.in_flight > 0)
    }

    fn now(&self) -> Millis {
        Millis::try_from(self.began.elapsed().as_millis()).unwrap_or(Millis::MAX)
    }
}

/// What comes of `questions` in at most `patience`, some at a time.
async fn together<T>(
    questions: impl Iterator<Item = impl Future<Output = T>>,
    patience: Duration,
) -> Vec<T> {
    let questions: Vec<_> = questions.collect();
    let mut answers = Vec::new();
    let asked = stream::iter(questions).buffer_unordered(AT_ONCE).for_each(|answer| {
        answers.push(answer);
        std::future::ready(())
    });
    let _ = timeout(patience, asked).await;
    answers
}
