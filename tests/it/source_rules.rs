//! Rules that hold for all sources of the project.

use std::fs;
use std::path::{Path, PathBuf};

/// Maximum number of lines of a source file.
const MAX_LINES: usize = 500;

/// Returns all Rust files in `directory` and below it.
fn rust_files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(rust_files(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
    found
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn no_source_file_is_too_long() {
    let directories = ["src", "tests/it"].map(|name| root().join(name));
    for path in directories.iter().flat_map(|directory| rust_files(directory)) {
        let lines = fs::read_to_string(&path).unwrap().lines().count();
        assert!(lines <= MAX_LINES, "{} has {lines} lines", path.display());
    }
    for (path, limit) in [("src/main.rs", 60), ("src/lib.rs", 60), ("ARCHITECTURE.md", 200)] {
        let lines = fs::read_to_string(root().join(path)).unwrap().lines().count();
        assert!(lines <= limit, "{path} has {lines} lines");
    }
}

/// State of the whole process belongs to a value that `app` creates, because two gateways in one process must not share
/// a limit. The allowed thread-local values are caches: they limit nothing.
#[test]
fn there_is_no_mutable_global() {
    const ALLOWED: &[&str] = &["ALLOCATOR", "CURRENT_POLL", "WOKEN_DURING_POLL", "POOL"];
    for path in rust_files(&root().join("src")) {
        let source = fs::read_to_string(&path).unwrap();
        for line in source.lines().map(str::trim_start) {
            let item = line.split_once("static ").filter(|(before, _)| {
                before.is_empty() || before.starts_with("pub") && !before.contains(['"', '\''])
            });
            let Some((name, kind)) = item.and_then(|(_, item)| item.split_once(':')) else {
                continue;
            };
            // Tables of constants.
            let is_table = kind.trim_start().starts_with("[HeaderName; ");
            assert!(is_table || ALLOWED.contains(&name), "{}: {line}", path.display());
        }
    }
}
