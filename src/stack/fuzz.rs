//! Fuzz target of stack files.

use std::io;
use std::path::Path;

use crate::stack::{Source, parse};

/// Checks that a stack file is parsed, or rejected with error messages: no part is ignored silently.
pub(crate) fn stack_file(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let var = |name: &str| (name == "HOME").then(|| "/home".to_owned());
    let read = |_: &Path| Err(io::ErrorKind::NotFound.into());
    let stack = parse(text, &Source { directory: Path::new("/"), var: &var, read: &read });
    assert!(stack.functions.iter().all(|function| !function.env_process.trim().is_empty()));
    assert!(stack.is_readable || !stack.errors.is_empty());
    assert!(stack.invalid.is_empty() || !stack.errors.is_empty());
    for error in &stack.errors {
        assert!(error.line > 0 && !error.text.is_empty(), "{error:?}");
    }
}
