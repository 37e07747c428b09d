//! Composition root: one builder for each role, and the steps from a command line to an exit status.

mod autoscale;
pub mod gateway;
mod provider;
mod queue_file;
mod secret;
mod threads;
mod up;
mod worker;
mod worker_process;

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::runtime::Runtime;

use crate::app::gateway::Gateway;
use crate::app::threads::Threads;
use crate::config::cli::{CommandLine, Subcommand};
use crate::config::reader::{ConfigError, SettingsReader};
use crate::config::settings::Role;
use crate::config::{self, LogConfig, Shutdown, typos};
use crate::{healthcheck, telemetry};
use gateway_base::build_info::BuildInfo;
use gateway_base::shutdown::{Event, OnHangup, ShutdownPhases, Signals, Tasks};

/// Version of this program.
pub(crate) const BUILD: BuildInfo = BuildInfo {
    release: env!("CARGO_PKG_VERSION"),
    commit: env!("GATEWAY_COMMIT"),
    commit_message: env!("GATEWAY_COMMIT_MESSAGE"),
};

/// Exit status when the command line or a setting is invalid (EX_USAGE).
pub const USAGE: u8 = 64;

/// Printed when `gateway serve`, or `gateway` alone, has no provider.
const MISSING_PROVIDER_HELP: &str = "\
To run functions on this machine:    gateway up [STACK]
To serve in front of a provider:     gateway serve --functions-provider-url URL
All commands and settings:           gateway --help";

/// Time for background tasks to stop after the last request has finished.
const BACKGROUND_STOP_TIMEOUT: Duration = Duration::from_secs(2);

/// Runs the command in `line`, with settings from its flags and from the environment by `var`. `names` are the names
/// of all environment variables.
pub fn run(line: &CommandLine, var: &dyn Fn(&str) -> Option<String>, names: &[String]) -> ExitCode {
    let flag = |name: &str| line.flag(name);
    let read = || SettingsReader::new(&flag, var);
    let log = LogConfig::parse(read());
    let _written = log.as_ref().ok().map(telemetry::init);
    let log = log.map(|_| ());
    warn_misspelled_variables(&line.subcommand, names);
    match &line.subcommand {
        Subcommand::Serve => {
            let config = config::Serve::parse(read());
            let lacks_provider = read().text("functions_provider_url").is_empty();
            let exit = run_role(log, config, serve);
            if lacks_provider {
                eprintln!("{MISSING_PROVIDER_HELP}");
            }
            exit
        }
        Subcommand::Worker => run_role(log, config::Worker::parse(read()), worker_process::run),
        Subcommand::Provider => run_role(log, config::Provider::parse(read()), provider::run),
        Subcommand::QueueCheck { file } => exit_code(queue_file::check(file)),
        Subcommand::QueueSalvage { file, out } => exit_code(queue_file::salvage(file, out)),
        Subcommand::Up { stack, once } => {
            run_role(log, config::Up::parse(read(), stack.clone()), |config| {
                up::run(config, *once, var)
            })
        }
        Subcommand::SecretSet { name, namespace, from_file } => {
            let state_dir = read().text("state_dir");
            exit_code(secret::set(state_dir.as_ref(), namespace, name, from_file.as_deref()))
        }
        Subcommand::Healthcheck { url } => exit_code(healthcheck::run(url)),
        Subcommand::Completions { script } => {
            exit_code(io::stdout().write_all(script).context("cannot print the completions"))
        }
    }
}

/// Logs environment variables whose names look like misspelled settings.
fn warn_misspelled_variables(asked: &Subcommand, names: &[String]) {
    let role = match asked {
        Subcommand::Serve => Role::Serve,
        Subcommand::Worker => Role::Worker,
        Subcommand::Provider => Role::Provider,
        Subcommand::Up { .. } => Role::Up,
        Subcommand::Healthcheck { .. }
        | Subcommand::Completions { .. }
        | Subcommand::SecretSet { .. }
        | Subcommand::QueueCheck { .. }
        | Subcommand::QueueSalvage { .. } => return,
    };
    for (name, meant) in typos::likely_typos(role, names.iter().map(String::as_str)) {
        tracing::warn!(
            "The environment variable {name} is not a setting and is ignored. Did you mean {meant}?"
        );
    }
}

/// Runs `role`, or prints all configuration errors.
fn run_role<C>(
    log: Result<(), Vec<ConfigError>>,
    config: Result<C, Vec<ConfigError>>,
    role: impl FnOnce(C) -> anyhow::Result<()>,
) -> ExitCode {
    match (log, config) {
        (Ok(()), Ok(config)) => exit_code(role(config)),
        (log, config) => {
            let mistakes = config.err().into_iter().chain(log.err()).flatten();
            mistakes.for_each(|mistake| eprintln!("gateway: {mistake}"));
            ExitCode::from(USAGE)
        }
    }
}

fn exit_code(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gateway: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// `gateway serve`
fn serve(config: config::Serve) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    block_on(runtime, async {
        let signals = Signals::listen().context("cannot listen for signals")?;
        let (phases, tasks) = (ShutdownPhases::default(), Tasks::default());
        let shutdown = config.shutdown;
        if config.auth.credentials_dir.is_none() && config.auth.proxy_url.is_none() {
            tracing::warn!(
                "The API is open: anyone who reaches the port can deploy and change functions. Set basic_auth=true or \
                 auth_proxy_url"
            );
        }
        let gateway = Gateway::start(config, None, &phases, &tasks).await?;
        tracing::info!(address = %gateway.address, metrics = %gateway.metrics_address, "Serving");
        run_until_signal(gateway.threads, signals, phases, tasks, shutdown).await
    })
}

/// Runs `role` until it returns. Does not wait for the runtime's blocking threads, which may still resolve a name.
fn block_on<T>(runtime: Runtime, role: impl Future<Output = T>) -> T {
    let result = runtime.block_on(role);
    runtime.shutdown_background();
    result
}

/// Waits for a signal that requests a shutdown, then takes `threads` through the shutdown phases.
///
/// # Errors
/// When a thread ended without being asked to, or when a second signal aborts the shutdown.
async fn run_until_signal(
    mut threads: Threads,
    mut signals: Signals,
    phases: ShutdownPhases,
    tasks: Tasks,
    shutdown: Shutdown,
) -> anyhow::Result<()> {
    let signal = loop {
        let event = tokio::select! {
            event = signals.next_event(OnHangup::StopWithoutTerminal) => event,
            end = threads.wait_for_failure() => bail!("{end}"),
        };
        match event {
            Event::Stop(signal) => break signal,
            Event::Reload => {
                tracing::info!("SIGHUP: reloading files");
                phases.reload();
            }
        }
    };
    tracing::info!(signal, "Stopping: waiting for requests in flight");
    tokio::select! {
        () = drain(threads, &phases, shutdown) => {}
        signal = signals.next_termination() => bail!("shutdown aborted by a second signal, {signal}"),
    }
    stop_background(tasks).await;
    Ok(())
}

/// Stops the background tasks, the last step of a role.
async fn stop_background(tasks: Tasks) {
    if tasks.stop(BACKGROUND_STOP_TIMEOUT).await.is_err() {
        tracing::warn!("Background tasks did not stop in time");
    }
    tracing::info!("Stopped");
}

/// Announces the shutdown, waits for requests in flight, and aborts those that still run after `shutdown_grace`.
async fn drain(mut threads: Threads, phases: &ShutdownPhases, shutdown: Shutdown) {
    phases.announce();
    tokio::time::sleep(shutdown.delay).await;
    phases.draining.cancel();
    if tokio::time::timeout(shutdown.grace, threads.wait_for_all()).await.is_err() {
        phases.forced.cancel();
        threads.wait_for_all().await;
    }
    threads.join();
}
