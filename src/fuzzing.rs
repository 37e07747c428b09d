//! Fuzz targets: every pure parser of external input, with properties that must hold for any input.
//!
//! `fuzz/` runs them under libFuzzer. The test below replays `fuzz/seeds/` on every test run. Compiled only for tests
//! and fuzzing.

use crate::{config, proxy, queue, serve, service, stack, trace, worker};

/// Parses the bytes, and panics when a property of the parser does not hold.
pub type Target = fn(&[u8]);

/// All targets by name, which is the name of the seed file.
pub const TARGETS: &[(&str, Target)] = &[
    ("base_url", config::fuzz::base_url),
    ("callback_allowlist", config::fuzz::allow_list),
    ("callback_url", worker::fuzz::callback_url),
    ("chunked_body", proxy::fuzz::chunked_body),
    ("duration", config::fuzz::duration),
    ("embedded_batch", queue::embedded::fuzz::packed_batch),
    ("embedded_call", queue::fuzz::call),
    ("embedded_wal", queue::embedded::fuzz::wal),
    ("jetstream_batch", queue::jetstream::fuzz::batch),
    ("jetstream_message", queue::jetstream::fuzz::message),
    ("jetstream_record", queue::jetstream::fuzz::record),
    ("jetstream_subject", queue::jetstream::fuzz::subject),
    ("rejected_head", serve::refusal::fuzz::refused_head),
    ("request_head", service::fuzz::request_head),
    ("response_head", proxy::fuzz::response_head),
    ("retry_after", worker::fuzz::retry_after),
    ("stack_file", stack::fuzz::stack_file),
    ("stan_callback_url", queue::stan::fuzz::callback_url),
    ("stan_message", queue::stan::fuzz::message),
    ("trace_context", trace::fuzz::trace_context),
];

/// Returns the target called `name`.
pub fn target(name: &str) -> Option<Target> {
    TARGETS.iter().find(|(known, _)| *known == name).map(|(_, target)| *target)
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

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    fn read(name: &str) -> String {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(name);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    #[test]
    fn every_target_accepts_its_seeds_and_their_prefixes() {
        for (name, target) in TARGETS {
            let seeds = seeds(&read(&format!("{name}.txt"))).unwrap();
            assert!(seeds.len() >= 5, "{name} has {} seeds", seeds.len());
            for seed in seeds {
                (0..=seed.len()).for_each(|length| target(&seed[..length]));
            }
        }
    }

    #[test]
    fn every_seed_file_has_a_target() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds");
        for entry in fs::read_dir(directory).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let stem = name.strip_suffix(".txt").unwrap_or(&name);
            assert!(target(stem).is_some(), "{name} has no target");
        }
    }

    #[test]
    fn seeds_can_contain_any_byte() {
        let read = seeds("# a comment\na\\r\\n\\t\\\\\\x00\\xffb\n\n").unwrap();
        assert_eq!(read, [b"a\r\n\t\\\x00\xffb".to_vec(), Vec::new()]);
        assert_eq!(seeds("fine\n\\q"), Err("\\q".to_owned()));
    }
}
