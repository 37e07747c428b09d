//! Tells the program which commit it is built from: by the variables `GATEWAY_COMMIT` and `GATEWAY_COMMIT_MESSAGE`, as
//! an image's build sets them, or else by git. Without either, the program says nothing.

use std::path::Path;
use std::process::Command;

#[expect(
    clippy::disallowed_methods,
    reason = "a build is told by its environment, and this is no part of the program"
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
        // Where a new commit shows: the branch itself, or the list of all its commits.
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

/// Whether the sources are a repository's, and not only unpacked somewhere inside of one.
fn is_own_repository() -> bool {
    let top =
        git(&["rev-parse", "--show-toplevel"]).and_then(|top| Path::new(&top).canonicalize().ok());
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).canonicalize().ok();
    top.is_some() && top == here
}

/// The first line that git says; `None` if it fails, or is not installed.
fn git(arguments: &[&str]) -> Option<String> {
    let output = Command::new("git").args(arguments).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let line = text.lines().next()?.trim().to_owned();
    (output.status.success() && !line.is_empty()).then_some(line)
}
