//! Secrets written to the state directory by another process, `gateway secret set`, while the provider runs.

use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, bail};

use crate::process::deploy::function_of;
use crate::process::secrets::{Secrets, is_secret_name};
use crate::process::{DEFAULT_NAMESPACE, ProcessProvider};
use crate::types::FunctionDeployment;
use gateway_base::function::{DNS_LABEL_RULE, is_dns_label};
use gateway_base::sync::lock_unpoisoned;

/// State of the stored secrets: namespace, name, size and modification time of each.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct SecretsSnapshot(Vec<(String, String, u64, Option<SystemTime>)>);

/// Writes a secret into a state directory, which a running provider may be using. Returns whether the secret is new.
///
/// # Errors
/// A name is invalid, or the file cannot be written.
pub fn set_secret(
    state_dir: &Path,
    namespace: &str,
    name: &str,
    value: &[u8],
) -> anyhow::Result<bool> {
    if !is_secret_name(name) {
        bail!("{name:?} is not a secret's name: use at most 200 of a-z, A-Z, 0-9, -, _ and .");
    }
    let namespace = if namespace.is_empty() { DEFAULT_NAMESPACE } else { namespace };
    if !is_dns_label(namespace) {
        bail!("{namespace:?} is not a namespace: use {DNS_LABEL_RULE}");
    }
    let path = state_dir.display();
    let secrets = std::path::absolute(state_dir)
        .and_then(|directory| Secrets::open(directory.join("secrets")))
        .with_context(|| format!("cannot write to the state directory {path}"))?;
    let is_new = !secrets.has(namespace, name);
    let put = secrets.put(namespace, name, value);
    put.with_context(|| format!("cannot write secret {name} to the state directory {path}"))?;
    Ok(is_new)
}

impl ProcessProvider {
    /// Returns the sorted names of secrets that a function needs and that do not exist.
    pub fn missing_secrets(&self, deployment: &FunctionDeployment) -> Vec<String> {
        let namespace = function_of(deployment).namespace;
        let wanted = deployment.secrets.iter().flatten();
        let missing = wanted.filter(|name| !self.launcher.secrets.has(&namespace, name));
        let mut missing: Vec<_> = missing.cloned().collect();
        missing.sort_unstable();
        missing.dedup();
        missing
    }

    /// Updates the views of all functions if the stored secrets differ from the snapshot `seen`, and updates `seen`.
    ///
    /// # Errors
    /// A file cannot be read or written.
    pub fn refresh_changed_secrets(&self, seen: &mut SecretsSnapshot) -> std::io::Result<()> {
        let stored = self.launcher.secrets.snapshot()?;
        if stored == *seen {
            return Ok(());
        }
        let _change_lock = lock_unpoisoned(&self.change_lock);
        for function in self.table.functions() {
            let workload = &function.workload;
            if !workload.spec.secrets.is_empty() {
                self.launcher.secrets.refresh_view(&workload.function, &workload.spec.secrets)?;
            }
        }
        *seen = stored;
        Ok(())
    }
}

impl Secrets {
    fn snapshot(&self) -> std::io::Result<SecretsSnapshot> {
        let mut stored = Vec::new();
        for namespace in self.namespaces()? {
            for name in self.names(&namespace)? {
                let Ok(file) = self.metadata(&namespace, &name) else { continue };
                stored.push((namespace.clone(), name, file.len(), file.modified().ok()));
            }
        }
        Ok(SecretsSnapshot(stored))
    }
}
