//! Where the rooms are introduced to each other: one builder for each role, and the way from a command line to an
//! exit status.

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
use crate::shutdown::{Event, OnHangup, Signals, Stages, Tasks};
use crate::{healthcheck, telemetry};

/// The command line or a setting cannot be used (EX_USAGE).
pub const USAGE: u8 = 64;

/// What is said of `gateway serve` without a provider, and of `gateway` alone.
const NO_PROVIDER: &str = "\
To run functions on this machine:    gateway up [STACK]
To serve in front of a provider:     gateway serve --functions-provider-url URL
All commands and settings:           gateway --help";

/// What background tasks get to end once the calls have.
const TASKS_GRACE: Duration = Duration::from_secs(2);

/// Runs what `line` asks for, with settings from its flags and from `var`; `names` are those of all variables.
pub fn run(line: &CommandLine, var: &dyn Fn(&str) -> Option<String>, names: &[String]) -> ExitCode {
    let flag = |name: &str| line.flag(name);
    let read = || SettingsReader::new(&flag, var);
    let log = LogConfig::parse(read());
    let _written = log.as_ref().ok().map(telemetry::init);
    let log = log.map(|_| ());
    warn_of_names(&line.subcommand, names);
    match &line.subcommand {
        Subcommand::Serve => {
            let config = config::Serve::parse(read());
            let lacks_provider = read().text("functions_provider_url").is_empty();
            let exit = start(log, config, serve);
            if lacks_provider {
                eprintln!("{NO_PROVIDER}");
            }
            exit
        }
        Subcommand::Worker => start(log, config::Worker::parse(read()), worker_process::run),
        Subcommand::Provider => start(log, config::Provider::parse(read()), provider::run),
        Subcommand::QueueCheck { file } => exit(queue_file::check(file)),
        Subcommand::QueueSalvage { file, out } => exit(queue_file::salvage(file, out)),
        Subcommand::Up { stack, once } => {
            start(log, config::Up::parse(read(), stack.clone()), |config| {
                up::run(config, *once, var)
            })
        }
        Subcommand::SecretSet { name, namespace, from_file } => {
            let state_dir = read().text("state_dir");
            exit(secret::set(state_dir.as_ref(), namespace, name, from_file.as_deref()))
        }
        Subcommand::Healthcheck { url } => exit(healthcheck::run(url)),
        Subcommand::Completions { script } => {
            exit(io::stdout().write_all(script).context("cannot print the completions"))
        }
    }
}

/// Says which variables are probably settings with a typing error.
fn warn_of_names(asked: &Subcommand, names: &[String]) {
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
            "The environment variable {name} is no setting, and is ignored: {meant} is one"
        );
    }
}

/// Reports every mistake, or runs `role`.
fn start<C>(
    log: Result<(), Vec<ConfigError>>,
    config: Result<C, Vec<ConfigError>>,
    role: impl FnOnce(C) -> anyhow::Result<()>,
) -> ExitCode {
    match (log, config) {
        (Ok(()), Ok(config)) => exit(role(config)),
        (log, config) => {
            let mistakes = config.err().into_iter().chain(log.err()).flatten();
            mistakes.for_each(|mistake| eprintln!("gateway: {mistake}"));
            ExitCode::from(USAGE)
        }
    }
}

fn exit(result: anyhow::Result<()>) -> ExitCode {
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
        let (stages, tasks) = (Stages::default(), Tasks::default());
        let shutdown = config.shutdown;
        if config.auth.credentials_dir.is_none() && config.auth.proxy_url.is_none() {
            tracing::warn!(
                "The API is open: anyone who reaches the port can deploy and change functions. Set basic_auth=true or \
                 auth_proxy_url"
            );
        }
        let gateway = Gateway::start(config, None, &stages, &tasks).await?;
        tracing::info!(address = %gateway.address, metrics = %gateway.metrics_address, "Serving");
        until_stopped(gateway.threads, signals, stages, tasks, shutdown).await
    })
}

/// Runs `role` to its end. What is left on the runtime's blocking threads, such as a name that is being resolved, is
/// not waited for.
fn block_on<T>(runtime: Runtime, role: impl Future<Output = T>) -> T {
    let result = runtime.block_on(role);
    runtime.shutdown_background();
    result
}

/// Waits until a signal asks for the end, then leads `threads` through the stages of a stop.
async fn until_stopped(
    mut threads: Threads,
    mut signals: Signals,
    stages: Stages,
    tasks: Tasks,
    shutdown: Shutdown,
) -> anyhow::Result<()> {
    let signal = loop {
        let event = tokio::select! {
            event = signals.event(OnHangup::StopWithoutTerminal) => event,
            end = threads.unexpected_end() => bail!("{end}"),
        };
        match event {
            Event::Stop(signal) => break signal,
            Event::Reload => {
                tracing::info!("SIGHUP: files are read again");
                stages.reload();
            }
        }
    };
    tracing::info!(signal, "Stopping: calls in flight may finish");
    tokio::select! {
        () = drain(threads, &stages, shutdown) => {}
        signal = signals.next() => bail!("ended at once by a second signal, {signal}"),
    }
    end(tasks).await;
    Ok(())
}

/// Ends the background tasks, which is the last that a role does.
async fn end(tasks: Tasks) {
    if tasks.stop(TASKS_GRACE).await.is_err() {
        tracing::warn!("Background work did not end in time");
    }
    tracing::info!("Stopped");
}

/// Announces the stop, lets calls finish, and cuts what is left when the grace is over.
async fn drain(mut threads: Threads, stages: &Stages, shutdown: Shutdown) {
    stages.leave();
    tokio::time::sleep(shutdown.delay).await;
    stages.closing.cancel();
    if tokio::time::timeout(shutdown.grace, threads.ended()).await.is_err() {
        stages.cut.cancel();
        threads.ended().await;
    }
    threads.join();
}
