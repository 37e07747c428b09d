//! Rules that hold for all sources of the project.

mod locks;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Maximum number of lines of a source file.
const MAX_LINES: usize = 500;

/// Words that have a plainer equivalent. They are avoided in comments and documents.
const AVOIDED_WORDS: [&str; 8] =
    ["whoever", "lest", "somebody", "anybody", "so many", "anew", "taken in", "made again"];

/// Returns all files with `extension` in `directory` and below it, except for hidden and generated directories.
fn files(directory: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy();
        if name.starts_with('.') || name == "target" || name == "node_modules" {
            continue;
        }
        if path.is_dir() {
            found.extend(files(&path, extension));
        } else if path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
    found
}

fn rust_files(directory: &Path) -> Vec<PathBuf> {
    files(directory, "rs")
}

/// Returns the text of the `//` comments of a source, without the markers at the beginning of lines.
fn comments(source: &str) -> String {
    let lines = source.lines().filter_map(|line| {
        let start = line.find("//")?;
        let is_comment = start == 0 || line[..start].ends_with(char::is_whitespace);
        is_comment.then(|| line[start..].trim_start_matches(['/', '!']))
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// Returns the words of `text` in lower case, each with a space before and after it.
fn words(text: &str) -> String {
    let words = text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty());
    words.fold(" ".to_owned(), |all, word| all + &word.to_lowercase() + " ")
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Returns the directories of all packages.
fn packages() -> impl Iterator<Item = PathBuf> {
    let crates = fs::read_dir(root().join("crates")).unwrap().map(|entry| entry.unwrap().path());
    crates.chain([root().to_owned()])
}

/// Returns the Rust files of all packages, without those of tests in directories of their own.
fn package_files() -> Vec<PathBuf> {
    packages().flat_map(|directory| rust_files(&directory.join("src"))).collect()
}

fn source_files() -> Vec<PathBuf> {
    let tests = rust_files(&root().join("tests/it"));
    package_files().into_iter().chain(tests).collect()
}

#[test]
fn no_source_file_exceeds_the_line_limit() {
    for path in source_files() {
        let lines = fs::read_to_string(&path).unwrap().lines().count();
        assert!(lines <= MAX_LINES, "{} has {lines} lines", path.display());
    }
    let crates = packages().map(|directory| directory.join("src/lib.rs"));
    let tables = crates.chain([root().join("src/main.rs")]).map(|path| (path, 60));
    for (path, limit) in tables.chain([(root().join("ARCHITECTURE.md"), 200)]) {
        let lines = fs::read_to_string(&path).unwrap().lines().count();
        assert!(lines <= limit, "{} has {lines} lines", path.display());
    }
}

/// State of the whole process belongs to a value that `app` creates, because two gateways in one process must not share
/// a limit. The allowed thread-local values are caches: they limit nothing.
#[test]
fn there_is_no_mutable_global() {
    const ALLOWED: &[&str] = &["ALLOCATOR", "CURRENT_POLL", "WOKEN_DURING_POLL", "POOL"];
    for path in package_files() {
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

/// The rows of the picture of crates in ARCHITECTURE.md, from top to bottom.
fn crate_rows() -> Vec<Vec<String>> {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let picture = text.split("## Crates\n\n```\n").nth(1).unwrap().split("```").next().unwrap();
    let names = |line: &str| {
        let line = line.split("    ").next().unwrap_or_default().to_owned();
        line.split_whitespace().map(str::to_owned).collect()
    };
    picture.lines().map(names).collect()
}

#[test]
fn a_crate_depends_only_on_crates_in_rows_below_its_own() {
    let output = std::process::Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline", "--locked"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let rows = crate_rows();
    let row_of: HashMap<&str, usize> = rows
        .iter()
        .enumerate()
        .flat_map(|(row, names)| names.iter().map(move |name| (name.as_str(), row)))
        .collect();
    let packages = metadata["packages"].as_array().unwrap();
    assert_eq!(packages.len(), row_of.len(), "the picture has other crates: {rows:?}");
    for package in packages {
        let name = package["name"].as_str().unwrap().trim_start_matches("gateway-");
        let row = row_of.get(name).unwrap_or_else(|| panic!("the picture has no crate {name}"));
        for dependency in package["dependencies"].as_array().unwrap() {
            let dependency = dependency["name"].as_str().unwrap();
            if let Some(below) = dependency.strip_prefix("gateway-") {
                assert!(row_of[below] > *row, "{name} depends on {below}");
            }
        }
    }
}

#[test]
fn comments_and_documents_avoid_words_with_a_plainer_equivalent() {
    let comments = source_files().into_iter().map(|path| {
        let source = fs::read_to_string(&path).unwrap();
        (path, words(&comments(&source)))
    });
    let documents = files(root(), "md").into_iter().map(|path| {
        let text = fs::read_to_string(&path).unwrap();
        (path, words(&text))
    });
    for (path, text) in comments.chain(documents) {
        for word in AVOIDED_WORDS {
            assert!(!text.contains(&format!(" {word} ")), "{}: {word:?}", path.display());
        }
    }
}
