//! Table of the deployed functions and the namespaces.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use crate::process::DEFAULT_NAMESPACE;
use crate::process::deployed_function::DeployedFunction;
use crate::types::Namespace;
use gateway_base::function::Function;
use gateway_base::sync::lock_unpoisoned;

#[derive(Debug)]
pub(super) struct FunctionTable {
    /// A leaf; the provider's `change_lock` may be held.
    by_name: Mutex<BTreeMap<Function, Arc<DeployedFunction>>>,
    /// Always contains the default namespace. A leaf; the provider's `change_lock` may be held.
    namespaces: Mutex<BTreeMap<String, Namespace>>,
}

impl FunctionTable {
    /// Creates a table without functions.
    pub(super) fn new(namespaces: Vec<Namespace>) -> Self {
        let default = Namespace { name: DEFAULT_NAMESPACE.to_owned(), ..Namespace::default() };
        let all = std::iter::once(default).chain(namespaces);
        let namespaces = all.map(|namespace| (namespace.name.clone(), namespace)).collect();
        Self { by_name: Mutex::default(), namespaces: Mutex::new(namespaces) }
    }

    pub(super) fn get(&self, function: &Function) -> Option<Arc<DeployedFunction>> {
        lock_unpoisoned(&self.by_name).get(function).cloned()
    }

    pub(super) fn insert(&self, entry: Arc<DeployedFunction>) {
        lock_unpoisoned(&self.by_name).insert(entry.workload.function.clone(), entry);
    }

    pub(super) fn remove(&self, function: &Function) -> Option<Arc<DeployedFunction>> {
        lock_unpoisoned(&self.by_name).remove(function)
    }

    /// Returns all functions, sorted by name.
    pub(super) fn functions(&self) -> Vec<Arc<DeployedFunction>> {
        lock_unpoisoned(&self.by_name).values().cloned().collect()
    }

    pub(super) fn has_namespace(&self, name: &str) -> bool {
        lock_unpoisoned(&self.namespaces).contains_key(name)
    }

    pub(super) fn namespace(&self, name: &str) -> Option<Namespace> {
        lock_unpoisoned(&self.namespaces).get(name).cloned()
    }

    /// Returns the sorted names of all namespaces.
    pub(super) fn namespaces(&self) -> Vec<String> {
        lock_unpoisoned(&self.namespaces).keys().cloned().collect()
    }

    pub(super) fn insert_namespace(&self, namespace: Namespace) {
        lock_unpoisoned(&self.namespaces).insert(namespace.name.clone(), namespace);
    }

    pub(super) fn remove_namespace(&self, name: &str) {
        lock_unpoisoned(&self.namespaces).remove(name);
    }
}
