//! What holds for the source as a whole.

use std::fs;
use std::path::{Path, PathBuf};

use gateway::config::settings::SETTINGS;

/// A file longer than this is one a reader dreads.
const LONGEST: usize = 500;

fn sources(under: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(under).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
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
    for path in sources(&root().join("src")) {
        let lines = fs::read_to_string(&path).unwrap().lines().count();
        assert!(lines <= LONGEST, "{} has {lines} lines", path.display());
    }
    for (path, most) in [("src/main.rs", 60), ("src/lib.rs", 60), ("ARCHITECTURE.md", 200)] {
        let lines = fs::read_to_string(root().join(path)).unwrap().lines().count();
        assert!(lines <= most, "{path} has {lines} lines");
    }
}

/// What is shared by the whole process belongs to a value that `app` creates: two gateways in one process must not share
/// a limit. The values that a thread has of its own save work and limit nothing.
#[test]
fn there_is_no_mutable_global() {
    const ALLOWED: &[&str] = &["ALLOCATOR", "POLLED", "HEARD", "LENT"];
    for path in sources(&root().join("src")) {
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

#[test]
fn every_setting_is_in_the_readme_with_its_default() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let rows: Vec<Vec<&str>> = readme
        .lines()
        .filter(|line| line.starts_with('|'))
        .map(|line| line.split('|').map(str::trim).collect())
        .collect();
    for setting in SETTINGS {
        let name = format!("`{}`", setting.name);
        // Settings that belong together share a row: `a`, `b` | 1, 2.
        let defaults: Vec<&str> = rows
            .iter()
            // Of three columns: what functions are set by has two.
            .filter(|cells| cells.len() == 5 && cells[1].starts_with('`'))
            .filter_map(|cells| {
                let at = cells[1].split(", ").position(|cell| cell == name)?;
                cells[2].split(", ").nth(at).or_else(|| cells[2].split(", ").last())
            })
            .collect();
        let [told] = defaults[..] else {
            panic!("{name} is in {} rows of README.md", defaults.len())
        };
        let empty = setting.default.is_empty() && ["–", "the provider"].contains(&told);
        assert!(told == setting.default || empty, "{name}: {told:?} is not {:?}", setting.default);
    }
}
