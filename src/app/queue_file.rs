//! `gateway queue check` and `gateway queue salvage`.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context, bail};

use gateway_queue::embedded::salvage::{self, SalvageReport};

/// Prints what `file` contains.
///
/// # Errors
/// When the file is damaged or cannot be read.
pub(super) fn check(file: &Path) -> anyhow::Result<()> {
    silence_panics();
    let name = file.display();
    let found = salvage::check(file).with_context(|| format!("cannot check {name}"))?;
    let mut text = report(&found);
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

/// Copies the readable calls and results of `file` to `out`, and prints their number.
///
/// # Errors
/// When nothing can be read or `out` cannot be written.
pub(super) fn salvage(file: &Path, out: &Path) -> anyhow::Result<()> {
    silence_panics();
    let name = file.display();
    let found = salvage::salvage(file, out).with_context(|| format!("cannot salvage {name}"))?;
    let text = report(&found);
    let out = out.display();
    print(&format!(
        "{text}copied to {out}. To use it, move {name} and its .journal aside, and move {out} to {name}\n"
    ));
    Ok(())
}

/// Disables panic messages: reading a damaged file may panic, which is caught and reported as damage.
fn silence_panics() {
    std::panic::set_hook(Box::new(|_| {}));
}

fn report(found: &SalvageReport) -> String {
    let SalvageReport { calls, damaged_calls, results, damaged_results, unreadable_ranges, .. } =
        found;
    let mut text = format!(
        "calls: {calls} can be read, {damaged_calls} are damaged\n\
         results: {results} can be read, {damaged_results} are damaged\n"
    );
    // Writing to a string does not fail.
    if *unreadable_ranges > 0 {
        let _ = writeln!(text, "unreadable ranges of unknown content: {unreadable_ranges}");
    }
    if found.last_commit_rolled_back {
        text.push_str(
            "the last change did not reach the disk: it is not counted, and is rolled back when the queue is opened\n",
        );
    }
    if found.completion_unknown {
        text.push_str(
            "the record of finished calls cannot be read: some of the calls above may have been executed\n",
        );
    }
    text
}

fn print(text: &str) {
    // A closed standard output cannot be reported anywhere.
    let _ = std::io::stdout().write_all(text.as_bytes());
}
