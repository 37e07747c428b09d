//! OpenFaaS stack files: the functions that they describe, ready to be deployed, and all that is wrong with them. No
//! I/O: variables and other files come in as functions.

mod fields;
mod function;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod shell;
mod substitute;
#[cfg(test)]
mod tests;
mod yaml;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::path::Path;

use crate::provider::types::FunctionDeployment;
use crate::stack::fields::FieldReader;
pub use crate::stack::shell::single_quoted;

/// What a stack file is read with.
pub struct Source<'a> {
    /// The directory of the file, absolute: paths and commands in it are relative to this.
    pub directory: &'a Path,
    /// Looks a variable up.
    pub var: &'a dyn Fn(&str) -> Option<String>,
    /// Reads another file.
    pub read: &'a dyn Fn(&Path) -> io::Result<String>,
}

/// What a stack file says.
#[derive(Debug, Default)]
pub struct Stack {
    /// The functions that nothing is wrong with, in the order of their names.
    pub functions: Vec<FunctionDeployment>,
    /// The names of those that something is wrong with.
    pub invalid: BTreeSet<String>,
    /// Everything that is wrong, in the order of the lines.
    pub errors: Vec<StackError>,
    /// The line that each function begins on.
    pub lines: BTreeMap<String, usize>,
    /// Whether the functions could be read at all. If not, the file says nothing about which there are.
    pub is_readable: bool,
}

/// Something wrong in a stack file, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StackError {
    pub line: usize,
    /// Such as `functions.echo.fprocess`; empty for the file as a whole.
    pub key: String,
    pub text: String,
}

impl fmt::Display for StackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.key.as_str() {
            "" => write!(f, "line {}: {}", self.line, self.text),
            key => write!(f, "line {}: {key}: {}", self.line, self.text),
        }
    }
}

/// Reads a stack file.
pub fn parse(text: &str, source: &Source<'_>) -> Stack {
    let root = match yaml::parse(text) {
        Ok(root) => root,
        Err(fault) => {
            let error = StackError { line: fault.line, key: String::new(), text: fault.text };
            return Stack { errors: vec![error], ..Stack::default() };
        }
    };
    let mut reader = FieldReader { var: source.var, errors: Vec::new() };
    let top = reader.map("", &root);
    reader.reject_unknown_keys(&top, &["version", "provider", "functions", "configuration"]);
    if let Some(provider) = top.get("provider") {
        let provider = reader.map("provider", provider);
        reader.reject_unknown_keys(&provider, &["name", "gateway", "network"]);
    }
    let mut stack = Stack::default();
    if let Some(node) = top.get("functions") {
        let before = reader.errors.len();
        let functions = reader.map("functions", node);
        let doubled: BTreeSet<String> = reader.errors[before..]
            .iter()
            .filter_map(|error| error.key.strip_prefix("functions.").map(str::to_owned))
            .collect();
        for (key, node) in functions.entries() {
            let before = reader.errors.len();
            stack.lines.insert(key.name.clone(), key.line);
            let function = function::read_function(&mut reader, source, &key.name, key.line, node);
            // Of two under one name, either may be meant.
            if reader.errors.len() > before || doubled.contains(&key.name) {
                stack.invalid.insert(key.name.clone());
            } else {
                stack.functions.push(function);
            }
        }
    }
    if stack.functions.is_empty() && stack.invalid.is_empty() {
        let text = "it has no functions: add a map `functions`, such as `functions: {echo: {fprocess: cat}}`";
        reader.error(root.line, "", text);
    } else {
        stack.is_readable = true;
    }
    stack.functions.sort_by(|a, b| a.service.cmp(&b.service));
    reader.errors.sort_by_key(|error| error.line);
    Stack { errors: reader.errors, ..stack }
}
