//! Records the functions of a stack file, so that functions removed from the file are deleted even after a restart.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use gateway_base::function::Function;

/// The functions deployed from a stack file, stored as `stack.json` in the state directory.
pub(super) struct StackRecord {
    pub(super) state_dir: PathBuf,
    stack_file: PathBuf,
    pub(super) functions: BTreeSet<Function>,
}

#[derive(Serialize, Deserialize)]
struct StoredRecord {
    stack_file: PathBuf,
    /// Namespace and name.
    functions: BTreeSet<(String, String)>,
}

impl StackRecord {
    /// Loads the record of `stack_file`; empty if the state directory was last used with another file.
    pub(super) fn load(state_dir: &Path, stack_file: &Path) -> Self {
        let stored = std::fs::read(path(state_dir)).ok();
        let stored = stored.and_then(|json| serde_json::from_slice::<StoredRecord>(&json).ok());
        let functions = stored.filter(|stored| stored.stack_file == stack_file).map(|stored| {
            let functions = stored.functions.into_iter();
            functions.map(|(namespace, name)| Function { name, namespace }).collect()
        });
        Self {
            state_dir: state_dir.to_owned(),
            stack_file: stack_file.to_owned(),
            functions: functions.unwrap_or_default(),
        }
    }

    /// Stores the current functions of the file.
    pub(super) fn save(&mut self, functions: BTreeSet<Function>) {
        self.functions = functions;
        let pair = |function: &Function| (function.namespace.clone(), function.name.clone());
        let stored = StoredRecord {
            stack_file: self.stack_file.clone(),
            functions: self.functions.iter().map(pair).collect(),
        };
        let path = path(&self.state_dir);
        let written =
            serde_json::to_vec_pretty(&stored).map_err(std::io::Error::other).and_then(|json| {
                let unfinished = path.with_extension("unfinished");
                std::fs::write(&unfinished, json)?;
                std::fs::rename(&unfinished, &path)
            });
        if let Err(error) = written {
            tracing::warn!(%error, "Cannot write {}: a function that is removed from the stack file while the gateway is stopped remains deployed", path.display());
        }
    }
}

fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("stack.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_belongs_to_one_stack_file() {
        let state = tempfile::tempdir().unwrap();
        let function = Function { name: "f".to_owned(), namespace: "ns".to_owned() };
        let mut record = StackRecord::load(state.path(), Path::new("/a.yaml"));
        assert!(record.functions.is_empty());
        record.save([function.clone()].into());
        assert!(
            StackRecord::load(state.path(), Path::new("/a.yaml")).functions.contains(&function)
        );
        assert!(StackRecord::load(state.path(), Path::new("/b.yaml")).functions.is_empty());
        std::fs::write(state.path().join("stack.json"), "{").unwrap();
        assert!(StackRecord::load(state.path(), Path::new("/a.yaml")).functions.is_empty());
    }
}
