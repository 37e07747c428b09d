//! What the fuzzer checks of stack files.

use std::io;
use std::path::Path;

use crate::stack::{Source, parse};

/// A stack file is read, or refused with messages that say something: nothing of it is left out without a word.
pub(crate) fn stack_file(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let var = |name: &str| (name == "HOME").then(|| "/home".to_owned());
    let read = |_: &Path| Err(io::ErrorKind::NotFound.into());
    let stack = parse(text, &Source { directory: Path::new("/"), var: &var, read: &read });
    assert!(stack.functions.iter().all(|function| !function.env_process.trim().is_empty()));
    assert!(stack.is_readable || !stack.mistakes.is_empty());
    assert!(stack.faulty.is_empty() || !stack.mistakes.is_empty());
    for mistake in &stack.mistakes {
        assert!(mistake.line > 0 && !mistake.text.is_empty(), "{mistake:?}");
    }
}
