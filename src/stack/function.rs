//! A function's entry in a stack file. No I/O.

use std::collections::BTreeMap;
use std::path::Path;

use crate::provider::types::{FunctionDeployment, Resources};
use crate::stack::Source;
use crate::stack::fields::{Map, Reader};
use crate::stack::shell;
use crate::stack::yaml::{self, Node};

/// Keys that concern the building of an image are known, and left alone.
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

/// What `node` describes, under `name`. What is wrong with it is among the mistakes of `reader`.
pub(super) fn read(
    reader: &mut Reader<'_>,
    source: &Source<'_>,
    name: &str,
    line: usize,
    node: &Node,
) -> FunctionDeployment {
    let map = reader.map(&format!("functions.{name}"), node);
    reader.only(&map, KEYS);
    check_name(reader, &map, name, line);
    let mut env_vars = reader.text_map(&map.at("environment"), map.get("environment"));
    for (name, value) in environment_files(reader, source, &map) {
        env_vars.get_or_insert_default().insert(name, value);
    }
    FunctionDeployment {
        service: name.to_owned(),
        namespace: text(reader, &map, "namespace"),
        image: text(reader, &map, "image"),
        env_process: command(reader, &map, line),
        working_directory: source.directory.to_string_lossy().into_owned(),
        env_vars: Some(env_vars.unwrap_or_default()),
        constraints: reader.texts(&map.at("constraints"), map.get("constraints")),
        secrets: reader.texts(&map.at("secrets"), map.get("secrets")),
        labels: reader.text_map(&map.at("labels"), map.get("labels")),
        annotations: reader.text_map(&map.at("annotations"), map.get("annotations")),
        limits: resources(reader, &map, "limits"),
        requests: resources(reader, &map, "requests"),
        read_only_root_filesystem: reader
            .boolean(&map.at("readonly_root_filesystem"), map.get("readonly_root_filesystem")),
    }
}

fn text(reader: &mut Reader<'_>, map: &Map<'_>, name: &str) -> String {
    reader.text(&map.at(name), map.get(name)).unwrap_or_default()
}

fn check_name(reader: &mut Reader<'_>, map: &Map<'_>, name: &str, line: usize) {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let fits = (1..=63).contains(&name.len()) && name.bytes().all(plain);
    if !fits || name.starts_with('-') || name.ends_with('-') {
        let text =
            "not a function's name: use at most 63 of a-z, 0-9 and -, none of them - at either end";
        reader.mistake(line, &map.path, text);
    }
}

/// The command, which no shell reads.
fn command(reader: &mut Reader<'_>, map: &Map<'_>, line: usize) -> String {
    let names = ["fprocess", "envProcess"].into_iter().filter(|name| map.get(name).is_some());
    let names: Vec<_> = names.collect();
    let Some(name) = names.first() else {
        let text = "missing: here a function is a command, such as `fprocess: cat`";
        reader.mistake(line, &map.at("fprocess"), text);
        return String::new();
    };
    let (key, node) = (map.at(name), map.get(name));
    let line = node.map_or(line, |node| node.line);
    if names.len() > 1 {
        reader.mistake(line, &key, "given beside envProcess, which means the same: remove one");
    }
    let before = reader.mistakes.len();
    let command = reader.text(&key, node).unwrap_or_default();
    if reader.mistakes.len() > before {
        return command;
    }
    if command.trim().is_empty() {
        reader.mistake(line, &key, "empty: here a function is a command, such as `fprocess: cat`");
    } else if let Some(operator) = shell::operator(&command) {
        // As it is written: the value of a variable is none of the log's business.
        let written = node.map_or("", |node| node.value.written()).trim();
        let text = format!(
            "{operator} needs a shell, and none reads this command: write sh -c {}, or put {operator} in quotes",
            shell::quoted(written)
        );
        reader.mistake(line, &key, text);
    }
    command
}

fn resources(reader: &mut Reader<'_>, map: &Map<'_>, name: &str) -> Option<Resources> {
    let map = reader.map(&map.at(name), map.get(name)?);
    reader.only(&map, &["memory", "cpu"]);
    Some(Resources { memory: text(reader, &map, "memory"), cpu: text(reader, &map, "cpu") })
}

/// The variables in the files that `environment_file` names, the last of which wins.
fn environment_files(
    reader: &mut Reader<'_>,
    source: &Source<'_>,
    map: &Map<'_>,
) -> BTreeMap<String, String> {
    let (key, node) = (map.at("environment_file"), map.get("environment_file"));
    let line = node.map_or(0, |node| node.line);
    let mut variables = BTreeMap::new();
    for name in reader.texts(&key, node).unwrap_or_default() {
        match environment_file(reader, source, &name) {
            Ok(found) => variables.extend(found),
            Err(error) => reader.mistake(line, &key, error),
        }
    }
    variables
}

fn environment_file(
    reader: &Reader<'_>,
    source: &Source<'_>,
    name: &str,
) -> Result<BTreeMap<String, String>, String> {
    let path = source.directory.join(Path::new(name));
    let text = (source.read)(&path).map_err(|error| {
        format!("cannot read {name} ({error}): the path is relative to the stack file")
    })?;
    let root = yaml::parse(&text).map_err(|it| format!("{name}: line {}: {}", it.line, it.text))?;
    // A reader of its own, since lines and keys are those of the other file.
    let mut inner = Reader { var: reader.var, mistakes: Vec::new() };
    let top = inner.map("", &root);
    inner.only(&top, &["environment"]);
    let found = inner.text_map("environment", top.get("environment"));
    match inner.mistakes.as_slice() {
        [] => found.ok_or_else(|| format!("{name} has no map `environment`")),
        mistakes => {
            let told: Vec<_> = mistakes.iter().map(ToString::to_string).collect();
            Err(format!("{name}: {}", told.join("; ")))
        }
    }
}
