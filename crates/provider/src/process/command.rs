//! Looks up programs in a PATH.

use std::path::{Path, PathBuf};

use rustix::fs::Access;

/// PATH of a provider or function that has none.
pub(super) const DEFAULT_PATH: &str =
    "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Returns the executable for `program`: itself if it contains a slash, otherwise the first match in `path`.
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
    fn programs_are_looked_up_like_in_a_shell() {
        assert!(find_program("sh", DEFAULT_PATH).unwrap().ends_with("sh"));
        assert_eq!(find_program("/bin/sh", "/nowhere"), Some(PathBuf::from("/bin/sh")));
        assert_eq!(find_program("sh", "/nowhere"), None);
        assert_eq!(find_program("no-such-program", DEFAULT_PATH), None);
        // Directories and files without execute permission are skipped.
        assert_eq!(find_program("/etc", DEFAULT_PATH), None);
        assert_eq!(find_program("/etc/passwd", DEFAULT_PATH), None);
    }
}
