//! `gateway up`: gateway and process provider in one process, on loopback, with the functions of a stack file.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use tokio::task::block_in_place;

use crate::app::gateway::Gateway;
use crate::app::provider::{Provider, runtime};
use crate::auth::Credentials;
use crate::config::Up;
use crate::config::base_url::BaseUrl;
use crate::provider::types::FunctionDeployment;
use crate::shutdown::{Signals, Stages, Tasks};
use crate::stack;

/// Where functions live when nobody says otherwise.
const NAMESPACE: &str = "openfaas-fn";

pub(super) fn run(config: Up) -> anyhow::Result<()> {
    let functions = match &config.stack {
        Some(path) => read_stack(path)?,
        None => Vec::new(),
    };
    super::block_on(runtime()?, up(config, functions))
}

async fn up(mut config: Up, functions: Vec<FunctionDeployment>) -> anyhow::Result<()> {
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    let mut signals = Signals::listen().context("cannot listen for signals")?;
    let (tasks, provider_tasks, stages) = (Tasks::default(), Tasks::default(), Stages::default());
    // Kept in memory alone: only this gateway gives orders to this provider.
    let credentials = Credentials::generated()?;
    let opened =
        Provider::open(&config.provider, Some(Arc::clone(&credentials)), &provider_tasks).await;
    let mut provider = opened?;
    let shutdown = config.serve.shutdown;
    let started = async {
        for function in &functions {
            let name = &function.service;
            let deployed = provider.process.apply(function.clone()).await;
            deployed.with_context(|| format!("function {name}"))?;
        }
        provider.serve(&provider_tasks);
        let url = format!("http://{}", provider.address);
        let Some(url) = BaseUrl::parse(&url) else { bail!("{url} is no URL") };
        (config.serve.provider, config.serve.logs_provider) = (url.clone(), url);
        if config.serve.namespace.is_empty() {
            NAMESPACE.clone_into(&mut config.serve.namespace);
        }
        Gateway::start(config.serve, Some(credentials), &stages, &tasks).await
    };
    let mut gateway = match started.await {
        Ok(gateway) => gateway,
        Err(error) => {
            provider.stop(&provider_tasks).await;
            return Err(error);
        }
    };
    block_in_place(|| announce(&gateway, &provider, &config.provider.state_dir, &functions));
    let signal = tokio::select! {
        signal = signals.next() => signal,
        end = gateway.threads.unexpected_end() => bail!("{end}"),
    };
    tracing::info!(signal, "Stopping: calls in flight may finish");
    let stop = async {
        super::drain(gateway.threads, &stages, shutdown).await;
        provider.stop(&provider_tasks).await;
        super::end(tasks).await;
    };
    tokio::select! {
        () = stop => Ok(()),
        signal = signals.next() => bail!("ended at once by a second signal, {signal}"),
    }
}

fn read_stack(path: &Path) -> anyhow::Result<Vec<FunctionDeployment>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the stack file {}", path.display()))?;
    stack::parse(&text).with_context(|| format!("stack file {}", path.display()))
}

/// Says where things are, in lines that can be pasted.
fn announce(
    gateway: &Gateway,
    provider: &Provider,
    state: &Path,
    functions: &[FunctionDeployment],
) {
    let base = format!("http://{}", gateway.address);
    println!("Gateway    {base}        (page: {base}/ui/)");
    println!("Metrics    http://{}/metrics", gateway.metrics_address);
    println!("Provider   http://{}        (state: {})", provider.address, state.display());
    println!();
    match functions.first() {
        Some(first) => {
            println!("Call a function:");
            println!("  curl {base}/function/{} -d 'hello'", first.service);
        }
        None => {
            println!("Deploy a function, and call it:");
            println!(
                "  curl {base}/system/functions -H 'Content-Type: application/json' \
                 -d '{{\"service\":\"echo\",\"envProcess\":\"cat\"}}'"
            );
            println!("  curl {base}/function/echo -d 'hello'");
        }
    }
    let name = functions.first().map_or("echo", |first| first.service.as_str());
    println!("Have it called later, and ask what became of it (the id is in X-Call-Id):");
    println!("  curl -i {base}/async-function/{name} -d 'hello'");
    println!("  curl {base}/async-function/ID");
    println!("List functions, and follow a log:");
    println!("  curl {base}/system/functions");
    println!("  curl '{base}/system/logs?name={name}&tail=10'");
    println!();
    println!("Ctrl-C stops it.");
}
