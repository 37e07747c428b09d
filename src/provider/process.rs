//! A provider of our own: functions as processes of this machine.
//!
//! It speaks the same REST contract as any other provider. What is not in here: authentication, listening, and any
//! isolation; functions run as the user of the provider, and only those that have secrets are kept from others'.

mod activity;
mod api;
mod call;
mod cgi;
mod cgroup;
mod command;
mod containment;
mod descendants;
mod drive;
mod entry;
mod files;
mod fork;
mod group;
mod http_mode;
mod input;
mod lines;
mod log_api;
mod log_query;
mod logs;
mod mounts;
mod namespaces;
mod orphans;
mod pick;
mod places;
mod pool;
mod procfs;
mod refusal;
mod replica;
mod replica_client;
mod requests;
mod runner;
mod secret_api;
mod secret_files;
mod secrets;
mod spec;
mod start_failure;
mod store;
mod stream;
mod sync;
mod table;
mod usage;
mod words;
mod workload;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context;

pub use self::api::router;
pub use self::refusal::Refusal;
pub use self::secret_files::{Stored, set_secret};
use crate::config;
use crate::function::Function;
use crate::provider::process::cgroup::Cgroups;
use crate::provider::process::command::{DEFAULT_PATH, find};
use crate::provider::process::containment::Containment;
use crate::provider::process::descendants::Descendants;
use crate::provider::process::entry::Entry;
use crate::provider::process::logs::Logs;
use crate::provider::process::mounts::{Mounts, SECRETS};
use crate::provider::process::orphans::Orphans;
use crate::provider::process::runner::Runner;
use crate::provider::process::secrets::Secrets;
use crate::provider::process::spec::{Mode, Spec, initial_replicas, is_label};
use crate::provider::process::store::{SavedFunction, Store};
use crate::provider::process::sync::lock;
use crate::provider::process::table::Table;
use crate::provider::process::workload::Workload;
use crate::provider::types::{FunctionDeployment, FunctionStatus};
use crate::shutdown::Tasks;

/// Where a function lives that is deployed without a namespace.
pub const DEFAULT_NAMESPACE: &str = "openfaas-fn";

/// The most processes that one function may have.
const MAX_PROCESSES: u64 = 1000;

/// The provider.
#[derive(Debug)]
pub struct Process {
    store: Store,
    table: Table,
    runner: Arc<Runner>,
    /// Held during a change, so that files and table say the same.
    changes: Mutex<()>,
}

impl Process {
    /// Opens the state directory, ends what an earlier provider has left running, and starts the functions.
    ///
    /// # Errors
    /// When the state directory cannot be written, is in use by another provider, or is damaged.
    pub async fn open(config: &config::Provider, tasks: &Tasks) -> anyhow::Result<Arc<Self>> {
        Self::open_in(config, tasks, false).await
    }

    /// Does the same for a process that has no children but the provider's, and so can adopt their orphans.
    ///
    /// # Errors
    /// Those of `open`.
    pub async fn open_alone(config: &config::Provider, tasks: &Tasks) -> anyhow::Result<Arc<Self>> {
        Self::open_in(config, tasks, true).await
    }

    async fn open_in(
        config: &config::Provider,
        tasks: &Tasks,
        is_alone: bool,
    ) -> anyhow::Result<Arc<Self>> {
        let store = Store::open(&config.state_dir)?;
        let root = &store.root;
        let mut orphans = Orphans::open(root.join("running"))?;
        let killed =
            orphans.kill_all().context("cannot end the processes of an earlier provider")?;
        if killed > 0 {
            tracing::warn!(processes = killed, "Ended processes that an earlier provider has left");
        }
        let secrets = Secrets::open(root.join("secrets"))?;
        let mounts = probe_mounts(&secrets, config).await;
        // The last that starts a process by itself: the provider has no unknown children from here on.
        orphans.containment = contain(root.join("cgroup"), config, is_alone).await;
        if let Some(descendants) = orphans.containment.descendants.clone() {
            tasks.spawn(|stopping| descendants.watch(stopping));
        }
        orphans.containment.announce();
        let environment = config.environment.clone();
        let runner = Arc::new(Runner::new(tasks, orphans, secrets, mounts, environment));
        let process = Arc::new(Self {
            table: Table::new(store.namespaces()?),
            store,
            runner,
            changes: Mutex::default(),
        });
        for (function, saved) in process.store.functions()? {
            process.restore(function, saved)?;
        }
        Ok(process)
    }

    /// Deploys a function, or replaces one of the same name.
    ///
    /// # Errors
    /// `Refusal::Invalid` with the reason when it cannot run here.
    pub async fn deploy(self: &Arc<Self>, deployment: FunctionDeployment) -> Result<(), Refusal> {
        self.change(move |process| {
            let function = process.admit(&deployment)?;
            process.install(&function, deployment)
        })
        .await
    }

    /// Deploys a function, unless it is deployed in exactly this way already: then it is left alone, also while it starts or stops.
    /// Returns whether anything has changed.
    ///
    /// # Errors
    /// `Refusal::Invalid` with the reason when it cannot run here.
    pub async fn apply(self: &Arc<Self>, deployment: FunctionDeployment) -> Result<bool, Refusal> {
        self.change(move |process| {
            let function = process.admit(&deployment)?;
            if process.table.get(&function).is_some_and(|entry| entry.is_deployed_as(&deployment)) {
                tracing::info!(function = %function, "{function} is unchanged");
                return Ok(false);
            }
            process.install(&function, deployment).map(|()| true)
        })
        .await
    }

    /// Replaces a function that is there.
    pub(crate) async fn update(
        self: &Arc<Self>,
        deployment: FunctionDeployment,
    ) -> Result<(), Refusal> {
        self.change(move |process| {
            let function = named(&deployment);
            process.entry(&function)?;
            process.admit(&deployment)?;
            process.install(&function, deployment)
        })
        .await
    }

    /// Removes a function; its processes end their calls first.
    pub(crate) async fn delete(self: &Arc<Self>, function: Function) -> Result<(), Refusal> {
        self.change(move |process| {
            process.entry(&function)?;
            process.store.remove_function(&function)?;
            if let Some(entry) = process.table.remove(&function) {
                entry.retire();
            }
            process.runner.secrets.remove_view(&function)?;
            tracing::info!(function = %function, "Deleted {function}");
            Ok(())
        })
        .await
    }

    /// Sets how many replicas a function has.
    pub(crate) async fn scale(
        self: &Arc<Self>,
        function: Function,
        replicas: u64,
    ) -> Result<(), Refusal> {
        self.change(move |process| {
            let entry = process.entry(&function)?;
            check_replicas(&entry.workload.spec, replicas)?;
            process.store.save_function(&function, &entry.saved(replicas))?;
            entry.scale(replicas);
            tracing::info!(function = %function, replicas, "Scaled {function} to {replicas}");
            Ok(())
        })
        .await
    }

    /// The functions of a namespace, by name.
    pub(crate) fn list(&self, namespace: &str) -> Vec<FunctionStatus> {
        let entries = self.table.entries();
        let in_namespace = |entry: &&Arc<Entry>| entry.workload.function.namespace == namespace;
        entries.iter().filter(in_namespace).map(|entry| entry.status()).collect()
    }

    /// Stops all processes: asks them to end, and kills those that have not after `grace`.
    pub async fn stop(&self, grace: Duration) {
        self.runner.tasks.stop(grace).await;
        self.runner.orphans.containment.close();
    }

    fn entry(&self, function: &Function) -> Result<Arc<Entry>, Refusal> {
        let missing = || Refusal::NoSuchFunction(function.to_string());
        self.table.get(function).ok_or_else(missing)
    }

    /// Makes a change to files and table: one at a time, off the threads that carry calls, since it waits for the disk.
    /// A caller who leaves does not leave it half done.
    async fn change<T: Send + 'static>(
        self: &Arc<Self>,
        change: impl FnOnce(&Self) -> Result<T, Refusal> + Send + 'static,
    ) -> Result<T, Refusal> {
        let process = Arc::clone(self);
        let changing = tokio::task::spawn_blocking(move || {
            let _one_at_a_time = lock(&process.changes);
            change(&process)
        });
        changing.await.map_err(|error| Refusal::Internal(error.into()))?
    }

    /// Checks all that can be wrong with a deployment, in itself and with what it refers to.
    fn admit(&self, deployment: &FunctionDeployment) -> Result<Function, Refusal> {
        let function = self.check(deployment)?;
        let missing = self.missing_secrets(deployment);
        if !missing.is_empty() {
            return Err(Refusal::Invalid(format!(
                "secrets that do not exist in namespace {}: {missing:?}",
                function.namespace
            )));
        }
        Ok(function)
    }

    /// Checks all that can be wrong with a deployment, but for its secrets.
    ///
    /// # Errors
    /// `Refusal::Invalid` with the reason.
    pub fn check(&self, deployment: &FunctionDeployment) -> Result<Function, Refusal> {
        let function = named(deployment);
        if !is_label(&function.name) {
            return Err(Refusal::Invalid(format!(
                "service: {:?} is not a name of at most 63 of a-z, 0-9 and -",
                function.name
            )));
        }
        if !self.table.has_namespace(&function.namespace) {
            let reason = format!("namespace {} does not exist", function.namespace);
            return Err(Refusal::Invalid(reason));
        }
        let spec = Spec::parse(deployment).map_err(Refusal::Invalid)?;
        if let Some(directory) = spec.directory.as_ref().filter(|path| !path.is_dir()) {
            let reason = format!("workingDirectory: {} is not a directory", directory.display());
            return Err(Refusal::Invalid(reason));
        }
        let path = self.runner.path(&spec);
        if find(&spec.words[0], path).is_none() {
            return Err(Refusal::Invalid(format!(
                "envProcess: {:?} is not a program that can be run (PATH: {path})",
                spec.words[0]
            )));
        }
        check_replicas(&spec, initial_replicas(deployment).map_err(Refusal::Invalid)?)?;
        Ok(function)
    }

    /// Saves and starts a function. One that was there before keeps its replicas, its logs and its age.
    fn install(
        &self,
        function: &Function,
        mut deployment: FunctionDeployment,
    ) -> Result<(), Refusal> {
        deployment.namespace.clone_from(&function.namespace);
        let initial = initial_replicas(&deployment).map_err(Refusal::Invalid)?;
        let before = self.table.get(function);
        let saved = SavedFunction {
            deployment,
            replicas: match &before {
                // What was scaled to zero stays there, and the next call wakes the new version.
                Some(before) if before.replicas() == 0 => 0,
                Some(before) => before.replicas().max(initial),
                None => initial,
            },
            created_at: before.as_ref().map_or_else(now, |before| before.created_at.clone()),
        };
        let spec = Spec::parse(&saved.deployment).map_err(Refusal::Invalid)?;
        // Replicas cost nothing in fork mode, so there may be more of them than there may be processes.
        check_replicas(&spec, saved.replicas)?;
        self.runner.secrets.refresh_view(function, &spec.secrets)?;
        self.store.save_function(function, &saved)?;
        self.start(function, spec, saved, before.as_deref());
        tracing::info!(function = %function, "Deployed {function}");
        Ok(())
    }

    /// Starts a function of an earlier provider. What it refers to may have gone since: then its calls fail and say so.
    fn restore(&self, function: Function, mut saved: SavedFunction) -> anyhow::Result<()> {
        let spec = Spec::parse(&saved.deployment).map_err(anyhow::Error::msg);
        let spec = spec.with_context(|| format!("the state of function {function} is damaged"))?;
        if let Err(refusal) = check_replicas(&spec, saved.replicas) {
            tracing::warn!(
                function = %function,
                replicas = saved.replicas,
                "Starting {function} with {MAX_PROCESSES} replicas: {refusal}"
            );
            saved.replicas = MAX_PROCESSES;
        }
        self.runner.secrets.refresh_view(&function, &spec.secrets)?;
        self.start(&function, spec, saved, None);
        Ok(())
    }

    fn start(&self, function: &Function, spec: Spec, saved: SavedFunction, before: Option<&Entry>) {
        let replicas = saved.replicas;
        let workload = Arc::new(Workload {
            function: function.clone(),
            spec,
            logs: before
                .map_or_else(|| Arc::new(Logs::new()), |before| Arc::clone(&before.workload.logs)),
            activity: before
                .map_or_else(Arc::default, |before| Arc::clone(&before.workload.activity)),
        });
        let entry = Arc::new(Entry::new(saved, workload, &self.runner));
        entry.scale(replicas);
        if let Some(before) = before {
            entry.take_over(before, &self.runner);
        }
        self.table.insert(entry);
    }
}

/// The function that a deployment names.
fn named(deployment: &FunctionDeployment) -> Function {
    let namespace = match deployment.namespace.as_str() {
        "" => DEFAULT_NAMESPACE,
        namespace => namespace,
    };
    Function { name: deployment.service.clone(), namespace: namespace.to_owned() }
}

fn check_replicas(spec: &Spec, replicas: u64) -> Result<(), Refusal> {
    match spec.mode {
        Mode::Http { .. } if replicas > MAX_PROCESSES => Err(Refusal::Invalid(format!(
            "{replicas} replicas are more than the {MAX_PROCESSES} processes that a function may have"
        ))),
        Mode::Http { .. } | Mode::Fork(_) => Ok(()),
    }
}

/// Finds out how what functions start can be held together.
async fn contain(record: PathBuf, config: &config::Provider, is_alone: bool) -> Containment {
    let cgroups = Cgroups::open(record, path(config)).await;
    let cgroups = cgroups.inspect_err(|error| tracing::debug!("No cgroups: {error:#}")).ok();
    let descendants = match is_alone.then(Descendants::adopt) {
        Some(Ok(descendants)) => Some(descendants),
        Some(Err(error)) => {
            tracing::warn!(%error, "Orphans cannot be adopted");
            None
        }
        None => None,
    };
    Containment { cgroups, descendants }
}

/// The PATH that the provider's own programs are looked up in.
fn path(config: &config::Provider) -> &str {
    let path = config.environment.iter().find(|(name, _)| name == "PATH");
    path.map_or(DEFAULT_PATH, |(_, path)| path.as_str())
}

/// Finds out how functions get to see their secrets.
async fn probe_mounts(secrets: &Secrets, config: &config::Provider) -> Option<Mounts> {
    match Mounts::probe(&secrets.root, path(config)).await {
        Ok(mounts) => {
            tracing::info!(
                can_be_undone = !mounts.stay(),
                "Functions find their secrets in {SECRETS}, mounted for each that asks for some"
            );
            Some(mounts)
        }
        Err(error) => {
            tracing::info!(
                reason = format!("{error:#}"),
                "Functions find their secrets in the directory named by secrets_path: {SECRETS} cannot be mounted"
            );
            None
        }
    }
}

/// RFC 3339, to the second.
fn now() -> String {
    let now = jiff::Timestamp::now();
    jiff::Timestamp::from_second(now.as_second()).unwrap_or(now).to_string()
}
