//! `gateway up`: gateway and process provider in one process, on loopback, with the functions of a stack file.

mod record;
mod stack_file;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::task::block_in_place;

use crate::app::gateway::Gateway;
use crate::app::provider::{ProviderServer, build_runtime};
use crate::app::up::stack_file::StackFile;
use crate::config::Up;
use gateway_base::base_url::BaseUrl;
use gateway_base::shutdown::{Event, OnHangup, ShutdownPhases, Signals, Tasks};
use gateway_http::credentials::Credentials;
use gateway_provider::process::{DEFAULT_NAMESPACE, ProcessProvider, SecretsSnapshot};

/// Interval of checks for changes of the stack file and secrets.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Runs gateway and provider until a signal. With `once`, changes of the stack file are ignored. `var` looks up
/// variables of the stack file.
pub(super) fn run(
    mut config: Up,
    once: bool,
    var: &dyn Fn(&str) -> Option<String>,
) -> anyhow::Result<()> {
    resolve_paths(&mut config)?;
    if let Some(path) = &config.stack {
        // Checked before anything is started or created.
        std::fs::metadata(path)
            .with_context(|| format!("cannot read the stack file {}", path.display()))?;
    }
    super::block_on(build_runtime()?, up(config, once, var))
}

/// Makes the paths absolute. State directories are relative to the stack file, not to the current directory.
fn resolve_paths(config: &mut Up) -> anyhow::Result<()> {
    let message = "cannot find the current directory";
    let base = match &mut config.stack {
        Some(path) => {
            *path = std::path::absolute(&path).context(message)?;
            path.parent().unwrap_or(Path::new("/")).to_owned()
        }
        None => std::env::current_dir().context(message)?,
    };
    for directory in [&mut config.provider.process.state_dir, &mut config.serve.queue.state_dir] {
        *directory = base.join(&directory);
    }
    Ok(())
}

async fn up(
    mut config: Up,
    once: bool,
    var: &dyn Fn(&str) -> Option<String>,
) -> anyhow::Result<()> {
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    let mut signals = Signals::listen().context("cannot listen for signals")?;
    // Kept only in memory: no other client uses this provider.
    let (tasks, provider_tasks, phases) =
        (Tasks::default(), Tasks::default(), ShutdownPhases::default());
    let credentials = Credentials::generate()?;
    let opened =
        ProviderServer::open(&config.provider, Some(Arc::clone(&credentials)), &provider_tasks)
            .await;
    let mut provider = opened?;
    let process = Arc::clone(&provider.process);
    let mut stack = config.stack.as_deref().map(|path| {
        StackFile::new(path, &config.provider.process.state_dir, Arc::clone(&process), var)
    });
    let shutdown = config.serve.shutdown;
    let started = async {
        if let Some(stack) = &mut stack {
            stack.start().await?;
        }
        provider.serve(&provider_tasks);
        let url = format!("http://{}", provider.address);
        let Some(url) = BaseUrl::parse(&url) else { bail!("{url} is not a URL") };
        (config.serve.provider, config.serve.logs_provider) = (url.clone(), url);
        if config.serve.namespace.is_empty() {
            DEFAULT_NAMESPACE.clone_into(&mut config.serve.namespace);
        }
        Gateway::start(config.serve, Some(credentials), &phases, &tasks).await
    };
    let mut gateway = match started.await {
        Ok(gateway) => gateway,
        Err(error) => {
            provider.stop(&provider_tasks).await;
            return Err(error);
        }
    };
    let names = stack.as_ref().map(StackFile::names).unwrap_or_default();
    let first = names.first().copied();
    block_in_place(|| print_banner(&gateway, &provider, &config.provider.process.state_dir, first));
    let mut secrets = SecretsSnapshot::default();
    let signal = loop {
        let event = tokio::select! {
            event = signals.next_event(OnHangup::Stop) => event,
            end = gateway.threads.wait_for_failure() => bail!("{end}"),
            () = tokio::time::sleep(POLL_INTERVAL) => {
                poll_changes(&process, &mut secrets, stack.as_mut(), once).await;
                continue;
            }
        };
        match (event, &mut stack) {
            (Event::Stop(signal), _) => break signal,
            (Event::Reload, None) => tracing::info!("SIGHUP: there is no stack file to reload"),
            (Event::Reload, Some(stack)) => {
                tracing::info!("SIGHUP: reloading the stack file");
                stack.apply().await;
            }
        }
        phases.reload();
    };
    tracing::info!(signal, "Stopping: waiting for requests in flight");
    let stop = async {
        super::drain(gateway.threads, &phases, shutdown).await;
        provider.stop(&provider_tasks).await;
        super::stop_background(tasks).await;
    };
    tokio::select! {
        () = stop => Ok(()),
        signal = signals.next_termination() => bail!("stopped immediately by a second signal, {signal}"),
    }
}

/// Applies changes of secrets and of the stack file.
async fn poll_changes(
    process: &Arc<ProcessProvider>,
    secrets: &mut SecretsSnapshot,
    stack: Option<&mut StackFile<'_>>,
    once: bool,
) {
    if let Err(error) = block_in_place(|| process.refresh_changed_secrets(secrets)) {
        tracing::warn!(%error, "Cannot reload secrets");
    }
    let Some(stack) = stack else { return };
    stack.deploy_waiting().await;
    if !once {
        stack.poll().await;
    }
}

/// Prints the addresses, and commands to try.
fn print_banner(
    gateway: &Gateway,
    provider: &ProviderServer,
    state: &Path,
    function: Option<&str>,
) {
    let base = format!("http://{}", gateway.address);
    println!("Gateway    {base}        (page: {base}/ui/)");
    println!("Metrics    http://{}/metrics", gateway.metrics_address);
    println!("Provider   http://{}        (state: {})", provider.address, state.display());
    println!();
    match function {
        Some(first) => {
            println!("Call a function:");
            println!("  curl {base}/function/{first} -d 'hello'");
        }
        None => {
            println!("Deploy a function and call it:");
            println!(
                "  curl {base}/system/functions -H 'Content-Type: application/json' \
                 -d '{{\"service\":\"echo\",\"envProcess\":\"cat\"}}'"
            );
            println!("  curl {base}/function/echo -d 'hello'");
        }
    }
    let name = function.unwrap_or("echo");
    println!("Queue a call and query its state (the id is in X-Call-Id):");
    println!("  curl -i {base}/async-function/{name} -d 'hello'");
    println!("  curl {base}/async-function/ID");
    println!("List functions and read a log:");
    println!("  curl {base}/system/functions");
    println!("  curl '{base}/system/logs?name={name}&tail=10'");
    println!();
    println!("Press Ctrl-C to stop.");
}
