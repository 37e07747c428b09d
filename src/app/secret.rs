//! `gateway secret set`: writes a secret to the state directory of a provider on this machine.

use std::io::{self, Read};
use std::path::Path;

use anyhow::{Context, bail};

use gateway_provider::process;

/// Maximum size of a secret's value.
const MAX_VALUE_BYTES: u64 = 1 << 20;

/// Sets the secret `name` to the content of `from_file`, or of standard input.
///
/// # Errors
/// When the value cannot be read, is empty or too long, or the secret cannot be written.
pub(super) fn set(
    state_dir: &Path,
    namespace: &str,
    name: &str,
    from_file: Option<&Path>,
) -> anyhow::Result<()> {
    let value = match from_file {
        Some(path) => std::fs::File::open(path)
            .and_then(read)
            .with_context(|| format!("cannot read {}", path.display()))?,
        None => {
            let value = read(io::stdin().lock()).context("cannot read standard input")?;
            without_line_break(value)
        }
    };
    if value.is_empty() {
        bail!("the value is empty: give it on standard input, or with --from-file");
    }
    if value.len() as u64 > MAX_VALUE_BYTES {
        bail!("the value has more than {MAX_VALUE_BYTES} bytes");
    }
    let is_new = process::set_secret(state_dir, namespace, name, &value)?;
    let done = if is_new { "Created" } else { "Changed" };
    eprintln!("{done} secret {name} in {}", state_dir.display());
    Ok(())
}

/// Reads at most one byte more than the maximum, so that a longer value is noticed.
fn read(source: impl Read) -> io::Result<Vec<u8>> {
    let mut value = Vec::new();
    source.take(MAX_VALUE_BYTES + 1).read_to_end(&mut value)?;
    Ok(value)
}

/// Removes one final line break: `echo` and terminals append one that is not part of the value.
fn without_line_break(mut value: Vec<u8>) -> Vec<u8> {
    if value.last() == Some(&b'\n') {
        value.pop();
        if value.last() == Some(&b'\r') {
            value.pop();
        }
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_final_line_break_is_removed() {
        for (given, expect) in
            [("a\n", "a"), ("a\r\n", "a"), ("a\n\n", "a\n"), ("a", "a"), ("", "")]
        {
            assert_eq!(without_line_break(given.into()), expect.as_bytes(), "{given:?}");
        }
    }
}
