//! The process provider: runs functions as processes of this machine.
//!
//! It is a backend of the provider's REST server. It does not isolate functions: they run as the user of the provider.
//! Only functions with secrets are separated from the secrets of others.

mod activity;
mod backend;
mod cgi;
mod cgroup;
mod channel_body;
mod command;
mod containment;
mod deploy;
mod deployed_function;
mod descendants;
mod files;
mod fork;
mod fork_limiter;
mod fork_session;
mod function_table;
mod http_mode;
mod input;
mod invocation;
mod launcher;
mod line_splitter;
mod log_entry;
mod log_stream;
mod logs;
mod mounts;
mod namespace_changes;
mod orphans;
mod pool;
mod process_group;
mod procfs;
mod replica_client;
mod secret_changes;
mod secret_files;
mod secrets;
mod shell_words;
mod spec;
mod start_failure;
mod store;
mod usage;
mod workload;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::Context;

pub use self::secret_files::{SecretsSnapshot, set_secret};
use crate::error::ApiError;
use crate::process::cgroup::Cgroups;
use crate::process::command::DEFAULT_PATH;
use crate::process::containment::Containment;
use crate::process::deploy::check_replicas;
use crate::process::deployed_function::DeployedFunction;
use crate::process::descendants::Descendants;
use crate::process::function_table::FunctionTable;
use crate::process::launcher::ProcessLauncher;
use crate::process::logs::Logs;
use crate::process::mounts::{Mounts, SECRETS_DIRECTORY};
use crate::process::orphans::Orphans;
use crate::process::secrets::Secrets;
use crate::process::spec::FunctionSpec;
use crate::process::store::{SavedFunction, Store};
use crate::process::workload::Workload;
use crate::types::FunctionStatus;
use gateway_base::build_info::BuildInfo;
use gateway_base::function::Function;
use gateway_base::shutdown::Tasks;
use gateway_base::sync::lock_unpoisoned;

/// Namespace of functions that are deployed without one.
pub const DEFAULT_NAMESPACE: &str = "openfaas-fn";

/// Maximum number of processes of one function.
const MAX_PROCESSES_PER_FUNCTION: u64 = 1000;

/// The process provider with its functions.
#[derive(Debug)]
pub struct ProcessProvider {
    store: Store,
    table: FunctionTable,
    launcher: Arc<ProcessLauncher>,
    /// Held during each change, so that files and function table stay consistent. Rank 2: acquired first, on a thread
    /// that may block.
    change_lock: Mutex<()>,
}

/// Settings of the provider.
#[derive(Clone, Debug)]
pub struct Config {
    /// Directory of functions, secrets and logs.
    pub state_dir: PathBuf,
    /// Environment variables that functions inherit. All others may be secrets and are not inherited.
    pub environment: Vec<(String, String)>,
}

/// Returns the REST API of `provider`. The caller adds authentication.
///
/// Compiles the server for this backend here, so that the program's own crate need not.
pub fn router(provider: Arc<ProcessProvider>, build: BuildInfo) -> axum::Router {
    crate::server::router(provider, build)
}

impl ProcessProvider {
    /// Opens the state directory, kills processes left by an earlier provider, and starts the functions.
    ///
    /// # Errors
    /// The state directory is not writable, is in use by another provider, or is damaged.
    pub async fn open(config: &Config, tasks: &Tasks) -> anyhow::Result<Arc<Self>> {
        Self::open_in(config, tasks, false).await
    }

    /// Does the same as `open`, and makes this process adopt orphans of functions. This requires that the process has
    /// no child processes besides the provider's.
    ///
    /// # Errors
    /// The errors of `open`.
    pub async fn open_adopting_orphans(
        config: &Config,
        tasks: &Tasks,
    ) -> anyhow::Result<Arc<Self>> {
        Self::open_in(config, tasks, true).await
    }

    async fn open_in(
        config: &Config,
        tasks: &Tasks,
        adopts_orphans: bool,
    ) -> anyhow::Result<Arc<Self>> {
        let store = Store::open(&config.state_dir)?;
        let root = &store.root;
        let mut orphans = Orphans::open(root.join("running"))?;
        let killed =
            orphans.kill_all().context("cannot kill the processes of an earlier provider")?;
        if killed > 0 {
            tracing::warn!(processes = killed, "Killed processes left by an earlier provider");
        }
        let secrets = Secrets::open(root.join("secrets"))?;
        let mounts = probe_mounts(&secrets, config).await;
        // From here on, only the containment starts processes: an unknown child is an orphan.
        orphans.containment = detect_containment(root.join("cgroup"), config, adopts_orphans).await;
        if let Some(descendants) = orphans.containment.descendants.clone() {
            tasks.spawn(|stopping| descendants.run(stopping));
        }
        orphans.containment.log_method();
        let environment = config.environment.clone();
        let launcher = Arc::new(ProcessLauncher::new(tasks, orphans, secrets, mounts, environment));
        let provider = Arc::new(Self {
            table: FunctionTable::new(store.namespaces()?),
            store,
            launcher,
            change_lock: Mutex::default(),
        });
        for (function, saved) in provider.store.functions()? {
            provider.restore(function, saved)?;
        }
        Ok(provider)
    }

    /// Removes a function. Its processes finish their calls first.
    ///
    /// # Errors
    /// `ApiError::NoSuchFunction` if there is none, and an internal error when its files cannot be removed.
    pub async fn delete(self: &Arc<Self>, function: Function) -> Result<(), ApiError> {
        self.run_exclusively(move |provider| {
            provider.find(&function)?;
            provider.store.remove_function(&function)?;
            if let Some(deployed) = provider.table.remove(&function) {
                deployed.retire();
            }
            provider.launcher.secrets.remove_view(&function)?;
            tracing::info!(function = %function, "Deleted {function}");
            Ok(())
        })
        .await
    }

    /// Sets the number of replicas of a function.
    pub(crate) async fn scale(
        self: &Arc<Self>,
        function: Function,
        replicas: u64,
    ) -> Result<(), ApiError> {
        self.run_exclusively(move |provider| {
            let deployed = provider.find(&function)?;
            check_replicas(&deployed.workload.spec, replicas)?;
            provider.store.save_function(&function, &deployed.saved(replicas))?;
            deployed.scale(replicas);
            tracing::info!(function = %function, replicas, "Scaled {function} to {replicas}");
            Ok(())
        })
        .await
    }

    /// Returns the functions of a namespace, ordered by name.
    pub(crate) fn list(&self, namespace: &str) -> Vec<FunctionStatus> {
        let entries = self.table.functions();
        let in_namespace =
            |deployed: &&Arc<DeployedFunction>| deployed.workload.function.namespace == namespace;
        entries.iter().filter(in_namespace).map(|deployed| deployed.status()).collect()
    }

    /// Stops all processes: sends SIGTERM, and SIGKILL to those that still run after `grace`.
    pub async fn stop(&self, grace: Duration) {
        self.launcher.tasks.stop(grace).await;
        self.launcher.orphans.containment.close();
    }

    fn find(&self, function: &Function) -> Result<Arc<DeployedFunction>, ApiError> {
        let missing = || ApiError::NoSuchFunction(function.to_string());
        self.table.get(function).ok_or_else(missing)
    }

    /// Runs a change of files and function table. Changes run one at a time on a blocking thread, since they wait for
    /// the disk. A client that disconnects does not abort a change.
    async fn run_exclusively<T: Send + 'static>(
        self: &Arc<Self>,
        change: impl FnOnce(&Self) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let provider = Arc::clone(self);
        let changing = tokio::task::spawn_blocking(move || {
            let _change_lock = lock_unpoisoned(&provider.change_lock);
            change(&provider)
        });
        changing.await.map_err(|error| ApiError::Internal(error.into()))?
    }

    /// Starts a function from the state directory. If a program or directory that it needs is missing, its calls fail
    /// with the reason.
    fn restore(&self, function: Function, mut saved: SavedFunction) -> anyhow::Result<()> {
        let spec = FunctionSpec::parse(&saved.deployment).map_err(anyhow::Error::msg);
        let spec = spec.with_context(|| format!("the state of function {function} is damaged"))?;
        if let Err(error) = check_replicas(&spec, saved.replicas) {
            tracing::warn!(
                function = %function,
                replicas = saved.replicas,
                "Starting {function} with {MAX_PROCESSES_PER_FUNCTION} replicas: {error}"
            );
            saved.replicas = MAX_PROCESSES_PER_FUNCTION;
        }
        self.launcher.secrets.refresh_view(&function, &spec.secrets)?;
        self.start(&function, spec, saved, None);
        Ok(())
    }

    fn start(
        &self,
        function: &Function,
        spec: FunctionSpec,
        saved: SavedFunction,
        old: Option<&DeployedFunction>,
    ) {
        let replicas = saved.replicas;
        let workload = Arc::new(Workload {
            function: function.clone(),
            spec,
            logs: old.map_or_else(|| Arc::new(Logs::new()), |old| Arc::clone(&old.workload.logs)),
            activity: old.map_or_else(Arc::default, |old| Arc::clone(&old.workload.activity)),
        });
        let deployed = Arc::new(DeployedFunction::new(saved, workload, &self.launcher));
        deployed.scale(replicas);
        if let Some(old) = old {
            deployed.replace(old, &self.launcher);
        }
        self.table.insert(deployed);
    }
}

/// Detects which mechanisms can contain the descendants of function processes.
async fn detect_containment(record: PathBuf, config: &Config, adopts_orphans: bool) -> Containment {
    let cgroups = Cgroups::open(record, search_path(config)).await;
    let cgroups = cgroups.inspect_err(|error| tracing::debug!("No cgroups: {error:#}")).ok();
    let descendants = match adopts_orphans.then(Descendants::adopt) {
        Some(Ok(descendants)) => Some(descendants),
        Some(Err(error)) => {
            tracing::warn!(%error, "This process cannot adopt orphans");
            None
        }
        None => None,
    };
    Containment { cgroups, descendants }
}

/// Returns the PATH for looking up the provider's own helper programs.
fn search_path(config: &Config) -> &str {
    let path = config.environment.iter().find(|(name, _)| name == "PATH");
    path.map_or(DEFAULT_PATH, |(_, path)| path.as_str())
}

/// Detects whether secrets can be mounted for functions.
async fn probe_mounts(secrets: &Secrets, config: &Config) -> Option<Mounts> {
    match Mounts::probe(&secrets.root, search_path(config)).await {
        Ok(mounts) => {
            tracing::info!(
                can_be_undone = !mounts.are_protected(),
                "Secrets are mounted at {SECRETS_DIRECTORY} for each function that uses secrets"
            );
            Some(mounts)
        }
        Err(error) => {
            tracing::info!(
                reason = format!("{error:#}"),
                "Functions read their secrets from the directory in secrets_path: {SECRETS_DIRECTORY} cannot be mounted"
            );
            None
        }
    }
}
