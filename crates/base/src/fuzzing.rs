//! Seeds of fuzz targets. Each crate lists its targets in its module `fuzzing`, and its tests replay their seeds.

use std::fs;
use std::path::Path;

/// Parses the bytes, and panics when a property of the parser does not hold.
pub type Target = fn(&[u8]);

/// Minimum number of seeds of a target.
const MIN_SEEDS: usize = 5;

/// Runs each of `targets` with the seeds of its file in `directory`, and with every prefix of a seed.
///
/// # Errors
/// A file cannot be read or parsed, a target has too few seeds, or a file has no target.
pub fn replay(directory: &Path, targets: &[(&str, Target)]) -> Result<(), String> {
    for (name, target) in targets {
        let path = directory.join(format!("{name}.txt"));
        let file =
            fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let seeds = seeds(&file)?;
        if seeds.len() < MIN_SEEDS {
            return Err(format!("{name} has {} seeds", seeds.len()));
        }
        for seed in seeds {
            (0..=seed.len()).for_each(|length| target(&seed[..length]));
        }
    }
    let entries = fs::read_dir(directory).map_err(|error| error.to_string())?;
    for entry in entries {
        let name = entry.map_err(|error| error.to_string())?.file_name();
        let name = name.to_string_lossy();
        let stem = name.strip_suffix(".txt").unwrap_or(&name);
        if !targets.iter().any(|(target, _)| *target == stem) {
            return Err(format!("{name} has no target"));
        }
    }
    Ok(())
}

/// Parses a seed file: one input per line, with `\r`, `\n`, `\t`, `\\` and `\xNN` as escapes. Lines that start with `#`
/// are comments.
///
/// # Errors
/// The first line with an invalid escape.
pub fn seeds(file: &str) -> Result<Vec<Vec<u8>>, String> {
    let lines = file.lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| unescape(line).ok_or_else(|| line.to_owned())).collect()
}

fn unescape(line: &str) -> Option<Vec<u8>> {
    let (mut bytes, mut rest) = (Vec::with_capacity(line.len()), line.as_bytes());
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        if *byte != b'\\' {
            bytes.push(*byte);
            continue;
        }
        let (escape, after) = rest.split_first()?;
        rest = after;
        bytes.push(match escape {
            b'r' => b'\r',
            b'n' => b'\n',
            b't' => b'\t',
            b'\\' => b'\\',
            b'x' => {
                let (digits, after) = rest.split_first_chunk::<2>()?;
                rest = after;
                u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?
            }
            _ => return None,
        });
    }
    Some(bytes)
}

/// The targets of this crate.
#[cfg(any(test, fuzzing))]
pub const TARGETS: &[(&str, Target)] =
    &[("base_url", crate::fuzz::base_url), ("duration", crate::fuzz::duration)];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_accepts_its_seeds_and_their_prefixes() {
        let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/base");
        replay(&seeds, TARGETS).unwrap();
    }
    #[test]
    fn seeds_can_contain_any_byte() {
        let read = seeds("# a comment\na\\r\\n\\t\\\\\\x00\\xffb\n\n").unwrap();
        assert_eq!(read, [b"a\r\n\t\\\x00\xffb".to_vec(), Vec::new()]);
        assert_eq!(seeds("fine\n\\q"), Err("\\q".to_owned()));
    }
}
