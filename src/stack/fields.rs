//! Reads typed fields from YAML nodes, and collects all errors. No I/O.

use std::collections::BTreeMap;
use std::rc::Rc;

use crate::stack::StackError;
use crate::stack::substitute::substitute;
use crate::stack::yaml::{Key, Node, Value};

/// Reads fields and collects errors.
pub(super) struct FieldReader<'a> {
    pub(super) var: &'a dyn Fn(&str) -> Option<String>,
    pub(super) errors: Vec<StackError>,
}

/// A YAML map with unique keys.
pub(super) struct Map<'n> {
    /// Path in the file, such as `functions.echo`.
    pub(super) path: String,
    entries: Vec<(&'n Key, &'n Node)>,
}

impl<'n> Map<'n> {
    pub(super) fn get(&self, name: &str) -> Option<&'n Node> {
        self.entries.iter().find(|(key, _)| key.name == name).map(|(_, node)| *node)
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = (&'n Key, &'n Node)> {
        self.entries.iter().copied()
    }

    pub(super) fn child_path(&self, name: &str) -> String {
        match self.path.as_str() {
            "" => name.to_owned(),
            path => format!("{path}.{name}"),
        }
    }
}

impl FieldReader<'_> {
    pub(super) fn error(&mut self, line: usize, key: &str, text: impl Into<String>) {
        self.errors.push(StackError { line, key: key.to_owned(), text: text.into() });
    }

    /// Reads a map; empty, with an error, if `node` is not a map. Of a duplicate key the first value is used, with an
    /// error.
    pub(super) fn map<'n>(&mut self, path: &str, node: &'n Node) -> Map<'n> {
        let mut map = Map { path: path.to_owned(), entries: Vec::new() };
        let entries: &[(Key, Rc<Node>)] = match &node.value {
            Value::Map(entries) => entries,
            Value::Null => return map,
            other => {
                let text = format!("this is {}, but must be a map of keys to values", other.kind());
                self.error(node.line, path, text);
                return map;
            }
        };
        for (key, value) in entries {
            match map.entries.iter().find(|(known, _)| known.name == key.name) {
                Some((first, _)) => {
                    let text = format!(
                        "duplicate key, first on line {}: remove or rename one of them",
                        first.line
                    );
                    self.error(key.line, &map.child_path(&key.name), text);
                }
                None => map.entries.push((key, value)),
            }
        }
        map
    }

    /// Adds an error for every key of `map` that is not in `known`. Keys that begin with `x-` are for other tools.
    pub(super) fn reject_unknown_keys(&mut self, map: &Map<'_>, known: &[&str]) {
        for (key, _) in map.entries() {
            if known.contains(&key.name.as_str()) || key.name.starts_with("x-") {
                continue;
            }
            let close =
                known.iter().map(|name| (strsim::damerau_levenshtein(name, &key.name), name));
            let text = match close.min() {
                Some((distance, name)) if distance <= 2 => {
                    format!("unknown key: did you mean {name}?")
                }
                _ => format!("unknown key: remove it, or use one of {}", known.join(", ")),
            };
            self.error(key.line, &map.child_path(&key.name), text);
        }
    }

    /// Reads a string and substitutes its variables; `None` if it is missing, null or invalid.
    pub(super) fn text(&mut self, path: &str, node: Option<&Node>) -> Option<String> {
        let node = node?;
        match &node.value {
            Value::Null => None,
            Value::Text(text) => match substitute(text, self.var) {
                Ok(text) => Some(text),
                Err(error) => {
                    self.error(node.line, path, error);
                    None
                }
            },
            other => {
                let text =
                    format!("this is {}, but must be a string: put it in quotes", other.kind());
                self.error(node.line, path, text);
                None
            }
        }
    }

    /// Reads a list of strings; a single string counts as a list of one.
    pub(super) fn text_list(&mut self, path: &str, node: Option<&Node>) -> Option<Vec<String>> {
        let node = node?;
        match &node.value {
            Value::Null => None,
            Value::List(items) => {
                let items = items.iter();
                Some(items.filter_map(|item| self.text(path, Some(item.as_ref()))).collect())
            }
            Value::Text(_) => Some(self.text(path, Some(node)).into_iter().collect()),
            Value::Map(_) => {
                self.error(node.line, path, "this is a map, but must be a list, such as [a, b]");
                None
            }
        }
    }

    /// Reads a map of strings.
    pub(super) fn text_map(
        &mut self,
        path: &str,
        node: Option<&Node>,
    ) -> Option<BTreeMap<String, String>> {
        let node = node.filter(|node| !matches!(node.value, Value::Null))?;
        let map = self.map(path, node);
        let mut texts = BTreeMap::new();
        for (key, value) in map.entries() {
            let text = self.text(&map.child_path(&key.name), Some(value));
            texts.insert(key.name.clone(), text.unwrap_or_default());
        }
        Some(texts)
    }

    pub(super) fn boolean(&mut self, path: &str, node: Option<&Node>) -> bool {
        let line = node.map_or(0, |node| node.line);
        match self.text(path, node).as_deref() {
            None => false,
            Some("true" | "True" | "TRUE" | "1") => true,
            Some("false" | "False" | "FALSE" | "0") => false,
            Some(other) => {
                self.error(line, path, format!("{other:?} is not true or false"));
                false
            }
        }
    }
}
