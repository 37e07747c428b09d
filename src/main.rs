//! The `gateway` program. Exit status: 0 after a requested shutdown, 64 when the command line or a setting is invalid,
//! 1 on any other failure.

use std::process::ExitCode;

use gateway::app;
use gateway::config::cli::CommandLine;

/// A request allocates many small objects and frees them on the same thread. mimalloc does this in fewer instructions
/// than the system's allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[expect(clippy::disallowed_methods, reason = "the one place that reads the environment")]
fn main() -> ExitCode {
    match CommandLine::parse(std::env::args_os()) {
        // A value that is not valid UTF-8 is converted lossily; no setting accepts the result.
        Ok(line) => {
            let names: Vec<String> =
                std::env::vars_os().filter_map(|(name, _)| name.into_string().ok()).collect();
            let var = |name: &str| {
                std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
            };
            app::run(&line, &var, &names)
        }
        Err(help) => {
            // A closed standard output cannot be reported anywhere.
            let _ = help.print();
            if help.use_stderr() { ExitCode::from(app::USAGE) } else { ExitCode::SUCCESS }
        }
    }
}
