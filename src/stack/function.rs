//! Reads a function of a stack file. No I/O.

use std::collections::BTreeMap;
use std::path::Path;

use crate::stack::fields::{FieldReader, Map};
use crate::stack::yaml::{self, Node};
use crate::stack::{Source, shell};
use gateway_base::function::{DNS_LABEL_RULE, is_dns_label};
use gateway_provider::types::{FunctionDeployment, Resources};

/// Known keys of a function. Those for building an image are ignored.
const KEYS: &[&str] = &[
    "annotations",
    "build_args",
    "build_options",
    "build_secrets",
    "constraints",
    "copy",
    "envProcess",
    "environment",
    "environment_file",
    "fprocess",
    "handler",
    "image",
    "labels",
    "lang",
    "limits",
    "namespace",
    "platforms",
    "publish",
    "readonly_root_filesystem",
    "requests",
    "secrets",
    "skip_build",
];

/// Reads the function `name` from `node`. Adds errors to `reader`.
pub(super) fn read_function(
    reader: &mut FieldReader<'_>,
    source: &Source<'_>,
    name: &str,
    line: usize,
    node: &Node,
) -> FunctionDeployment {
    let map = reader.map(&format!("functions.{name}"), node);
    reader.reject_unknown_keys(&map, KEYS);
    check_name(reader, &map, name, line);
    let mut env_vars = reader.text_map(&map.child_path("environment"), map.get("environment"));
    for (name, value) in read_environment_files(reader, source, &map) {
        env_vars.get_or_insert_default().insert(name, value);
    }
    FunctionDeployment {
        service: name.to_owned(),
        namespace: text(reader, &map, "namespace"),
        image: text(reader, &map, "image"),
        env_process: read_command(reader, &map, line),
        working_directory: source.directory.to_string_lossy().into_owned(),
        env_vars: Some(env_vars.unwrap_or_default()),
        constraints: reader.text_list(&map.child_path("constraints"), map.get("constraints")),
        secrets: reader.text_list(&map.child_path("secrets"), map.get("secrets")),
        labels: reader.text_map(&map.child_path("labels"), map.get("labels")),
        annotations: reader.text_map(&map.child_path("annotations"), map.get("annotations")),
        limits: read_resources(reader, &map, "limits"),
        requests: read_resources(reader, &map, "requests"),
        read_only_root_filesystem: reader.boolean(
            &map.child_path("readonly_root_filesystem"),
            map.get("readonly_root_filesystem"),
        ),
    }
}

fn text(reader: &mut FieldReader<'_>, map: &Map<'_>, name: &str) -> String {
    reader.text(&map.child_path(name), map.get(name)).unwrap_or_default()
}

fn check_name(reader: &mut FieldReader<'_>, map: &Map<'_>, name: &str, line: usize) {
    if !is_dns_label(name) {
        reader.error(line, &map.path, format!("not a function's name: use {DNS_LABEL_RULE}"));
    }
}

/// Reads the command, which is run without a shell.
fn read_command(reader: &mut FieldReader<'_>, map: &Map<'_>, line: usize) -> String {
    let names = ["fprocess", "envProcess"].into_iter().filter(|name| map.get(name).is_some());
    let names: Vec<_> = names.collect();
    let Some(name) = names.first() else {
        let text = "missing: a function of this provider is a command, such as `fprocess: cat`";
        reader.error(line, &map.child_path("fprocess"), text);
        return String::new();
    };
    let (key, node) = (map.child_path(name), map.get(name));
    let line = node.map_or(line, |node| node.line);
    if names.len() > 1 {
        reader.error(line, &key, "duplicate of envProcess, which has the same meaning: remove one");
    }
    let error_count = reader.errors.len();
    let command = reader.text(&key, node).unwrap_or_default();
    if reader.errors.len() > error_count {
        return command;
    }
    if command.trim().is_empty() {
        reader.error(
            line,
            &key,
            "empty: a function of this provider is a command, such as `fprocess: cat`",
        );
    } else if let Some(operator) = shell::shell_operator(&command) {
        // Before substitution: the message must not contain values of variables.
        let written = node.map_or("", |node| node.value.as_written()).trim();
        let text = format!(
            "{operator} needs a shell, but the command runs without one: write sh -c {}, or put {operator} in quotes",
            shell::single_quoted(written)
        );
        reader.error(line, &key, text);
    }
    command
}

fn read_resources(reader: &mut FieldReader<'_>, map: &Map<'_>, name: &str) -> Option<Resources> {
    let map = reader.map(&map.child_path(name), map.get(name)?);
    reader.reject_unknown_keys(&map, &["memory", "cpu"]);
    Some(Resources { memory: text(reader, &map, "memory"), cpu: text(reader, &map, "cpu") })
}

/// Reads the variables in the files listed in `environment_file`. Later files override earlier ones.
fn read_environment_files(
    reader: &mut FieldReader<'_>,
    source: &Source<'_>,
    map: &Map<'_>,
) -> BTreeMap<String, String> {
    let (key, node) = (map.child_path("environment_file"), map.get("environment_file"));
    let line = node.map_or(0, |node| node.line);
    let mut variables = BTreeMap::new();
    for name in reader.text_list(&key, node).unwrap_or_default() {
        match read_environment_file(reader, source, &name) {
            Ok(found) => variables.extend(found),
            Err(error) => reader.error(line, &key, error),
        }
    }
    variables
}

fn read_environment_file(
    reader: &FieldReader<'_>,
    source: &Source<'_>,
    name: &str,
) -> Result<BTreeMap<String, String>, String> {
    let path = source.directory.join(Path::new(name));
    let text = (source.read)(&path).map_err(|error| {
        format!("cannot read {name} ({error}): the path is relative to the stack file")
    })?;
    let root = yaml::parse(&text)
        .map_err(|error| format!("{name}: line {}: {}", error.line, error.text))?;
    // A separate reader, since lines and keys refer to the other file.
    let mut inner = FieldReader { var: reader.var, errors: Vec::new() };
    let top = inner.map("", &root);
    inner.reject_unknown_keys(&top, &["environment"]);
    let found = inner.text_map("environment", top.get("environment"));
    match inner.errors.as_slice() {
        [] => found.ok_or_else(|| format!("{name} has no map `environment`")),
        errors => {
            let messages: Vec<_> = errors.iter().map(ToString::to_string).collect();
            Err(format!("{name}: {}", messages.join("; ")))
        }
    }
}
