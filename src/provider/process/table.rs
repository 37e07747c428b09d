//! The functions and namespaces that there are.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use crate::function::Function;
use crate::provider::process::DEFAULT_NAMESPACE;
use crate::provider::process::entry::Entry;
use crate::provider::process::sync::lock;
use crate::provider::types::Namespace;

#[derive(Debug)]
pub(super) struct Table {
    functions: Mutex<BTreeMap<Function, Arc<Entry>>>,
    /// The default one is always among them.
    namespaces: Mutex<BTreeMap<String, Namespace>>,
}

impl Table {
    /// A table without functions.
    pub(super) fn new(namespaces: Vec<Namespace>) -> Self {
        let default = Namespace { name: DEFAULT_NAMESPACE.to_owned(), ..Namespace::default() };
        let all = std::iter::once(default).chain(namespaces);
        let namespaces = all.map(|namespace| (namespace.name.clone(), namespace)).collect();
        Self { functions: Mutex::default(), namespaces: Mutex::new(namespaces) }
    }

    pub(super) fn get(&self, function: &Function) -> Option<Arc<Entry>> {
        lock(&self.functions).get(function).cloned()
    }

    pub(super) fn insert(&self, entry: Arc<Entry>) {
        lock(&self.functions).insert(entry.workload.function.clone(), entry);
    }

    pub(super) fn remove(&self, function: &Function) -> Option<Arc<Entry>> {
        lock(&self.functions).remove(function)
    }

    /// All functions, in order.
    pub(super) fn entries(&self) -> Vec<Arc<Entry>> {
        lock(&self.functions).values().cloned().collect()
    }

    pub(super) fn has_namespace(&self, name: &str) -> bool {
        lock(&self.namespaces).contains_key(name)
    }

    pub(super) fn namespace(&self, name: &str) -> Option<Namespace> {
        lock(&self.namespaces).get(name).cloned()
    }

    /// Names of all namespaces, in order.
    pub(super) fn namespaces(&self) -> Vec<String> {
        lock(&self.namespaces).keys().cloned().collect()
    }

    pub(super) fn insert_namespace(&self, namespace: Namespace) {
        lock(&self.namespaces).insert(namespace.name.clone(), namespace);
    }

    pub(super) fn remove_namespace(&self, name: &str) {
        lock(&self.namespaces).remove(name);
    }
}
