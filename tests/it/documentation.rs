//! README and docs: their commands run, their links work, the tests that they name exist, and the settings are complete.

mod console;
mod page;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use gateway::config::settings::{Role, SETTINGS, Setting};

use self::console::Workspace;
use self::page::Page;

const MAX_README_WORDS: usize = 700;
const MAX_IMAGE_BYTES: u64 = 150_000;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<_> = entries
        .flat_map(|path| if path.is_dir() { files(&path, extension) } else { vec![path] })
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect();
    found.sort();
    found
}

/// All pages for readers, with their paths relative to the root.
fn pages() -> Vec<Page> {
    let root_pages =
        ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"];
    let mut paths: Vec<PathBuf> = root_pages.iter().map(|name| root().join(name)).collect();
    paths.extend(files(&root().join("docs"), "md"));
    paths.push(root().join("chart/gateway/README.md"));
    paths.iter().map(|path| Page::read(root(), path)).collect()
}

#[test]
fn console_blocks_run() {
    let mut wrong = Vec::new();
    for page in pages() {
        let mut workspace = Workspace::new(root());
        for block in page.blocks() {
            wrong.extend(
                workspace
                    .run(&block)
                    .err()
                    .map(|error| format!("{}:{}: {error}", page.name, block.line)),
            );
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn links_lead_somewhere() {
    let mut wrong = Vec::new();
    for page in pages() {
        for link in page.links() {
            let (path, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = match path {
                "" => root().join(&page.name),
                path => root().join(&page.name).parent().unwrap().join(path),
            };
            let found = match anchor {
                "" => target.exists(),
                anchor => {
                    target.is_file()
                        && Page::read(root(), &target).anchors().iter().any(|one| one == anchor)
                }
            };
            if !found {
                wrong.push(format!("{}: {link}", page.name));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Each claim of the README's comparison names a test: a file or a function of tests/it.
#[test]
fn tests_named_in_the_readme_exist() {
    let sources = files(&root().join("tests/it"), "rs");
    let code: String = sources.iter().map(|path| fs::read_to_string(path).unwrap()).collect();
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let cells = readme
        .lines()
        .filter(|line| line.starts_with('|'))
        .flat_map(|line| line.split('|').skip(2).take(1));
    let claims: Vec<&str> = cells.filter(|cell| cell.contains('✔')).collect();
    assert!(claims.len() > 5, "{claims:?}");
    for claim in claims {
        let name = claim.split('`').nth(1).unwrap_or_else(|| panic!("{claim} names no test"));
        let is_file = sources.iter().any(|path| path.file_stem().is_some_and(|stem| stem == name));
        assert!(is_file || code.contains(&format!("fn {name}(")), "there is no test {name}");
    }
}

/// Filters of the log name crates and modules, such as `gateway_queue=debug`.
#[test]
fn modules_named_in_log_filters_exist() {
    for page in pages() {
        for filter in
            page.text.split("gateway_").skip(1).filter_map(|rest| rest.split_once("=debug"))
        {
            let (name, _) = filter;
            if !name.chars().all(|c| c.is_alphanumeric() || c == '_' || c == ':') {
                continue;
            }
            let (package, module) = name.split_once("::").unwrap_or((name, "lib"));
            let source = root().join("crates").join(package).join("src");
            let file = source.join(module).with_extension("rs");
            assert!(file.exists(), "{} names gateway_{name}", page.name);
        }
    }
}

/// The table in ARCHITECTURE.md lists all modules of all crates and no others.
#[test]
fn the_table_of_modules_is_complete() {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let table = text.split("## Crates").nth(1).unwrap().split("\n## ").next().unwrap();
    let mut listed = BTreeSet::new();
    for row in table.lines().filter(|line| line.contains(" | `")) {
        let mut cells = row.trim_matches('|').split(" | ").map(str::trim);
        let package = cells.next().unwrap().to_owned();
        for module in cells.next().unwrap().split(", ") {
            listed.insert((package.clone(), module.trim_matches('`').to_owned()));
        }
    }
    let packages = fs::read_dir(root().join("crates")).unwrap().map(|entry| entry.unwrap().path());
    let mut existing = BTreeSet::new();
    for package in packages.chain([root().to_owned()]) {
        let name = match package == root() {
            true => "gateway".to_owned(),
            false => package.file_name().unwrap().to_string_lossy().into_owned(),
        };
        let lib = fs::read_to_string(package.join("src/lib.rs")).unwrap();
        for line in lib.lines().filter(|line| !line.contains("mod fuzz")) {
            let line = line.trim_start_matches("pub(crate) ").trim_start_matches("pub ");
            if let Some(module) = line.strip_prefix("mod ").and_then(|line| line.strip_suffix(';'))
            {
                existing.insert((name.clone(), module.to_owned()));
            }
        }
    }
    listed.remove(&("base".to_owned(), "fuzzing".to_owned()));
    assert_eq!(listed, existing);
}

/// The recipes of CONTRIBUTING.md name files in backticks.
#[test]
fn paths_named_for_contributors_exist() {
    let text = fs::read_to_string(root().join("CONTRIBUTING.md")).unwrap();
    let prefixes = ["src/", "crates/", "tests/", "docs/", "chart/", "fuzz/"];
    let named = text.split('`').skip(1).step_by(2);
    for path in named.filter(|name| prefixes.iter().any(|prefix| name.starts_with(prefix))) {
        assert!(root().join(path).exists(), "CONTRIBUTING.md names {path}");
    }
}

#[test]
fn the_readme_is_short() {
    let words = Page::read(root(), &root().join("README.md")).words();
    assert!(words <= MAX_README_WORDS, "README.md has {words} words outside code and tables");
    for image in files(&root().join("docs"), "png") {
        let size = fs::metadata(&image).unwrap().len();
        assert!(size <= MAX_IMAGE_BYTES, "{} has {size} bytes", image.display());
    }
}

/// `UPDATE_DOCS=1 cargo test --test it settings_page` writes the page.
#[test]
fn the_settings_page_is_current() {
    let path = root().join("docs/SETTINGS.md");
    let current = settings_page();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, &current).unwrap();
    }
    let stored = fs::read_to_string(&path).unwrap_or_default();
    assert!(stored == current, "docs/SETTINGS.md is stale: run `make settings`");
}

fn settings_page() -> String {
    let mut text = String::from(
        "# Settings\n\n\
         Each setting is an environment variable, and a flag of the same name with dashes (`--read-timeout 10s`). The \
         flag has precedence.\n\
         Durations are those of Go (`1m30s`, `700ms`), or whole seconds. Booleans are `true` and `false`, or `1` and `0`.\n\
         `gateway COMMAND --help` shows the settings of a role.\n\
         A value that cannot be parsed stops the start, with one line for each of them, and exit status 64.\n\n\
         This page is generated from `src/config/settings.rs` by `make settings`.\n",
    );
    let mut groups: Vec<&str> = Vec::new();
    for setting in SETTINGS {
        if !groups.contains(&setting.group) {
            groups.push(setting.group);
        }
    }
    for group in groups {
        text.push_str(&format!(
            "\n## {group}\n\n| setting | default | roles | meaning |\n|---|---|---|---|\n"
        ));
        SETTINGS
            .iter()
            .filter(|setting| setting.group == group)
            .for_each(|setting| text.push_str(&row(setting)));
    }
    text
}

fn row(setting: &Setting) -> String {
    let default = if setting.default.is_empty() {
        "–".to_owned()
    } else {
        format!("`{}`", setting.default)
    };
    let roles = setting.roles.iter().map(|role| match role {
        Role::Serve => "serve",
        Role::Worker => "worker",
        Role::Provider => "provider",
        Role::Up => "up",
    });
    let roles: Vec<_> = roles.collect();
    let about = setting.help.replace('*', "\\*").replace('|', "\\|");
    format!("| `{}` | {default} | {} | {about} |\n", setting.name, roles.join(", "))
}
