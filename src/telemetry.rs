//! Where log lines go: standard error, as text or JSON, filtered by `log_level`.

use std::io::{self, IsTerminal};

use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::Log;

/// Installs the process's subscriber; a second call changes nothing.
pub fn init(log: &Log) {
    // The filter has been parsed once before, when the settings were read.
    let filter: Targets = log.filter.parse().unwrap_or_default();
    let registry = tracing_subscriber::registry().with(filter);
    let layer = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    let installed = if log.json {
        registry.with(layer.json()).try_init()
    } else {
        registry.with(layer.with_ansi(io::stderr().is_terminal())).try_init()
    };
    if installed.is_err() {
        tracing::debug!("A subscriber was installed already");
    }
}
