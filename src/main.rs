//! The `gateway` program. Exit status: 0 after a stop that was asked for, 64 when the command line or a setting
//! cannot be used, 1 when something else went wrong.

use std::process::ExitCode;

use gateway::app;
use gateway::config::cli::CommandLine;

/// A call makes many small objects on one thread and frees them there, which mimalloc does in fewer instructions than
/// the system's allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[expect(clippy::disallowed_methods, reason = "the one place that reads the environment")]
fn main() -> ExitCode {
    match CommandLine::parse(std::env::args_os()) {
        // What is no text is no valid value either, and is refused as such.
        Ok(line) => {
            let names: Vec<String> =
                std::env::vars_os().filter_map(|(name, _)| name.into_string().ok()).collect();
            let var = |name: &str| {
                std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
            };
            app::run(&line, &var, &names)
        }
        Err(help) => {
            // Nothing can be done about a closed standard output.
            let _ = help.print();
            if help.use_stderr() { ExitCode::from(app::USAGE) } else { ExitCode::SUCCESS }
        }
    }
}
