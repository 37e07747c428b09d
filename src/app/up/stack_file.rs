//! The stack file of `gateway up`: its functions are deployed at the start, and follow its changes.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};

use crate::app::up::record::Record;
use crate::function::Function;
use crate::provider::process::{Process, Refusal};
use crate::provider::types::FunctionDeployment;
use crate::stack::{self, Source, Stack};

/// What stands for a file's content between two looks at it: inode, length, time of the last change. `None`: no file.
type Mark = Option<(u64, u64, i64, i64)>;

/// The longest file that is read.
const MAX_LENGTH: u64 = 4 << 20;

/// A stack file, and what is deployed of it.
pub(super) struct StackFile<'a> {
    path: PathBuf,
    directory: PathBuf,
    var: &'a dyn Fn(&str) -> Option<String>,
    process: Arc<Process>,
    record: Record,
    /// What was deployed as the file says.
    deployed: BTreeMap<Function, FunctionDeployment>,
    /// What will be once its secrets exist.
    waiting: BTreeMap<Function, FunctionDeployment>,
    /// The stack file, and the others that it names.
    files: Vec<PathBuf>,
    /// What the files were like when they were last applied, and at the last look.
    applied: Vec<Mark>,
    seen: Vec<Mark>,
}

impl<'a> StackFile<'a> {
    pub(super) fn new(
        path: &Path,
        state_dir: &Path,
        process: Arc<Process>,
        var: &'a dyn Fn(&str) -> Option<String>,
    ) -> Self {
        Self {
            directory: path.parent().unwrap_or(Path::new("/")).to_owned(),
            files: vec![path.to_owned()],
            path: path.to_owned(),
            var,
            process,
            record: Record::at(state_dir, path),
            deployed: BTreeMap::new(),
            waiting: BTreeMap::new(),
            applied: Vec::new(),
            seen: Vec::new(),
        }
    }

    /// Deploys all functions, or says everything that is wrong with them. Those that lack secrets wait.
    pub(super) async fn start(&mut self) -> anyhow::Result<()> {
        let shown = self.path.display().to_string();
        let stack = self.read().with_context(|| format!("cannot read the stack file {shown}"))?;
        let mut mistakes: Vec<_> =
            stack.mistakes.iter().map(|mistake| (mistake.line, mistake.to_string())).collect();
        for function in &stack.functions {
            if let Err(refusal) = self.process.check(function) {
                let line = stack.lines.get(&function.service).copied().unwrap_or_default();
                let text = format!("line {line}: functions.{}: {refusal}", function.service);
                mistakes.push((line, text));
            }
        }
        if !mistakes.is_empty() {
            mistakes.sort();
            let lines: Vec<_> =
                mistakes.into_iter().map(|(_, text)| format!("\n  {text}")).collect();
            bail!("the stack file {shown} cannot be used:{}", lines.concat());
        }
        for function in &stack.functions {
            let name = &function.service;
            let installed = self.install(function).await;
            installed.with_context(|| format!("function {name}"))?;
        }
        self.remove_others(&stack).await;
        Ok(())
    }

    /// The functions that are deployed or will be.
    pub(super) fn names(&self) -> BTreeSet<&str> {
        self.deployed
            .keys()
            .chain(self.waiting.keys())
            .map(|function| function.name.as_str())
            .collect()
    }

    /// Deploys what waited for secrets that exist by now.
    pub(super) async fn look_for_secrets(&mut self) {
        let ready =
            |function: &&FunctionDeployment| self.process.missing_secrets(function).is_empty();
        let ready: Vec<_> = self.waiting.values().filter(ready).cloned().collect();
        for function in ready {
            self.change(&function).await;
        }
    }

    /// Looks at the files, and applies them if they have changed and have been left alone since the last look: one that
    /// is being written may say anything.
    pub(super) async fn poll(&mut self) {
        let now = self.marks();
        if now != self.applied && now == self.seen {
            self.apply().await;
        } else {
            self.seen = now;
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
        for mistake in &stack.mistakes {
            tracing::warn!("The stack file {shown}: {mistake}");
        }
        if !stack.is_readable {
            tracing::warn!(
                "Nothing of the stack file {shown} is applied: its functions stay as they are"
            );
            return;
        }
        for name in &stack.faulty {
            tracing::warn!(function = %name, "Function {name} stays as it is, because of what is wrong with it in the stack file");
        }
        for function in &stack.functions {
            let name = named(function);
            if self.deployed.get(&name) == Some(function) {
                // Another version may have waited for secrets.
                self.waiting.remove(&name);
            } else {
                self.change(function).await;
            }
        }
        self.remove_others(&stack).await;
    }

    /// Reads the stack file, and takes down what it and the files that it names are like.
    fn read(&mut self) -> io::Result<Stack> {
        // Before they are read, so that a change meanwhile is seen at the next look.
        let stack_file = mark(&self.path);
        let text = read_bounded(&self.path);
        let others = RefCell::new(Vec::new());
        let read = |path: &Path| {
            others.borrow_mut().push((path.to_owned(), mark(path)));
            if !path.is_file() && path.exists() {
                return Err(io::Error::other("it is not a regular file"));
            }
            read_bounded(path)
        };
        let source = Source { directory: &self.directory, var: self.var, read: &read };
        let stack = text.map(|text| stack::parse(&text, &source));
        let others = others.into_inner();
        self.applied =
            std::iter::once(stack_file).chain(others.iter().map(|(_, mark)| *mark)).collect();
        let others = others.into_iter().map(|(path, _)| path);
        self.files = std::iter::once(self.path.clone()).chain(others).collect();
        self.seen.clone_from(&self.applied);
        stack
    }

    fn marks(&self) -> Vec<Mark> {
        self.files.iter().map(|path| mark(path)).collect()
    }

    /// Deploys a function that is new or has changed, and says what came of it.
    async fn change(&mut self, function: &FunctionDeployment) {
        let name = named(function);
        let done = if self.deployed.contains_key(&name) { "Changed" } else { "Added" };
        match self.install(function).await {
            Ok(true) => tracing::info!(function = %name, "{done} {name}, as the stack file says"),
            Ok(false) => {}
            Err(refusal) => {
                tracing::warn!(function = %name, "{name} stays as it is: {refusal}");
            }
        }
    }

    /// Deploys a function unless it lacks secrets, for which it waits then; whether it did.
    async fn install(&mut self, function: &FunctionDeployment) -> Result<bool, Refusal> {
        let name = named(function);
        let missing = self.process.missing_secrets(function);
        if !missing.is_empty() {
            self.process.check(function)?;
            if self.waiting.insert(name.clone(), function.clone()).as_ref() != Some(function) {
                self.ask_for(&name, &missing);
            }
            return Ok(false);
        }
        self.process.apply(function.clone()).await?;
        self.waiting.remove(&name);
        self.deployed.insert(name, function.clone());
        Ok(true)
    }

    /// Says what a function waits for, in lines that can be pasted.
    fn ask_for(&self, function: &Function, missing: &[String]) {
        tracing::warn!(function = %function, secrets = ?missing, "{function} is not deployed before its secrets exist");
        let state = shell_word(&self.record.state_dir);
        let mut text = format!("{function} starts once its secrets exist. Create them:\n");
        for secret in missing {
            let namespace = match function.namespace.as_str() {
                super::NAMESPACE => String::new(),
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
    async fn remove_others(&mut self, stack: &Stack) {
        let wanted: BTreeSet<_> = stack.functions.iter().map(named).collect();
        let stays = |function: &Function| {
            wanted.contains(function) || stack.faulty.contains(&function.name)
        };
        self.waiting.retain(|function, _| stays(function));
        let known = self.deployed.keys().cloned().chain(self.record.functions.iter().cloned());
        let gone: BTreeSet<_> = known.filter(|function| !stays(function)).collect();
        let mut kept = Vec::new();
        for function in gone {
            match self.process.delete(function.clone()).await {
                Ok(()) => {
                    tracing::info!(function = %function, "Removed {function}, which the stack file has no more");
                }
                // Another program was faster.
                Err(Refusal::NotFound(_) | Refusal::NoSuchFunction(_)) => {}
                Err(refusal) => {
                    tracing::warn!(function = %function, "{function} cannot be removed: {refusal}");
                    kept.push(function);
                    continue;
                }
            }
            self.deployed.remove(&function);
        }
        let faulty = self.record.functions.iter().filter(|function| stays(function)).cloned();
        let functions = self.deployed.keys().cloned().chain(faulty).chain(kept);
        self.record.write(functions.collect());
    }
}

/// What a regular file is like. Anything else, such as a pipe, is read once and not followed.
fn mark(path: &Path) -> Mark {
    let file = std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file)?;
    Some((file.ino(), file.len(), file.mtime(), file.mtime_nsec()))
}

fn read_bounded(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MAX_LENGTH + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_LENGTH {
        return Err(io::Error::other(format!("it has more than {MAX_LENGTH} bytes")));
    }
    Ok(text)
}

fn named(deployment: &FunctionDeployment) -> Function {
    let namespace = match deployment.namespace.as_str() {
        "" => super::NAMESPACE,
        namespace => namespace,
    };
    Function { name: deployment.service.clone(), namespace: namespace.to_owned() }
}

/// The path as a shell takes it.
fn shell_word(path: &Path) -> String {
    let path = path.display().to_string();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+@:".contains(c);
    if path.chars().all(is_plain) { path } else { stack::quoted(&path) }
}
