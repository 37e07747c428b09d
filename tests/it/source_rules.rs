//! Rules that hold for all sources of the project.

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

#[test]
fn no_source_file_exceeds_the_line_limit() {
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

#[test]
fn comments_and_documents_avoid_words_with_a_plainer_equivalent() {
    let directories = ["src", "tests/it"].map(|name| root().join(name));
    let sources = directories.iter().flat_map(|directory| rust_files(directory));
    let comments = sources.map(|path| {
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
