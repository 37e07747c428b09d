//! What the fuzzer checks of stack files.

/// A stack file is read, or refused with a message of one line that says something.
pub(crate) fn stack_file(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match crate::stack::parse(text) {
        Ok(functions) => assert!(functions.iter().all(|it| !it.env_process.trim().is_empty())),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
