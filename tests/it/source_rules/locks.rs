//! docs/LOCKS.md names every lock of the program and no other, the comments at the locks agree with it, and all locks
//! are acquired by `base::sync`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::{package_files, root};

/// A file as docs/LOCKS.md names it, and the name of a field, variant or type in it.
type Place = (String, String);

/// The code of all files without their tests, by the names of docs/LOCKS.md.
fn product_sources() -> BTreeMap<String, String> {
    let sources: Vec<(PathBuf, String)> = package_files()
        .into_iter()
        .map(|path| {
            (path.strip_prefix(root()).unwrap().to_owned(), fs::read_to_string(&path).unwrap())
        })
        .collect();
    let tests: Vec<PathBuf> =
        sources.iter().flat_map(|(path, source)| test_modules(path, source)).collect();
    let is_test = |path: &Path| {
        tests.iter().any(|module| path.with_extension("") == *module || path.starts_with(module))
    };
    let product = sources.into_iter().filter(|(path, _)| !is_test(path));
    product
        .map(|(path, source)| {
            let code = source.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
            (name_of(&path), code.to_owned())
        })
        .collect()
}

/// The modules in files of their own that a source declares for tests only, as paths without an extension.
fn test_modules(path: &Path, source: &str) -> Vec<PathBuf> {
    let is_root = path.ends_with("lib.rs") || path.ends_with("main.rs");
    let folder = if is_root { path.parent().unwrap().to_owned() } else { path.with_extension("") };
    let declared = source.split("#[cfg(test)]\nmod ").skip(1);
    let names = declared.filter_map(|rest| rest.split_once(';')).map(|(name, _)| name);
    let names = names.filter(|name| name.chars().all(|c| c.is_alphanumeric() || c == '_'));
    names.map(|name| folder.join(name)).collect()
}

/// `crates/http/src/interim.rs` is `http/interim.rs`, `src/app.rs` is `gateway/app.rs`.
fn name_of(path: &Path) -> String {
    let path = path.to_str().unwrap();
    match path.strip_prefix("crates/").and_then(|path| path.split_once("/src/")) {
        Some((package, file)) => format!("{package}/{file}"),
        None => path.replacen("src/", "gateway/", 1),
    }
}

/// The name that a line of code declares for a lock: a field, a variant, a tuple struct or a type alias. `None` if the
/// line only uses the type.
fn declared_name(line: &str) -> Option<&str> {
    let line = line.trim_start();
    let uses = ["fn ", "let ", "impl ", "impl<", "::<", ": &"];
    if line.starts_with("//") || uses.iter().any(|part| line.contains(part)) {
        return None;
    }
    let item = match line.strip_prefix("pub").map(|rest| (rest, rest.strip_prefix('('))) {
        Some((_, Some(scope))) => scope.split_once(')').map_or(line, |(_, item)| item),
        Some((item, None)) if item.starts_with(' ') => item,
        _ => line,
    };
    let item = item.trim_start();
    let item = ["struct ", "type "].iter().find_map(|kind| item.strip_prefix(kind)).unwrap_or(item);
    item.split(|c: char| !c.is_alphanumeric() && c != '_').next().filter(|name| !name.is_empty())
}

/// The locks that a source declares, with their comments.
fn declared_locks(source: &str) -> BTreeMap<String, String> {
    let lines: Vec<&str> = source.lines().map(str::trim_start).collect();
    let mut found: BTreeMap<String, String> = BTreeMap::new();
    for (at, line) in lines.iter().enumerate() {
        if !line.contains("Mutex<") && !line.contains("RwLock<") {
            continue;
        }
        let Some(name) = declared_name(line) else { continue };
        let above = lines[..at].iter().rev();
        let above: Vec<&str> = above
            .take_while(|line| line.starts_with("///") || line.starts_with("#["))
            .copied()
            .collect();
        let comment: Vec<&str> =
            above.iter().rev().map(|line| line.trim_start_matches('/').trim()).collect();
        found.entry(name.to_owned()).or_default().push_str(&comment.join(" "));
    }
    found
}

/// The cells of the rows of the table under `heading` in docs/LOCKS.md.
fn table(heading: &str) -> Vec<Vec<String>> {
    let text = fs::read_to_string(root().join("docs/LOCKS.md")).unwrap();
    let section = text.split(&format!("## {heading}\n")).nth(1).unwrap();
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with('|')).skip(2);
    rows.map(|row| row.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect())
        .collect()
}

/// The parts of `cell` in backquotes.
fn quoted(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

/// A row of the table.
struct Row {
    places: Vec<Place>,
    rank: String,
    held: Vec<String>,
}

fn rows() -> Vec<Row> {
    let row = |cells: Vec<String>| {
        let files = cells[0].split(", ");
        let places = files
            .flat_map(|file| quoted(&cells[1]).map(move |name| (file.to_owned(), name.to_owned())));
        let held = quoted(&cells[4]).map(str::to_owned).collect();
        Row { places: places.collect(), rank: cells[3].clone(), held }
    };
    table("The table").into_iter().map(row).collect()
}

#[test]
fn the_page_of_locks_names_all_locks_and_no_other() {
    let sources = product_sources();
    let declared = sources.iter().flat_map(|(file, source)| {
        declared_locks(source).into_keys().map(move |name| (file.clone(), name))
    });
    let declared: BTreeSet<Place> = declared.collect();
    let listed: BTreeSet<Place> = rows().into_iter().flat_map(|row| row.places).collect();
    let missing: Vec<_> = declared.difference(&listed).collect();
    assert!(missing.is_empty(), "docs/LOCKS.md has no row for {missing:?}");
    let gone: Vec<_> = listed.difference(&declared).collect();
    assert!(gone.is_empty(), "docs/LOCKS.md has rows for locks that do not exist: {gone:?}");

    let uses_file_lock =
        |source: &String| source.contains("TryLockError") || source.contains("flock(");
    let locking = sources.iter().filter(|(_, source)| uses_file_lock(source));
    let locking: BTreeSet<String> = locking.map(|(file, _)| file.clone()).collect();
    let listed = table("Locks of files").into_iter().map(|cells| cells[0].clone()).collect();
    assert_eq!(locking, listed, "files that lock files, and those in docs/LOCKS.md");
}

#[test]
fn the_order_of_locks_is_consistent() {
    const RANKS: [&str; 5] = ["1", "2", "3", "4", "leaf"];
    let (sources, rows) = (product_sources(), rows());
    let order = |rank: &str| RANKS.iter().position(|known| *known == rank);
    for Row { places, rank, held } in &rows {
        let own = order(rank).unwrap_or_else(|| panic!("{places:?} has the rank {rank:?}"));
        for name in held {
            let named = rows.iter().filter(|row| row.places.iter().any(|(_, lock)| lock == name));
            let is_lower = named.into_iter().any(|row| order(&row.rank) < Some(own));
            assert!(is_lower, "{places:?}, of rank {rank}, is acquired while {name} is held");
        }
        for (file, name) in places {
            let comment = &declared_locks(&sources[file])[name];
            let expected = if rank == "leaf" { "leaf".to_owned() } else { format!("Rank {rank}") };
            let agrees = comment.contains(&expected) || comment.starts_with("The same as");
            assert!(agrees, "{file}: the comment of {name} does not say {expected:?}: {comment:?}");
        }
    }
}

#[test]
fn locks_are_acquired_by_the_functions_of_base() {
    for (file, source) in product_sources() {
        if file == "base/sync.rs" {
            continue;
        }
        for line in source.lines() {
            // An async mutex is never poisoned. The lock of standard input belongs to std.
            let line = line.replace(".lock().await", "").replace("stdin().lock()", "");
            let is_direct = line.contains(".lock()") || line.contains("PoisonError");
            assert!(!is_direct, "{file}: use a function of gateway_base::sync: {line}");
        }
    }
}

#[test]
fn locks_are_found_in_fields_variants_and_types() {
    const SOURCE: &str = "
        /// Ports. A leaf.
        pub(super) ports: Arc<Mutex<Ports>>,
        published: Mutex<u64>,
        pub names: Option<std::sync::RwLock<Names>>,
        /// Rank 1.
        #[derive(Default)]
        pub(crate) struct Counts(Mutex<u64>);
        type Query = tokio::sync::Mutex<State>;
        Shared(Arc<Mutex<Option<u64>>>),
        // old: Mutex<u64>,
        view: &Mutex<View>,
        fn guard(lock: Mutex<u64>) -> MutexGuard<'_, u64> {
        let made = Arc::<Mutex<u64>>::default();";
    let found = declared_locks(SOURCE);
    let names: Vec<&str> = found.keys().map(String::as_str).collect();
    assert_eq!(names, ["Counts", "Query", "Shared", "names", "ports", "published"]);
    assert_eq!((found["ports"].as_str(), found["names"].as_str()), ("Ports. A leaf.", ""));
    assert!(found["Counts"].starts_with("Rank 1."), "{found:?}");
}
