//! Finds programs in a PATH.

use std::path::{Path, PathBuf};

use rustix::fs::Access;

/// The PATH of one who has none.
pub(super) const DEFAULT_PATH: &str =
    "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The file that running `program` would run: itself if it holds a slash, else the first in `path`.
pub(super) fn find_program(program: &str, path: &str) -> Option<PathBuf> {
    if program.contains('/') {
        return Some(PathBuf::from(program)).filter(|path| is_executable(path));
    }
    std::env::split_paths(path)
        .map(|directory| directory.join(program))
        .find(|candidate| is_executable(candidate))
}

fn is_executable(path: &Path) -> bool {
    path.is_file() && rustix::fs::access(path, Access::EXEC_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_as_a_shell_finds_them() {
        assert!(find_program("sh", DEFAULT_PATH).unwrap().ends_with("sh"));
        assert_eq!(find_program("/bin/sh", "/nowhere"), Some(PathBuf::from("/bin/sh")));
        assert_eq!(find_program("sh", "/nowhere"), None);
        assert_eq!(find_program("no-such-program", DEFAULT_PATH), None);
        // Neither a directory nor a file without the permission can be run.
        assert_eq!(find_program("/etc", DEFAULT_PATH), None);
        assert_eq!(find_program("/etc/passwd", DEFAULT_PATH), None);
    }
}
