//! Version of the program, which the root package knows and crates report.

/// Version of the program.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BuildInfo {
    /// Version of the package.
    pub release: &'static str,
    /// Hash of the commit; empty if unknown.
    pub commit: &'static str,
    /// First line of the commit's message; empty if unknown.
    pub commit_message: &'static str,
}
