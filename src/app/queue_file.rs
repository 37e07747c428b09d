//! `gateway queue check` and `gateway queue salvage`.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context, bail};

use crate::queue::embedded::salvage::{self, SalvageReport};

/// Prints what is in `file`; fails if it is damaged.
pub(super) fn check(file: &Path) -> anyhow::Result<()> {
    expect_panics();
    let name = file.display();
    let found = salvage::check(file).with_context(|| format!("cannot check {name}"))?;
    let mut text = text(&found);
    if found.is_intact() {
        print(&format!("{text}{name} is sound\n"));
        return Ok(());
    }
    if let Some(open_error) = &found.open_error {
        let _ = writeln!(text, "it cannot be opened: {open_error}");
    }
    print(&text);
    bail!("{name} is damaged: `gateway queue salvage {name} OUT` copies what can be read")
}

/// Copies what can be read of `file` to `out`, and prints what that is.
pub(super) fn salvage(file: &Path, out: &Path) -> anyhow::Result<()> {
    expect_panics();
    let name = file.display();
    let found = salvage::salvage(file, out).with_context(|| format!("cannot salvage {name}"))?;
    let text = text(&found);
    let out = out.display();
    print(&format!(
        "{text}copied to {out}. To use it, move {name} and its .journal aside, and move {out} to {name}\n"
    ));
    Ok(())
}

/// A panic is what a damaged file may lead to; it is caught, and reported as damage.
fn expect_panics() {
    std::panic::set_hook(Box::new(|_| {}));
}

fn text(found: &SalvageReport) -> String {
    let SalvageReport { calls, damaged_calls, results, damaged_results, unreadable_ranges, .. } =
        found;
    let mut text = format!(
        "calls: {calls} can be read, {damaged_calls} are damaged\n\
         results: {results} can be read, {damaged_results} are damaged\n"
    );
    // Writing to memory does not fail.
    if *unreadable_ranges > 0 {
        let _ =
            writeln!(text, "pieces that cannot be read, whatever was in them: {unreadable_ranges}");
    }
    if found.last_commit_rolled_back {
        text.push_str(
            "the last change did not reach the disk: it is not counted, and is undone when the queue is opened\n",
        );
    }
    if found.completion_unknown {
        text.push_str(
            "it cannot be read which calls are over: some of those above may have been executed\n",
        );
    }
    text
}

fn print(text: &str) {
    // Nothing can be done about a closed standard output.
    let _ = std::io::stdout().write_all(text.as_bytes());
}
