//! A function as it is deployed now: what was asked for, and what runs.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::response::Response;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::provider::process::call::{Call, CallError};
use crate::provider::process::pool::{NoSeat, Pool};
use crate::provider::process::replica::Seat;
use crate::provider::process::runner::Runner;
use crate::provider::process::spec::Mode;
use crate::provider::process::store::SavedFunction;
use crate::provider::process::sync::lock;
use crate::provider::process::workload::Workload;
use crate::provider::process::{fork, http_mode};
use crate::provider::types::{FunctionDeployment, FunctionStatus, Resources, StartFailure};

/// The label by which clients find the function that something belongs to. Every function has it.
const FAAS_FUNCTION: &str = "faas_function";

/// `deployment` with nothing in place of what is empty, which means the same.
fn without_empty(deployment: FunctionDeployment) -> FunctionDeployment {
    let map = |map: Option<BTreeMap<_, _>>| map.filter(|map| !map.is_empty());
    let list = |list: Option<Vec<_>>| list.filter(|list| !list.is_empty());
    FunctionDeployment {
        env_vars: map(deployment.env_vars),
        labels: map(deployment.labels),
        annotations: map(deployment.annotations),
        constraints: list(deployment.constraints),
        secrets: list(deployment.secrets),
        limits: deployment.limits.filter(|limits| *limits != Resources::default()),
        requests: deployment.requests.filter(|requests| *requests != Resources::default()),
        ..deployment
    }
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) workload: Arc<Workload>,
    pub(super) deployment: FunctionDeployment,
    /// RFC 3339.
    pub(super) created_at: String,
    replicas: AtomicU64,
    /// The processes, in HTTP mode.
    pool: Option<Arc<Pool>>,
    /// The processes of the version before, which take the calls until those of this one can.
    previous: Mutex<Option<Arc<Pool>>>,
    /// Cancelled when `previous` has been dealt with.
    settled: CancellationToken,
}

impl Entry {
    /// An entry whose processes are not started yet.
    pub(super) fn new(saved: SavedFunction, workload: Arc<Workload>, runner: &Arc<Runner>) -> Self {
        let pool = match workload.spec.mode {
            Mode::Http { .. } => {
                Some(Arc::new(Pool::new(Arc::clone(&workload), Arc::clone(runner))))
            }
            Mode::Fork(_) => None,
        };
        Self {
            workload,
            deployment: saved.deployment,
            created_at: saved.created_at,
            replicas: AtomicU64::new(saved.replicas),
            pool,
            previous: Mutex::new(None),
            settled: CancellationToken::new(),
        }
    }

    /// How many replicas are wanted.
    pub(super) fn replicas(&self) -> u64 {
        self.replicas.load(Relaxed)
    }

    /// This function as it is kept on disk, with so many replicas.
    pub(super) fn saved(&self, replicas: u64) -> SavedFunction {
        SavedFunction {
            deployment: self.deployment.clone(),
            replicas,
            created_at: self.created_at.clone(),
        }
    }

    /// Whether `deployment`, which names this function, asks for what is deployed already.
    pub(super) fn is_deployed_as(&self, deployment: &FunctionDeployment) -> bool {
        let namespace = self.workload.function.namespace.clone();
        let wanted = FunctionDeployment { namespace, ..deployment.clone() };
        without_empty(wanted) == without_empty(self.deployment.clone())
    }

    /// Starts or stops processes until there are as many as wanted.
    pub(super) fn scale(&self, replicas: u64) {
        self.replicas.store(replicas, Relaxed);
        if let Some(pool) = &self.pool {
            pool.scale(replicas);
        }
        if replicas == 0 {
            self.retire_previous();
        }
    }

    /// Takes over from `before`: its processes take the calls until those of this entry can.
    pub(super) fn take_over(self: &Arc<Self>, before: &Self, runner: &Runner) {
        let Some(old) = before.give_up_pool() else { return };
        // One that cannot be called has nothing to bridge, and would only be started again and again beside this one.
        let bridges = self.replicas() > 0 && old.ready() > 0;
        let Some(pool) = self.pool.clone().filter(|_| bridges) else {
            old.scale(0);
            return;
        };
        *lock(&self.previous) = Some(Arc::clone(&old));
        let entry = Arc::clone(self);
        let stopping = runner.tasks.stopping.clone();
        runner.tasks.spawn(async move {
            // All branches are cancel-safe.
            tokio::select! {
                () = pool.until_ready(entry.replicas().max(1)) => entry.retire_previous(),
                () = old.until_failing() => entry.retire_previous(),
                () = entry.settled.cancelled() => {}
                () = stopping.cancelled() => {}
            }
        });
    }

    /// Stops all processes, once they have ended their calls.
    pub(super) fn retire(&self) {
        self.scale(0);
    }

    /// Carries `call` out.
    pub(super) async fn call(&self, runner: &Runner, call: Call) -> Result<Response, CallError> {
        let function = &self.workload.function;
        if self.replicas() == 0 {
            return Err(CallError::ScaledToZero(function.clone()));
        }
        let limit = self.call_limit();
        match &self.workload.spec.mode {
            Mode::Fork(fork) => fork::call(runner, &self.workload, fork, limit, call).await,
            Mode::Http { .. } => {
                let seat = || {
                    self.seat().map_err(|reason| match reason {
                        NoSeat::Busy => CallError::Busy(function.clone(), limit),
                        NoSeat::NoneReady if self.start_failure().is_some() => {
                            CallError::DoesNotStart(function.clone())
                        }
                        NoSeat::NoneReady => CallError::NotReady(function.clone()),
                    })
                };
                let another = |refused: &Seat| {
                    refused.is_refused();
                    self.readiness_changed();
                    seat()
                };
                http_mode::call(&runner.tasks, &self.workload, seat()?, another, call).await
            }
        }
    }

    /// What the API says of this function, without its usage.
    pub(super) fn status(&self) -> FunctionStatus {
        let it = self.deployment.clone();
        let mut labels = it.labels.unwrap_or_default();
        labels.insert(FAAS_FUNCTION.to_owned(), it.service.clone());
        FunctionStatus {
            name: it.service,
            namespace: it.namespace,
            image: it.image,
            env_process: it.env_process,
            env_vars: it.env_vars,
            constraints: it.constraints,
            secrets: it.secrets,
            labels: Some(labels),
            annotations: it.annotations,
            limits: it.limits,
            requests: it.requests,
            read_only_root_filesystem: it.read_only_root_filesystem,
            invocation_count: None,
            replicas: self.replicas(),
            available_replicas: self.available(),
            created_at: Some(self.created_at.clone()),
            usage: None,
            start_failure: self.start_failure(),
        }
    }

    /// How the starts of all replicas fail, if they do so again and again and there is nobody to call.
    fn start_failure(&self) -> Option<StartFailure> {
        let pool = self.pool.as_ref().filter(|_| self.available() == 0)?;
        pool.start_failure()
    }

    fn readiness_changed(&self) {
        for pool in self.pool.iter().chain(lock(&self.previous).as_ref()) {
            pool.readiness_changed();
        }
    }

    /// How many replicas can be called. In fork mode there is nothing to wait for.
    fn available(&self) -> u64 {
        let Some(pool) = &self.pool else { return self.replicas() };
        match pool.ready() {
            0 => lock(&self.previous).as_ref().map_or(0, |previous| previous.ready()),
            ready => ready,
        }
    }

    /// Waits until a replica can be called, for at most `patience`; not at all if none is wanted, or none can be
    /// started.
    pub(super) async fn until_available(&self, patience: Duration) {
        if self.replicas() == 0 || self.available() > 0 {
            return;
        }
        if let Some(pool) = &self.pool {
            // Both branches are cancel-safe: waiting changes nothing.
            tokio::select! {
                _ = timeout(patience, pool.until_ready_or_failing()) => {}
                () = pool.runner.tasks.stopping.cancelled() => {}
            }
        }
    }

    /// How many calls may be in flight at once.
    fn call_limit(&self) -> u64 {
        match self.workload.spec.max_inflight {
            0 => u64::MAX,
            each => each.saturating_mul(self.replicas()),
        }
    }

    fn seat(&self) -> Result<Seat, NoSeat> {
        let seat = self.pool.as_ref().map_or(Err(NoSeat::NoneReady), |pool| pool.seat());
        match (seat, lock(&self.previous).as_ref()) {
            (Err(NoSeat::NoneReady), Some(previous)) => previous.seat(),
            (seat, _) => seat,
        }
    }

    /// The processes that the next version has to replace. Of two, those that can be called.
    fn give_up_pool(&self) -> Option<Arc<Pool>> {
        self.settled.cancel();
        let previous = lock(&self.previous).take();
        let (kept, retired) = match (&self.pool, previous) {
            (Some(current), Some(previous)) if current.ready() == 0 => {
                (Some(previous), Some(Arc::clone(current)))
            }
            (current, previous) => (current.clone(), previous),
        };
        if let Some(pool) = retired {
            pool.scale(0);
        }
        kept
    }

    fn retire_previous(&self) {
        self.settled.cancel();
        let previous = lock(&self.previous).take();
        if let Some(pool) = previous {
            pool.scale(0);
        }
    }
}
