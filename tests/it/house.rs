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

#[test]
fn every_setting_is_in_the_readme_with_its_default() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    for setting in SETTINGS {
        let told = readme.lines().filter(|line| line.starts_with('|')).any(|row| {
            row.contains(&format!("`{}`", setting.name)) && row.contains(setting.default)
        });
        assert!(told, "README.md has no row with {} and {:?}", setting.name, setting.default);
    }
}
