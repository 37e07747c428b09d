//! The stack file of `gateway up`: its functions are deployed at the start, and follow its changes.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};

use crate::app::up::record::StackRecord;
use crate::function::Function;
use crate::provider::process::{ApiError, ProcessProvider};
use crate::provider::types::FunctionDeployment;
use crate::stack::{self, Source, Stack};

/// What stands for a file's content between two looks at it: inode, length, time of the last change. `None`: no file.
type Fingerprint = Option<(u64, u64, i64, i64)>;

/// The longest file that is read.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// A stack file, and what is deployed of it.
pub(super) struct StackFile<'a> {
    path: PathBuf,
    directory: PathBuf,
    var: &'a dyn Fn(&str) -> Option<String>,
    process: Arc<ProcessProvider>,
    record: StackRecord,
    /// What was deployed as the file says.
    deployed: BTreeMap<Function, FunctionDeployment>,
    /// What will be once its secrets exist.
    awaiting_secrets: BTreeMap<Function, FunctionDeployment>,
    /// The stack file, and the others that it names.
    files: Vec<PathBuf>,
    /// What the files were like when they were last applied, and at the last look.
    applied: Vec<Fingerprint>,
    last_seen: Vec<Fingerprint>,
}

impl<'a> StackFile<'a> {
    pub(super) fn new(
        path: &Path,
        state_dir: &Path,
        process: Arc<ProcessProvider>,
        var: &'a dyn Fn(&str) -> Option<String>,
    ) -> Self {
        Self {
            directory: path.parent().unwrap_or(Path::new("/")).to_owned(),
            files: vec![path.to_owned()],
            path: path.to_owned(),
            var,
            process,
            record: StackRecord::load(state_dir, path),
            deployed: BTreeMap::new(),
            awaiting_secrets: BTreeMap::new(),
            applied: Vec::new(),
            last_seen: Vec::new(),
        }
    }

    /// Deploys all functions, or says everything that is wrong with them. Those that lack secrets wait.
    pub(super) async fn start(&mut self) -> anyhow::Result<()> {
        let shown = self.path.display().to_string();
        let stack = self.read().with_context(|| format!("cannot read the stack file {shown}"))?;
        let mut errors: Vec<_> =
            stack.errors.iter().map(|error| (error.line, error.to_string())).collect();
        for function in &stack.functions {
            if let Err(refusal) = self.process.validate_except_secrets(function) {
                let line = stack.lines.get(&function.service).copied().unwrap_or_default();
                let text = format!("line {line}: functions.{}: {refusal}", function.service);
                errors.push((line, text));
            }
        }
        if !errors.is_empty() {
            errors.sort();
            let lines: Vec<_> = errors.into_iter().map(|(_, text)| format!("\n  {text}")).collect();
            bail!("the stack file {shown} cannot be used:{}", lines.concat());
        }
        for function in &stack.functions {
            let name = &function.service;
            let installed = self.deploy_or_wait(function).await;
            installed.with_context(|| format!("function {name}"))?;
        }
        self.remove_undeclared(&stack).await;
        Ok(())
    }

    /// The functions that are deployed or will be.
    pub(super) fn names(&self) -> BTreeSet<&str> {
        self.deployed
            .keys()
            .chain(self.awaiting_secrets.keys())
            .map(|function| function.name.as_str())
            .collect()
    }

    /// Deploys what waited for secrets that exist by now.
    pub(super) async fn deploy_waiting(&mut self) {
        let ready =
            |function: &&FunctionDeployment| self.process.missing_secrets(function).is_empty();
        let ready: Vec<_> = self.awaiting_secrets.values().filter(ready).cloned().collect();
        for function in ready {
            self.redeploy(&function).await;
        }
    }

    /// Looks at the files, and applies them if they have changed and have been left alone since the last look: one that
    /// is being written may say anything.
    pub(super) async fn poll(&mut self) {
        let now = self.fingerprints();
        if now != self.applied && now == self.last_seen {
            self.apply().await;
        } else {
            self.last_seen = now;
        }
    }

    /// Reads the files again, and deploys, replaces and removes what they say. What is wrong stays as it is.
    pub(super) async fn apply(&mut self) {
        let shown = self.path.display().to_string();
        if !self.path.is_file() && self.path.exists() {
            // A pipe would be waited for.
            tracing::warn!("The stack file {shown} is not a regular file, and is not read again");
            return;
        }
        let stack = match self.read() {
            Ok(stack) => stack,
            Err(error) => {
                tracing::warn!(%error, "The stack file {shown} cannot be read: its functions stay as they are");
                return;
            }
        };
        for error in &stack.errors {
            tracing::warn!("The stack file {shown}: {error}");
        }
        if !stack.is_readable {
            tracing::warn!(
                "Nothing of the stack file {shown} is applied: its functions stay as they are"
            );
            return;
        }
        for name in &stack.invalid {
            tracing::warn!(function = %name, "Function {name} stays as it is, because of what is wrong with it in the stack file");
        }
        for function in &stack.functions {
            let name = function_of(function);
            if self.deployed.get(&name) == Some(function) {
                // Another version may have waited for secrets.
                self.awaiting_secrets.remove(&name);
            } else {
                self.redeploy(function).await;
            }
        }
        self.remove_undeclared(&stack).await;
    }

    /// Reads the stack file, and takes down what it and the files that it names are like.
    fn read(&mut self) -> io::Result<Stack> {
        // Before they are read, so that a change meanwhile is seen at the next look.
        let stack_file = fingerprint(&self.path);
        let text = read_bounded(&self.path);
        let others = RefCell::new(Vec::new());
        let read = |path: &Path| {
            others.borrow_mut().push((path.to_owned(), fingerprint(path)));
            if !path.is_file() && path.exists() {
                return Err(io::Error::other("it is not a regular file"));
            }
            read_bounded(path)
        };
        let source = Source { directory: &self.directory, var: self.var, read: &read };
        let stack = text.map(|text| stack::parse(&text, &source));
        let others = others.into_inner();
        self.applied = std::iter::once(stack_file)
            .chain(others.iter().map(|(_, fingerprint)| *fingerprint))
            .collect();
        let others = others.into_iter().map(|(path, _)| path);
        self.files = std::iter::once(self.path.clone()).chain(others).collect();
        self.last_seen.clone_from(&self.applied);
        stack
    }

    fn fingerprints(&self) -> Vec<Fingerprint> {
        self.files.iter().map(|path| fingerprint(path)).collect()
    }

    /// Deploys a function that is new or has changed, and says what came of it.
    async fn redeploy(&mut self, function: &FunctionDeployment) {
        let name = function_of(function);
        let done = if self.deployed.contains_key(&name) { "Changed" } else { "Added" };
        match self.deploy_or_wait(function).await {
            Ok(true) => tracing::info!(function = %name, "{done} {name}, as the stack file says"),
            Ok(false) => {}
            Err(refusal) => {
                tracing::warn!(function = %name, "{name} stays as it is: {refusal}");
            }
        }
    }

    /// Deploys a function unless it lacks secrets, for which it waits then; whether it did.
    async fn deploy_or_wait(&mut self, function: &FunctionDeployment) -> Result<bool, ApiError> {
        let name = function_of(function);
        let missing = self.process.missing_secrets(function);
        if !missing.is_empty() {
            self.process.validate_except_secrets(function)?;
            if self.awaiting_secrets.insert(name.clone(), function.clone()).as_ref()
                != Some(function)
            {
                self.print_missing_secrets(&name, &missing);
            }
            return Ok(false);
        }
        self.process.deploy_if_changed(function.clone()).await?;
        self.awaiting_secrets.remove(&name);
        self.deployed.insert(name, function.clone());
        Ok(true)
    }

    /// Says what a function waits for, in lines that can be pasted.
    fn print_missing_secrets(&self, function: &Function, missing: &[String]) {
        tracing::warn!(function = %function, secrets = ?missing, "{function} is not deployed before its secrets exist");
        let state = shell_word(&self.record.state_dir);
        let mut text = format!("{function} starts once its secrets exist. Create them:\n");
        for secret in missing {
            let namespace = match function.namespace.as_str() {
                super::DEFAULT_NAMESPACE => String::new(),
                namespace => format!(" --namespace {namespace}"),
            };
            text.push_str(&format!(
                "  gateway secret set {secret}{namespace} --state-dir {state}\n"
            ));
        }
        // A closed standard output ends nothing.
        let _ = io::stdout().write_all(text.as_bytes());
    }

    /// Removes the functions that the file had and has no more; also those that it had before this process started.
    async fn remove_undeclared(&mut self, stack: &Stack) {
        let wanted: BTreeSet<_> = stack.functions.iter().map(function_of).collect();
        let stays = |function: &Function| {
            wanted.contains(function) || stack.invalid.contains(&function.name)
        };
        self.awaiting_secrets.retain(|function, _| stays(function));
        let known = self.deployed.keys().cloned().chain(self.record.functions.iter().cloned());
        let gone: BTreeSet<_> = known.filter(|function| !stays(function)).collect();
        let mut kept = Vec::new();
        for function in gone {
            match self.process.delete(function.clone()).await {
                Ok(()) => {
                    tracing::info!(function = %function, "Removed {function}, which the stack file has no more");
                }
                // Another program was faster.
                Err(ApiError::NotFound(_) | ApiError::NoSuchFunction(_)) => {}
                Err(refusal) => {
                    tracing::warn!(function = %function, "{function} cannot be removed: {refusal}");
                    kept.push(function);
                    continue;
                }
            }
            self.deployed.remove(&function);
        }
        let invalid = self.record.functions.iter().filter(|function| stays(function)).cloned();
        let functions = self.deployed.keys().cloned().chain(invalid).chain(kept);
        self.record.save(functions.collect());
    }
}

/// What a regular file is like. Anything else, such as a pipe, is read once and not followed.
fn fingerprint(path: &Path) -> Fingerprint {
    let file = std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file)?;
    Some((file.ino(), file.len(), file.mtime(), file.mtime_nsec()))
}

fn read_bounded(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(io::Error::other(format!("it has more than {MAX_FILE_BYTES} bytes")));
    }
    Ok(text)
}

fn function_of(deployment: &FunctionDeployment) -> Function {
    let namespace = match deployment.namespace.as_str() {
        "" => super::DEFAULT_NAMESPACE,
        namespace => namespace,
    };
    Function { name: deployment.service.clone(), namespace: namespace.to_owned() }
}

/// The path as a shell takes it.
fn shell_word(path: &Path) -> String {
    let path = path.display().to_string();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+@:".contains(c);
    if path.chars().all(is_plain) { path } else { stack::single_quoted(&path) }
}
