//! The stack file of `gateway up`: deploys its functions at startup, and applies changes of the file.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};

use crate::app::up::record::StackRecord;
use crate::stack::{self, Source, Stack};
use gateway_base::function::Function;
use gateway_provider::error::ApiError;
use gateway_provider::process::{DEFAULT_NAMESPACE, ProcessProvider};
use gateway_provider::types::FunctionDeployment;

/// Identifies a file's content: inode, length, modification time. `None`: there is no regular file.
type Fingerprint = Option<(u64, u64, i64, i64)>;

/// Maximum size of a file.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// A stack file and its deployed functions.
pub(super) struct StackFile<'a> {
    path: PathBuf,
    directory: PathBuf,
    var: &'a dyn Fn(&str) -> Option<String>,
    provider: Arc<ProcessProvider>,
    record: StackRecord,
    /// The functions deployed from the file.
    deployed: BTreeMap<Function, FunctionDeployment>,
    /// The functions that will be deployed when their secrets exist.
    awaiting_secrets: BTreeMap<Function, FunctionDeployment>,
    /// The stack file, and the files that it refers to.
    files: Vec<PathBuf>,
    /// Fingerprints of the files when they were last applied, and at the last poll.
    applied: Vec<Fingerprint>,
    last_seen: Vec<Fingerprint>,
}

impl<'a> StackFile<'a> {
    pub(super) fn new(
        path: &Path,
        state_dir: &Path,
        provider: Arc<ProcessProvider>,
        var: &'a dyn Fn(&str) -> Option<String>,
    ) -> Self {
        Self {
            directory: path.parent().unwrap_or(Path::new("/")).to_owned(),
            files: vec![path.to_owned()],
            path: path.to_owned(),
            var,
            provider,
            record: StackRecord::load(state_dir, path),
            deployed: BTreeMap::new(),
            awaiting_secrets: BTreeMap::new(),
            applied: Vec::new(),
            last_seen: Vec::new(),
        }
    }

    /// Deploys all functions. Functions without their secrets are deployed later.
    ///
    /// # Errors
    /// All errors of the file; nothing is deployed then.
    pub(super) async fn start(&mut self) -> anyhow::Result<()> {
        let path = self.path.display().to_string();
        let stack = self.read().with_context(|| format!("cannot read the stack file {path}"))?;
        let mut errors: Vec<_> =
            stack.errors.iter().map(|error| (error.line, error.to_string())).collect();
        for function in &stack.functions {
            if let Err(error) = self.provider.validate_except_secrets(function) {
                let line = stack.lines.get(&function.service).copied().unwrap_or_default();
                let text = format!("line {line}: functions.{}: {error}", function.service);
                errors.push((line, text));
            }
        }
        if !errors.is_empty() {
            errors.sort();
            let lines: Vec<_> = errors.into_iter().map(|(_, text)| format!("\n  {text}")).collect();
            bail!("the stack file {path} cannot be used:{}", lines.concat());
        }
        for function in &stack.functions {
            let name = &function.service;
            let installed = self.deploy_or_wait(function).await;
            installed.with_context(|| format!("function {name}"))?;
        }
        self.remove_undeclared(&stack).await;
        Ok(())
    }

    /// Returns the names of the functions that are deployed, or will be when their secrets exist.
    pub(super) fn names(&self) -> BTreeSet<&str> {
        self.deployed
            .keys()
            .chain(self.awaiting_secrets.keys())
            .map(|function| function.name.as_str())
            .collect()
    }

    /// Deploys waiting functions whose secrets exist now.
    pub(super) async fn deploy_waiting(&mut self) {
        let ready =
            |function: &&FunctionDeployment| self.provider.missing_secrets(function).is_empty();
        let ready: Vec<_> = self.awaiting_secrets.values().filter(ready).cloned().collect();
        for function in ready {
            self.redeploy(&function).await;
        }
    }

    /// Applies the files if they have changed, but not since the last poll: a file that is being written may be
    /// incomplete.
    pub(super) async fn poll(&mut self) {
        let now = self.fingerprints();
        if now != self.applied && now == self.last_seen {
            self.apply().await;
        } else {
            self.last_seen = now;
        }
    }

    /// Reads the files again, and deploys, replaces and deletes functions. Functions with errors remain unchanged.
    pub(super) async fn apply(&mut self) {
        let path = self.path.display().to_string();
        if !self.path.is_file() && self.path.exists() {
            // Reading a pipe would block.
            tracing::warn!("The stack file {path} is not a regular file and cannot be reloaded");
            return;
        }
        let stack = match self.read() {
            Ok(stack) => stack,
            Err(error) => {
                tracing::warn!(%error, "Cannot read the stack file {path}: its functions remain unchanged");
                return;
            }
        };
        for error in &stack.errors {
            tracing::warn!("The stack file {path}: {error}");
        }
        if !stack.is_readable {
            tracing::warn!("The stack file {path} is not applied: its functions remain unchanged");
            return;
        }
        for name in &stack.invalid {
            tracing::warn!(function = %name, "Function {name} remains unchanged because of its errors in the stack file");
        }
        for function in &stack.functions {
            let name = function_of(function);
            if self.deployed.get(&name) == Some(function) {
                // Discards another version that is waiting for secrets.
                self.awaiting_secrets.remove(&name);
            } else {
                self.redeploy(function).await;
            }
        }
        self.remove_undeclared(&stack).await;
    }

    /// Reads the stack file, and records the fingerprints of it and of the files that it refers to.
    fn read(&mut self) -> io::Result<Stack> {
        // Fingerprints are taken before reading, so that the next poll detects a concurrent change.
        let stack_file = fingerprint(&self.path);
        let text = read_bounded(&self.path);
        let included = RefCell::new(Vec::new());
        let read = |path: &Path| {
            included.borrow_mut().push((path.to_owned(), fingerprint(path)));
            if !path.is_file() && path.exists() {
                return Err(io::Error::other("not a regular file"));
            }
            read_bounded(path)
        };
        let source = Source { directory: &self.directory, var: self.var, read: &read };
        let stack = text.map(|text| stack::parse(&text, &source));
        let included = included.into_inner();
        self.applied = std::iter::once(stack_file)
            .chain(included.iter().map(|(_, fingerprint)| *fingerprint))
            .collect();
        let included = included.into_iter().map(|(path, _)| path);
        self.files = std::iter::once(self.path.clone()).chain(included).collect();
        self.last_seen.clone_from(&self.applied);
        stack
    }

    fn fingerprints(&self) -> Vec<Fingerprint> {
        self.files.iter().map(|path| fingerprint(path)).collect()
    }

    /// Deploys a new or changed function, and logs the result.
    async fn redeploy(&mut self, function: &FunctionDeployment) {
        let name = function_of(function);
        let action = if self.deployed.contains_key(&name) { "Changed" } else { "Added" };
        match self.deploy_or_wait(function).await {
            Ok(true) => tracing::info!(function = %name, "{action} {name} from the stack file"),
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(function = %name, "{name} remains unchanged: {error}");
            }
        }
    }

    /// Deploys a function, or adds it to the waiting ones if secrets are missing. Returns whether it was deployed.
    async fn deploy_or_wait(&mut self, function: &FunctionDeployment) -> Result<bool, ApiError> {
        let name = function_of(function);
        let missing = self.provider.missing_secrets(function);
        if !missing.is_empty() {
            self.provider.validate_except_secrets(function)?;
            if self.awaiting_secrets.insert(name.clone(), function.clone()).as_ref()
                != Some(function)
            {
                self.print_missing_secrets(&name, &missing);
            }
            return Ok(false);
        }
        self.provider.deploy_if_changed(function.clone()).await?;
        self.awaiting_secrets.remove(&name);
        self.deployed.insert(name, function.clone());
        Ok(true)
    }

    /// Prints the commands that create the missing secrets of a function.
    fn print_missing_secrets(&self, function: &Function, missing: &[String]) {
        tracing::warn!(function = %function, secrets = ?missing, "{function} is not deployed until its secrets exist");
        let state = shell_word(&self.record.state_dir);
        let mut text = format!("{function} starts when its secrets exist. Create them:\n");
        for secret in missing {
            let namespace = match function.namespace.as_str() {
                DEFAULT_NAMESPACE => String::new(),
                namespace => format!(" --namespace {namespace}"),
            };
            text.push_str(&format!(
                "  gateway secret set {secret}{namespace} --state-dir {state}\n"
            ));
        }
        // Ignores a closed standard output.
        let _ = io::stdout().write_all(text.as_bytes());
    }

    /// Deletes the functions that are no longer in the file, including those deployed by an earlier process.
    async fn remove_undeclared(&mut self, stack: &Stack) {
        let wanted: BTreeSet<_> = stack.functions.iter().map(function_of).collect();
        let remains = |function: &Function| {
            wanted.contains(function) || stack.invalid.contains(&function.name)
        };
        self.awaiting_secrets.retain(|function, _| remains(function));
        let known = self.deployed.keys().cloned().chain(self.record.functions.iter().cloned());
        let undeclared: BTreeSet<_> = known.filter(|function| !remains(function)).collect();
        let mut kept = Vec::new();
        for function in undeclared {
            match self.provider.delete(function.clone()).await {
                Ok(()) => {
                    tracing::info!(function = %function, "Deleted {function}, which is no longer in the stack file");
                }
                // Another client has deleted it already.
                Err(ApiError::NotFound(_) | ApiError::NoSuchFunction(_)) => {}
                Err(error) => {
                    tracing::warn!(function = %function, "Cannot delete {function}: {error}");
                    kept.push(function);
                    continue;
                }
            }
            self.deployed.remove(&function);
        }
        let invalid = self.record.functions.iter().filter(|function| remains(function)).cloned();
        let functions = self.deployed.keys().cloned().chain(invalid).chain(kept);
        self.record.save(functions.collect());
    }
}

/// Returns the fingerprint of a regular file. Other files, such as pipes, are read once and not polled.
fn fingerprint(path: &Path) -> Fingerprint {
    let file = std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file)?;
    Some((file.ino(), file.len(), file.mtime(), file.mtime_nsec()))
}

fn read_bounded(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(io::Error::other(format!("larger than {MAX_FILE_BYTES} bytes")));
    }
    Ok(text)
}

fn function_of(deployment: &FunctionDeployment) -> Function {
    let namespace = match deployment.namespace.as_str() {
        "" => DEFAULT_NAMESPACE,
        namespace => namespace,
    };
    Function { name: deployment.service.clone(), namespace: namespace.to_owned() }
}

/// Returns the path as a shell word, quoted if necessary.
fn shell_word(path: &Path) -> String {
    let path = path.display().to_string();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+@:".contains(c);
    if path.chars().all(is_plain) { path } else { stack::single_quoted(&path) }
}
