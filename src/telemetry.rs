//! Where log lines go: standard error, as text or JSON, filtered by `log_level`.

use std::io::{self, IsTerminal};

use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::LogConfig;

/// Lines that wait to be written. More are dropped: no call waits for whoever reads the log.
const WAITING: usize = 16 << 10;

/// Installs the process's subscriber; a second call changes nothing. What is logged is written until what is returned is
/// dropped.
pub fn init(log: &LogConfig) -> WorkerGuard {
    // Parsed once before, when the settings were read. The access log has a switch of its own.
    let filter: Targets = format!("access=info,{}", log.filter).parse().unwrap_or_default();
    let registry = tracing_subscriber::registry().with(filter);
    let builder = NonBlockingBuilder::default().lossy(true).buffered_lines_limit(WAITING);
    let (writer, guard) = builder.finish(io::stderr());
    let layer = tracing_subscriber::fmt::layer().with_writer(writer);
    let installed = if log.json {
        registry.with(layer.json()).try_init()
    } else {
        registry.with(layer.with_ansi(io::stderr().is_terminal())).try_init()
    };
    if installed.is_err() {
        tracing::debug!("A subscriber was installed already");
    }
    guard
}
