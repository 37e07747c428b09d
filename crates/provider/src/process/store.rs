//! The provider's state on disk: one file for each function and namespace, and a lock on the state directory.
//! `secrets` stores the secrets.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::fs::FlockOperation;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::process::files;
use crate::types::{FunctionDeployment, Namespace};
use gateway_base::function::Function;

const MAX_LOCK_ATTEMPTS: u32 = 20;
const LOCK_RETRY_INTERVAL: Duration = Duration::from_millis(25);

/// A locked state directory.
#[derive(Debug)]
pub(super) struct Store {
    pub(super) root: PathBuf,
    /// The lock on the directory, held while the file is open.
    _lock: File,
}

/// State of a function on disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct SavedFunction {
    pub(super) deployment: FunctionDeployment,
    pub(super) replicas: u64,
    /// RFC 3339.
    pub(super) created_at: String,
}

impl Store {
    /// Opens and locks `directory`, and creates it if it does not exist.
    pub(super) fn open(directory: &Path) -> anyhow::Result<Self> {
        let path = directory.display();
        // A relative path with one component has an empty parent, which cannot be opened.
        std::path::absolute(directory)
            .and_then(|directory| files::create_private_directory(&directory))
            .with_context(|| format!("cannot create the state directory {path}"))?;
        // Functions get absolute paths below it, since they may have another working directory.
        let root = directory
            .canonicalize()
            .with_context(|| format!("cannot open the state directory {path}"))?;
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(root.join("lock"))
            .with_context(|| format!("cannot write to the state directory {path}"))?;
        match lock_with_retry(&lock) {
            Ok(()) => Ok(Self { root, _lock: lock }),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                bail!("the state directory {path} is in use by another provider")
            }
            Err(error) => {
                Err(error).with_context(|| format!("cannot lock the state directory {path}"))
            }
        }
    }

    /// Returns all functions; the path of the file has namespace and name.
    pub(super) fn functions(&self) -> anyhow::Result<Vec<(Function, SavedFunction)>> {
        let root = self.root.join("functions");
        let mut functions = Vec::new();
        for namespace in names(&root)? {
            for (name, path) in json_files(&root.join(&namespace))? {
                functions.push((Function { name, namespace: namespace.clone() }, read(&path)?));
            }
        }
        Ok(functions)
    }

    /// Returns all namespaces except for the default one.
    pub(super) fn namespaces(&self) -> anyhow::Result<Vec<Namespace>> {
        json_files(&self.root.join("namespaces"))?.iter().map(|(_, path)| read(path)).collect()
    }

    pub(super) fn save_function(
        &self,
        function: &Function,
        saved: &SavedFunction,
    ) -> anyhow::Result<()> {
        write(&self.function_path(function), saved)
    }

    pub(super) fn remove_function(&self, function: &Function) -> anyhow::Result<()> {
        remove(&self.function_path(function))
    }

    pub(super) fn save_namespace(&self, namespace: &Namespace) -> anyhow::Result<()> {
        write(&self.namespace_path(&namespace.name), namespace)
    }

    pub(super) fn remove_namespace(&self, name: &str) -> anyhow::Result<()> {
        remove(&self.namespace_path(name))
    }

    fn function_path(&self, function: &Function) -> PathBuf {
        let Function { name, namespace } = function;
        self.root.join("functions").join(namespace).join(format!("{name}.json"))
    }

    fn namespace_path(&self, name: &str) -> PathBuf {
        self.root.join("namespaces").join(format!("{name}.json"))
    }
}

fn names(directory: &Path) -> anyhow::Result<Vec<String>> {
    files::file_names(directory).with_context(|| format!("cannot read {}", directory.display()))
}

/// Returns the name without `.json` and the path of each file.
fn json_files(directory: &Path) -> anyhow::Result<Vec<(String, PathBuf)>> {
    let names = names(directory)?;
    let without_extension =
        |name: &String| Some((name.strip_suffix(".json")?.to_owned(), directory.join(name)));
    Ok(names.iter().filter_map(without_extension).collect())
}

/// Reads a state file. An unreadable file stops the startup: ignoring it would silently lose a deployment.
fn read<T: DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| {
        format!("the state file {} is damaged; repair it or remove it", path.display())
    })
}

fn write(path: &Path, value: &impl Serialize) -> anyhow::Result<()> {
    let bytes = serde_json::to_vec_pretty(value)?;
    files::replace(path, &bytes).with_context(|| format!("cannot write {}", path.display()))
}

fn remove(path: &Path) -> anyhow::Result<()> {
    files::remove(path).with_context(|| format!("cannot remove {}", path.display()))
}

/// Acquires the lock, with retries: a process that was forked by an earlier provider holds it until its `exec`.
fn lock_with_retry(lock: &File) -> rustix::io::Result<()> {
    let mut locked = Err(rustix::io::Errno::WOULDBLOCK);
    for _ in 0..MAX_LOCK_ATTEMPTS {
        locked = rustix::fs::flock(lock, FlockOperation::NonBlockingLockExclusive);
        if locked != Err(rustix::io::Errno::WOULDBLOCK) {
            break;
        }
        std::thread::sleep(LOCK_RETRY_INTERVAL);
    }
    locked
}

#[cfg(test)]
mod tests {
    use super::*;

    fn function() -> Function {
        Function { name: "f".to_owned(), namespace: "ns".to_owned() }
    }

    fn saved() -> SavedFunction {
        let deployment = FunctionDeployment { service: "f".to_owned(), ..Default::default() };
        SavedFunction { deployment, replicas: 3, created_at: "now".to_owned() }
    }

    #[test]
    fn saved_state_is_read_after_a_restart() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        store.save_function(&function(), &saved()).unwrap();
        let namespace = Namespace { name: "ns".to_owned(), ..Default::default() };
        store.save_namespace(&namespace).unwrap();
        drop(store);
        let store = Store::open(root.path()).unwrap();
        assert_eq!(store.namespaces().unwrap(), [namespace]);
        let functions = store.functions().unwrap();
        assert_eq!((&functions[0].0, functions[0].1.replicas), (&function(), 3));
        store.remove_function(&function()).unwrap();
        store.remove_namespace("ns").unwrap();
        assert!(store.functions().unwrap().is_empty() && store.namespaces().unwrap().is_empty());
    }

    #[test]
    fn two_providers_cannot_share_a_state_directory() {
        let root = tempfile::tempdir().unwrap();
        let _first = Store::open(root.path()).unwrap();
        let error = Store::open(root.path()).unwrap_err().to_string();
        assert!(error.contains("in use by another provider"), "{error}");
    }

    #[test]
    fn the_error_for_a_damaged_file_has_its_path() {
        let root = tempfile::tempdir().unwrap();
        let store = Store::open(root.path()).unwrap();
        store.save_function(&function(), &saved()).unwrap();
        std::fs::write(root.path().join("functions/ns/f.json"), b"{\"deploy").unwrap();
        let error = store.functions().unwrap_err().to_string();
        assert!(error.contains("functions/ns/f.json is damaged"), "{error}");
    }

    #[test]
    fn a_state_directory_that_cannot_be_created_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("file");
        std::fs::write(&file, b"").unwrap();
        let error = Store::open(&file.join("state")).unwrap_err().to_string();
        assert!(error.contains("cannot create the state directory"), "{error}");
    }
}
