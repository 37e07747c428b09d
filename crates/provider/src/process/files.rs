//! Atomic, durable changes of files: after a crash a file has either its old or its new content.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// Name prefix of a file that is being written. Names of stored files never begin with a dot.
const TEMPORARY_PREFIX: &str = ".unfinished-";

/// Replaces `path` by a file with `bytes` that only this user may read. Synced to disk on return.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let (Some(directory), Some(name)) = (path.parent(), path.file_name().and_then(|n| n.to_str()))
    else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    create_private_directory(directory)?;
    let unfinished = directory.join(format!("{TEMPORARY_PREFIX}{name}"));
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&unfinished, path)?;
    sync_directory(directory)
}

/// Removes `path`. Synced to disk on return.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    fs::remove_file(path)?;
    path.parent().map_or(Ok(()), sync_directory)
}

/// Creates a directory and its parents, accessible only for this user.
pub(super) fn create_private_directory(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    path.parent().map_or(Ok(()), sync_directory)
}

/// Returns the sorted names of files in a directory; empty if it does not exist. Removes unfinished files.
pub(super) fn file_names(directory: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry?;
        match entry.file_name().into_string() {
            Ok(name) if name.starts_with(TEMPORARY_PREFIX) => fs::remove_file(entry.path())?,
            Ok(name) if !name.starts_with('.') => names.push(name),
            // Not written by this module.
            Ok(_) | Err(_) => {}
        }
    }
    names.sort();
    Ok(names)
}

fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_replaced_file_is_private() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a/b/file");
        replace(&path, b"one").unwrap();
        replace(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().unwrap()), 0o700);
        remove(&path).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn unfinished_files_are_removed() {
        let root = tempfile::tempdir().unwrap();
        replace(&root.path().join("kept"), b"").unwrap();
        let unfinished = root.path().join(".unfinished-kept");
        fs::write(&unfinished, b"torn").unwrap();
        assert_eq!(file_names(root.path()).unwrap(), ["kept"]);
        assert!(!unfinished.exists());
        assert!(file_names(&root.path().join("missing")).unwrap().is_empty());
    }
}
