//! Parses OpenFaaS stack files into deployments, and collects all errors. No I/O: closures look up variables and read
//! other files.

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
use std::path::Path;
use std::{fmt, io};

use crate::stack::fields::FieldReader;
pub use crate::stack::shell::single_quoted;
use gateway_provider::types::FunctionDeployment;

/// Access to the environment of a stack file.
pub struct Source<'a> {
    /// Absolute directory of the file. Paths and commands in the file are relative to it.
    pub directory: &'a Path,
    /// Looks up a variable.
    pub var: &'a dyn Fn(&str) -> Option<String>,
    /// Reads another file.
    pub read: &'a dyn Fn(&Path) -> io::Result<String>,
}

/// A parsed stack file.
#[derive(Debug, Default)]
pub struct Stack {
    /// The valid functions, sorted by name.
    pub functions: Vec<FunctionDeployment>,
    /// The names of functions with errors.
    pub invalid: BTreeSet<String>,
    /// All errors, sorted by line.
    pub errors: Vec<StackError>,
    /// The first line of each function.
    pub lines: BTreeMap<String, usize>,
    /// False if the list of functions could not be read: it is unknown then which functions the file has.
    pub is_readable: bool,
}

/// An error in a stack file, with its remedy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StackError {
    pub line: usize,
    /// Path of the key, such as `functions.echo.fprocess`; empty for the whole file.
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

/// Parses a stack file.
pub fn parse(text: &str, source: &Source<'_>) -> Stack {
    let root = match yaml::parse(text) {
        Ok(root) => root,
        Err(syntax_error) => {
            let error =
                StackError { line: syntax_error.line, key: String::new(), text: syntax_error.text };
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
        let error_count = reader.errors.len();
        let functions = reader.map("functions", node);
        let duplicates: BTreeSet<String> = reader.errors[error_count..]
            .iter()
            .filter_map(|error| error.key.strip_prefix("functions.").map(str::to_owned))
            .collect();
        for (key, node) in functions.entries() {
            let error_count = reader.errors.len();
            stack.lines.insert(key.name.clone(), key.line);
            let function = function::read_function(&mut reader, source, &key.name, key.line, node);
            // With a duplicate name it is unknown which of the two is meant.
            if reader.errors.len() > error_count || duplicates.contains(&key.name) {
                stack.invalid.insert(key.name.clone());
            } else {
                stack.functions.push(function);
            }
        }
    }
    if stack.functions.is_empty() && stack.invalid.is_empty() {
        let text = "the file has no functions: add a map `functions`, such as `functions: {echo: {fprocess: cat}}`";
        reader.error(root.line, "", text);
    } else {
        stack.is_readable = true;
    }
    stack.functions.sort_by(|a, b| a.service.cmp(&b.service));
    reader.errors.sort_by_key(|error| error.line);
    Stack { errors: reader.errors, ..stack }
}
