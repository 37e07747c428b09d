//! Passes the commit to the program: from the variables `GATEWAY_COMMIT` and `GATEWAY_COMMIT_MESSAGE`, which an image
//! build sets, or from git. Without either, the program reports no commit.

use std::path::Path;
use std::process::Command;

#[expect(
    clippy::disallowed_methods,
    reason = "a build script gets its input from the environment and is not part of the program"
)]
fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    for name in ["GATEWAY_COMMIT", "GATEWAY_COMMIT_MESSAGE"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let given = |name: &str| {
        let value = std::env::var(name).unwrap_or_default();
        Some(value.trim().to_owned()).filter(|value| !value.is_empty() && value != "unknown")
    };
    let (mut commit, mut message) = (given("GATEWAY_COMMIT"), given("GATEWAY_COMMIT_MESSAGE"));
    if commit.is_none() && is_own_repository() {
        commit = git(&["rev-parse", "HEAD"]);
        message = git(&["log", "-1", "--format=%s"]);
        // Files that change with each commit: HEAD, its reflog, and the branch.
        let branch = git(&["symbolic-ref", "-q", "HEAD"]);
        for name in ["HEAD", "logs/HEAD"].into_iter().chain(branch.as_deref()) {
            if let Some(path) = git(&["rev-parse", "--git-path", name])
                && Path::new(&path).exists()
            {
                println!("cargo:rerun-if-changed={path}");
            }
        }
    }
    println!("cargo:rustc-env=GATEWAY_COMMIT={}", commit.unwrap_or_default());
    println!("cargo:rustc-env=GATEWAY_COMMIT_MESSAGE={}", message.unwrap_or_default());
}

/// Returns whether the sources are the root of a git repository, not a directory inside another repository.
fn is_own_repository() -> bool {
    let top =
        git(&["rev-parse", "--show-toplevel"]).and_then(|top| Path::new(&top).canonicalize().ok());
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).canonicalize().ok();
    top.is_some() && top == here
}

/// Returns the first line of git's output; `None` if git fails or is not installed.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let line = text.lines().next()?.trim().to_owned();
    (output.status.success() && !line.is_empty()).then_some(line)
}
