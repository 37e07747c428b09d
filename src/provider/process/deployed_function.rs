//! A function as it is deployed now: what was asked for, and what runs.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::response::Response;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::provider::process::invocation::{Invocation, InvocationError};
use crate::provider::process::launcher::ProcessLauncher;
use crate::provider::process::pool::{AcquireError, Pool};
use crate::provider::process::replica::ReplicaPermit;
use crate::provider::process::spec::Mode;
use crate::provider::process::store::SavedFunction;
use crate::provider::process::sync::lock_unpoisoned;
use crate::provider::process::workload::Workload;
use crate::provider::process::{fork, http_mode};
use crate::provider::types::{FunctionDeployment, FunctionStatus, Resources, StartFailure};

/// The label by which clients find the function that something belongs to. Every function has it.
const FUNCTION_LABEL: &str = "faas_function";

/// `deployment` with nothing in place of what is empty, which means the same.
fn normalized(deployment: FunctionDeployment) -> FunctionDeployment {
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
pub(super) struct DeployedFunction {
    pub(super) workload: Arc<Workload>,
    pub(super) deployment: FunctionDeployment,
    /// RFC 3339.
    pub(super) created_at: String,
    replicas: AtomicU64,
    /// The processes, in HTTP mode.
    pool: Option<Arc<Pool>>,
    /// The processes of the version before, which take the calls until those of this one can.
    old_pool: Mutex<Option<Arc<Pool>>>,
    /// Cancelled when `old_pool` has been dealt with.
    replaced: CancellationToken,
}

impl DeployedFunction {
    /// An entry whose processes are not started yet.
    pub(super) fn new(
        saved: SavedFunction,
        workload: Arc<Workload>,
        launcher: &Arc<ProcessLauncher>,
    ) -> Self {
        let pool = match workload.spec.mode {
            Mode::Http { .. } => {
                Some(Arc::new(Pool::new(Arc::clone(&workload), Arc::clone(launcher))))
            }
            Mode::Fork(_) => None,
        };
        Self {
            workload,
            deployment: saved.deployment,
            created_at: saved.created_at,
            replicas: AtomicU64::new(saved.replicas),
            pool,
            old_pool: Mutex::new(None),
            replaced: CancellationToken::new(),
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
        normalized(wanted) == normalized(self.deployment.clone())
    }

    /// Starts or stops processes until there are as many as wanted.
    pub(super) fn scale(&self, replicas: u64) {
        self.replicas.store(replicas, Relaxed);
        if let Some(pool) = &self.pool {
            pool.scale(replicas);
        }
        if replicas == 0 {
            self.retire_old_pool();
        }
    }

    /// Takes over from `before`: its processes take the calls until those of this entry can.
    pub(super) fn replace(self: &Arc<Self>, before: &Self, launcher: &ProcessLauncher) {
        let Some(old) = before.detach_pool() else { return };
        // One that cannot be called has nothing to bridge, and would only be started again and again beside this one.
        let bridges = self.replicas() > 0 && old.ready_count() > 0;
        let Some(pool) = self.pool.clone().filter(|_| bridges) else {
            old.scale(0);
            return;
        };
        *lock_unpoisoned(&self.old_pool) = Some(Arc::clone(&old));
        let entry = Arc::clone(self);
        let stopping = launcher.tasks.stopping.clone();
        launcher.tasks.spawn(async move {
            // All branches are cancel-safe.
            tokio::select! {
                () = pool.wait_ready(entry.replicas().max(1)) => entry.retire_old_pool(),
                () = old.wait_failing() => entry.retire_old_pool(),
                () = entry.replaced.cancelled() => {}
                () = stopping.cancelled() => {}
            }
        });
    }

    /// Stops all processes, once they have ended their calls.
    pub(super) fn retire(&self) {
        self.scale(0);
    }

    /// Carries `invoke` out.
    pub(super) async fn invoke(
        &self,
        launcher: &ProcessLauncher,
        call: Invocation,
    ) -> Result<Response, InvocationError> {
        let function = &self.workload.function;
        if self.replicas() == 0 {
            return Err(InvocationError::ScaledToZero(function.clone()));
        }
        let limit = self.max_in_flight();
        match &self.workload.spec.mode {
            Mode::Fork(fork) => fork::invoke(launcher, &self.workload, fork, limit, call).await,
            Mode::Http { .. } => {
                let seat = || {
                    self.acquire_permit().map_err(|reason| match reason {
                        AcquireError::Busy => {
                            InvocationError::TooManyInFlight(function.clone(), limit)
                        }
                        AcquireError::NoneReady if self.start_failure().is_some() => {
                            InvocationError::DoesNotStart(function.clone())
                        }
                        AcquireError::NoneReady => InvocationError::NotReady(function.clone()),
                    })
                };
                let another = |refused: &ReplicaPermit| {
                    refused.mark_unreachable();
                    self.update_readiness();
                    seat()
                };
                http_mode::invoke(&launcher.tasks, &self.workload, seat()?, another, call).await
            }
        }
    }

    /// What the API says of this function, without its usage.
    pub(super) fn status(&self) -> FunctionStatus {
        let it = self.deployment.clone();
        let mut labels = it.labels.unwrap_or_default();
        labels.insert(FUNCTION_LABEL.to_owned(), it.service.clone());
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

    fn update_readiness(&self) {
        for pool in self.pool.iter().chain(lock_unpoisoned(&self.old_pool).as_ref()) {
            pool.update_readiness();
        }
    }

    /// How many replicas can be called. In fork mode there is nothing to wait for.
    fn available(&self) -> u64 {
        let Some(pool) = &self.pool else { return self.replicas() };
        match pool.ready_count() {
            0 => lock_unpoisoned(&self.old_pool)
                .as_ref()
                .map_or(0, |previous| previous.ready_count()),
            ready => ready,
        }
    }

    /// Waits until a replica can be called, for at most `patience`; not at all if none is wanted, or none can be
    /// started.
    pub(super) async fn wait_available(&self, patience: Duration) {
        if self.replicas() == 0 || self.available() > 0 {
            return;
        }
        if let Some(pool) = &self.pool {
            // Both branches are cancel-safe: waiting changes nothing.
            tokio::select! {
                _ = timeout(patience, pool.wait_ready_or_failing()) => {}
                () = pool.launcher.tasks.stopping.cancelled() => {}
            }
        }
    }

    /// How many calls may be in flight at once.
    fn max_in_flight(&self) -> u64 {
        match self.workload.spec.max_inflight {
            0 => u64::MAX,
            each => each.saturating_mul(self.replicas()),
        }
    }

    fn acquire_permit(&self) -> Result<ReplicaPermit, AcquireError> {
        let permit =
            self.pool.as_ref().map_or(Err(AcquireError::NoneReady), |pool| pool.acquire_permit());
        match (permit, lock_unpoisoned(&self.old_pool).as_ref()) {
            (Err(AcquireError::NoneReady), Some(old_pool)) => old_pool.acquire_permit(),
            (permit, _) => permit,
        }
    }

    /// The processes that the next version has to replace. Of two, those that can be called.
    fn detach_pool(&self) -> Option<Arc<Pool>> {
        self.replaced.cancel();
        let previous = lock_unpoisoned(&self.old_pool).take();
        let (kept, retired) = match (&self.pool, previous) {
            (Some(current), Some(previous)) if current.ready_count() == 0 => {
                (Some(previous), Some(Arc::clone(current)))
            }
            (current, previous) => (current.clone(), previous),
        };
        if let Some(pool) = retired {
            pool.scale(0);
        }
        kept
    }

    fn retire_old_pool(&self) {
        self.replaced.cancel();
        let previous = lock_unpoisoned(&self.old_pool).take();
        if let Some(pool) = previous {
            pool.scale(0);
        }
    }
}
