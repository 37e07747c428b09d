//! A deployed function: its deployment, its replicas, and its replacement by a new version.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::response::Response;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::backend::Invocation;
use crate::process::invocation::InvocationError;
use crate::process::launcher::ProcessLauncher;
use crate::process::pool::ReplicaPermit;
use crate::process::pool::{AcquireError, Pool};
use crate::process::spec::Mode;
use crate::process::store::SavedFunction;
use crate::process::workload::Workload;
use crate::process::{fork, http_mode};
use crate::types::{FunctionDeployment, FunctionStatus, Resources, StartFailure};
use gateway_base::sync::lock_unpoisoned;

/// Label with the function's name, by which clients find it. Added to every function.
const FUNCTION_LABEL: &str = "faas_function";

/// Replaces empty maps, lists and resources of a deployment by `None`, which has the same meaning.
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
    /// The replicas, in HTTP mode.
    pool: Option<Arc<Pool>>,
    /// The replicas of the old version, which receive the calls until those of this version are ready. Rank 3: the
    /// provider's `change_lock` may be held. A permit of the old pool is acquired under it.
    old_pool: Mutex<Option<Arc<Pool>>>,
    /// Cancelled when `old_pool` has been retired or detached.
    replaced: CancellationToken,
}

impl DeployedFunction {
    /// Creates a function without starting its processes.
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

    /// Returns the number of desired replicas.
    pub(super) fn replicas(&self) -> u64 {
        self.replicas.load(Relaxed)
    }

    /// Returns the state of this function for the disk, with the given number of replicas.
    pub(super) fn saved(&self, replicas: u64) -> SavedFunction {
        SavedFunction {
            deployment: self.deployment.clone(),
            replicas,
            created_at: self.created_at.clone(),
        }
    }

    /// Returns whether `deployment`, of the same function, equals the active deployment.
    pub(super) fn is_deployed_as(&self, deployment: &FunctionDeployment) -> bool {
        let namespace = self.workload.function.namespace.clone();
        let requested = FunctionDeployment { namespace, ..deployment.clone() };
        normalized(requested) == normalized(self.deployment.clone())
    }

    /// Sets the number of desired replicas, and starts or stops processes accordingly.
    pub(super) fn scale(&self, replicas: u64) {
        self.replicas.store(replicas, Relaxed);
        if let Some(pool) = &self.pool {
            pool.scale(replicas);
        }
        if replicas == 0 {
            self.retire_old_pool();
        }
    }

    /// Replaces the version `previous`: its replicas receive the calls until those of this version are ready.
    pub(super) fn replace(self: &Arc<Self>, previous: &Self, launcher: &ProcessLauncher) {
        let Some(old_pool) = previous.detach_pool() else { return };
        // A pool without a ready replica is stopped immediately: it would only keep restarting its processes.
        let has_ready = self.replicas() > 0 && old_pool.ready_count() > 0;
        let Some(pool) = self.pool.clone().filter(|_| has_ready) else {
            old_pool.scale(0);
            return;
        };
        *lock_unpoisoned(&self.old_pool) = Some(Arc::clone(&old_pool));
        let new = Arc::clone(self);
        let stopping = launcher.tasks.stopping.clone();
        launcher.tasks.spawn(async move {
            // All branches are cancel-safe.
            tokio::select! {
                () = pool.wait_ready(new.replicas().max(1)) => new.retire_old_pool(),
                () = old_pool.wait_failing() => new.retire_old_pool(),
                () = new.replaced.cancelled() => {}
                () = stopping.cancelled() => {}
            }
        });
    }

    /// Stops all processes after they have finished their calls.
    pub(super) fn retire(&self) {
        self.scale(0);
    }

    /// Executes one call of the function.
    pub(super) async fn invoke(
        &self,
        launcher: &ProcessLauncher,
        invocation: Invocation,
    ) -> Result<Response, InvocationError> {
        let function = &self.workload.function;
        if self.replicas() == 0 {
            return Err(InvocationError::ScaledToZero(function.clone()));
        }
        let limit = self.max_in_flight();
        match &self.workload.spec.mode {
            Mode::Fork(fork) => {
                fork::invoke(launcher, &self.workload, fork, limit, invocation).await
            }
            Mode::Http { .. } => {
                let acquire = || {
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
                let next_permit = |unreachable: &ReplicaPermit| {
                    unreachable.mark_unreachable();
                    self.update_readiness();
                    acquire()
                };
                http_mode::invoke(
                    &launcher.tasks,
                    &self.workload,
                    acquire()?,
                    next_permit,
                    invocation,
                )
                .await
            }
        }
    }

    /// Returns the status for the API, without the resource usage.
    pub(super) fn status(&self) -> FunctionStatus {
        let deployment = self.deployment.clone();
        let mut labels = deployment.labels.unwrap_or_default();
        labels.insert(FUNCTION_LABEL.to_owned(), deployment.service.clone());
        FunctionStatus {
            name: deployment.service,
            namespace: deployment.namespace,
            image: deployment.image,
            env_process: deployment.env_process,
            env_vars: deployment.env_vars,
            constraints: deployment.constraints,
            secrets: deployment.secrets,
            labels: Some(labels),
            annotations: deployment.annotations,
            limits: deployment.limits,
            requests: deployment.requests,
            read_only_root_filesystem: deployment.read_only_root_filesystem,
            invocation_count: None,
            replicas: self.replicas(),
            available_replicas: self.available(),
            created_at: Some(self.created_at.clone()),
            usage: None,
            start_failure: self.start_failure(),
        }
    }

    /// Returns the last failed start if all replicas fail to start and none is ready.
    fn start_failure(&self) -> Option<StartFailure> {
        let pool = self.pool.as_ref().filter(|_| self.available() == 0)?;
        pool.start_failure()
    }

    fn update_readiness(&self) {
        for pool in self.pool.iter().chain(lock_unpoisoned(&self.old_pool).as_ref()) {
            pool.update_readiness();
        }
    }

    /// Returns the number of ready replicas. In fork mode all replicas are ready.
    fn available(&self) -> u64 {
        let Some(pool) = &self.pool else { return self.replicas() };
        match pool.ready_count() {
            0 => lock_unpoisoned(&self.old_pool)
                .as_ref()
                .map_or(0, |previous| previous.ready_count()),
            ready => ready,
        }
    }

    /// Waits until a replica is ready, for at most `max_wait`. Returns immediately if none is desired, and as soon as
    /// all replicas fail to start.
    pub(super) async fn wait_available(&self, max_wait: Duration) {
        if self.replicas() == 0 || self.available() > 0 {
            return;
        }
        if let Some(pool) = &self.pool {
            // Both branches are cancel-safe.
            tokio::select! {
                _ = timeout(max_wait, pool.wait_ready_or_failing()) => {}
                () = pool.launcher.tasks.stopping.cancelled() => {}
            }
        }
    }

    /// Returns the maximum number of calls in flight.
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

    /// Returns the pool that a new version has to replace, and retires the other one: of two pools, the one with ready
    /// replicas is kept.
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
