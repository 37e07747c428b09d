//! Parses YAML into a tree with line numbers, for error messages. No I/O.

use std::collections::HashMap;
use std::rc::Rc;

use saphyr_parser::{Event, Parser, ScalarStyle, ScanError};

/// Maximum number of nodes in a file, including those repeated by aliases, and maximum depth: by aliases, a file of a
/// few lines can expand to billions of nodes.
const MAX_NODES: usize = 100_000;
const MAX_DEPTH: usize = 32;

/// A value and its first line.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) line: usize,
    pub(super) value: Value,
}

#[derive(Clone, Debug)]
pub(super) enum Value {
    /// An empty scalar, `~` or `null`.
    Null,
    /// Any other scalar as written, including numbers: values of variables are strings.
    Text(String),
    List(Vec<Rc<Node>>),
    /// In the order of the file; may contain duplicate keys.
    Map(Vec<(Key, Rc<Node>)>),
}

#[derive(Clone, Debug)]
pub(super) struct Key {
    pub(super) line: usize,
    pub(super) name: String,
}

/// A syntax error with its line.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct YamlError {
    pub(super) line: usize,
    pub(super) text: String,
}

impl YamlError {
    fn new(line: usize, text: impl Into<String>) -> Self {
        Self { line, text: text.into() }
    }
}

/// Converts an error of the parser. Detects tabs in the indentation, which the parser reports on the wrong line.
fn syntax_error(text: &str, error: &ScanError) -> YamlError {
    let marker = error.marker();
    let from = marker.line().saturating_sub(1);
    let is_tab = |line: &str| line.trim_start_matches(' ').starts_with('\t');
    match text.lines().skip(from).take(2).position(is_tab) {
        Some(at) => YamlError::new(from + at + 1, "not YAML: indent with spaces, not with tabs"),
        None => {
            let text = format!("not YAML: {} (column {})", error.info(), marker.col() + 1);
            YamlError::new(marker.line(), text)
        }
    }
}

impl Value {
    /// Returns the scalar as written in the file; empty for other values.
    pub(super) fn as_written(&self) -> &str {
        match self {
            Self::Text(text) => text,
            Self::Null | Self::List(_) | Self::Map(_) => "",
        }
    }

    /// Returns the kind of the value for error messages.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Null => "empty",
            Self::Text(_) => "a string",
            Self::List(_) => "a list",
            Self::Map(_) => "a map",
        }
    }
}

/// Parses `text` as a single document; an empty one is `Null`.
pub(super) fn parse(text: &str) -> Result<Rc<Node>, YamlError> {
    let mut builder =
        TreeBuilder { text, events: Parser::new_from_str(text), anchors: HashMap::new(), nodes: 0 };
    let mut root = None;
    while let Some((event, line)) = builder.next()? {
        match event {
            Event::StreamStart | Event::DocumentEnd | Event::StreamEnd | Event::Nothing => {}
            Event::DocumentStart(_) if root.is_some() => {
                return Err(YamlError::new(
                    line,
                    "a second document starts here: a file must have only one",
                ));
            }
            Event::DocumentStart(_) => {}
            event => root = Some(builder.node(event, line, 0)?.0),
        }
    }
    Ok(root.unwrap_or_else(|| Rc::new(Node { line: 1, value: Value::Null })))
}

struct TreeBuilder<'a> {
    text: &'a str,
    events: Parser<'a, saphyr_parser::StrInput<'a>>,
    /// The nodes of anchors, with the number of their descendants.
    anchors: HashMap<usize, (Rc<Node>, usize)>,
    nodes: usize,
}

impl<'a> TreeBuilder<'a> {
    fn next(&mut self) -> Result<Option<(Event<'a>, usize)>, YamlError> {
        match self.events.next() {
            Some(Ok((event, span))) => Ok(Some((event, span.start.line()))),
            Some(Err(error)) => Err(syntax_error(self.text, &error)),
            None => Ok(None),
        }
    }

    /// Builds the node that starts with `event`. Returns it with its number of nodes.
    fn node(
        &mut self,
        event: Event<'a>,
        line: usize,
        depth: usize,
    ) -> Result<(Rc<Node>, usize), YamlError> {
        if depth > MAX_DEPTH {
            return Err(YamlError::new(line, format!("more than {MAX_DEPTH} levels")));
        }
        let before = self.nodes;
        self.count(1, line)?;
        let (value, anchor) = match event {
            Event::Scalar(text, style, anchor, _) => (scalar(&text, style), anchor),
            Event::SequenceStart(anchor, _) => (self.list(line, depth)?, anchor),
            Event::MappingStart(anchor, _) => (self.map(line, depth)?, anchor),
            Event::Alias(anchor) => {
                let Some((node, size)) = self.anchors.get(&anchor).cloned() else {
                    return Err(YamlError::new(line, "an alias inside of its own anchor"));
                };
                self.count(size, line)?;
                return Ok((node, size + 1));
            }
            _ => return Err(YamlError::new(line, "not YAML: a value is missing")),
        };
        let (node, size) = (Rc::new(Node { line, value }), self.nodes - before);
        if anchor > 0 {
            self.anchors.insert(anchor, (Rc::clone(&node), size));
        }
        Ok((node, size))
    }

    fn count(&mut self, nodes: usize, line: usize) -> Result<(), YamlError> {
        self.nodes = self.nodes.saturating_add(nodes);
        if self.nodes > MAX_NODES {
            return Err(YamlError::new(line, format!("more than {MAX_NODES} values in one file")));
        }
        Ok(())
    }

    fn list(&mut self, line: usize, depth: usize) -> Result<Value, YamlError> {
        let mut items = Vec::new();
        loop {
            match self.next()? {
                Some((Event::SequenceEnd, _)) => return Ok(Value::List(items)),
                Some((event, line)) => items.push(self.node(event, line, depth + 1)?.0),
                None => return Err(YamlError::new(line, "not YAML: the list has no end")),
            }
        }
    }

    fn map(&mut self, line: usize, depth: usize) -> Result<Value, YamlError> {
        let mut entries: Vec<(Key, Rc<Node>)> = Vec::new();
        let mut merged = Vec::new();
        loop {
            let (key, key_line) = match self.next()? {
                Some((Event::MappingEnd, _)) => break,
                Some((event, line)) => (self.node(event, line, depth + 1)?.0, line),
                None => return Err(YamlError::new(line, "not YAML: the map has no end")),
            };
            let Value::Text(name) = &key.value else {
                let text = format!("a key is {}, but must be a string", key.value.kind());
                return Err(YamlError::new(key_line, text));
            };
            let Some((event, value_line)) = self.next()? else {
                return Err(YamlError::new(key_line, "not YAML: a value is missing"));
            };
            let value = self.node(event, value_line, depth + 1)?.0;
            if name == "<<" {
                merge(&value, &mut merged)?;
            } else {
                entries.push((Key { line: key_line, name: name.clone() }, value));
            }
        }
        // The map's own keys override merged ones.
        for (key, value) in merged {
            if !entries.iter().any(|(known, _)| known.name == key.name) {
                entries.push((key, value));
            }
        }
        Ok(Value::Map(entries))
    }
}

/// Adds the entries of a merge key, `<<: value`.
fn merge(value: &Node, merged: &mut Vec<(Key, Rc<Node>)>) -> Result<(), YamlError> {
    match &value.value {
        Value::Map(entries) => merged.extend(entries.iter().cloned()),
        Value::List(maps) => {
            for map in maps {
                let Value::Map(entries) = &map.value else {
                    return Err(YamlError::new(map.line, "<< requires a map or a list of maps"));
                };
                merged.extend(entries.iter().cloned());
            }
        }
        Value::Null | Value::Text(_) => {
            return Err(YamlError::new(value.line, "<< requires a map or a list of maps"));
        }
    }
    Ok(())
}

fn scalar(text: &str, style: ScalarStyle) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" if style == ScalarStyle::Plain => Value::Null,
        text => Value::Text(text.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_line_numbers_and_duplicate_keys_are_kept() {
        let root = parse("a: 1\nb:\n  - x\n  - 'null'\na: ~\n").unwrap();
        let Value::Map(entries) = &root.value else { panic!("{root:?}") };
        let lines: Vec<_> = entries.iter().map(|(key, _)| (key.name.as_str(), key.line)).collect();
        assert_eq!(lines, [("a", 1), ("b", 2), ("a", 5)]);
        let Value::List(items) = &entries[1].1.value else { panic!("{entries:?}") };
        assert_eq!(items[1].line, 4);
        assert!(matches!(&items[1].value, Value::Text(text) if text == "null"));
        assert!(matches!(entries[2].1.value, Value::Null));
    }

    #[test]
    fn aliases_and_merges_are_expanded_within_limits() {
        let root = parse("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n").unwrap();
        let Value::Map(entries) = &root.value else { panic!("{root:?}") };
        let Value::Map(merged) = &entries[1].1.value else { panic!("{entries:?}") };
        let merged: Vec<_> = merged.iter().map(|(key, node)| (&*key.name, &node.value)).collect();
        assert!(matches!(&merged[..], [("y", Value::Text(y)), ("x", Value::Text(_))] if y == "3"));
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..9 {
            let aliases = vec![format!("*a{}", level - 1); 9].join(", ");
            bomb.push_str(&format!("a{level}: &a{level} [{aliases}]\n"));
        }
        assert!(parse(&bomb).unwrap_err().text.contains("more than 100000 values"));
        let deep = format!("{}{}", "[".repeat(40), "]".repeat(40));
        assert!(parse(&deep).unwrap_err().text.contains("levels"));
    }

    #[test]
    fn invalid_yaml_is_rejected_with_its_line() {
        for (text, line) in
            [("a: 1\nb: [\n", 3), ("a: 1\n\tb: 2\n", 2), ("a\n---\nb\n", 2), ("{[a]: 1}", 1)]
        {
            let error = parse(text).unwrap_err();
            assert_eq!(error.line, line, "{text:?}: {error:?}");
        }
        assert!(matches!(parse("").unwrap().value, Value::Null));
    }
}
