//! Logging to standard error, as text or JSON, filtered by `log_level`.

use std::io::{self, IsTerminal};

use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::LogConfig;

/// Maximum buffered log lines. More are dropped: a slow reader of the log must not block calls.
const MAX_BUFFERED_LINES: usize = 16 << 10;

/// Installs the subscriber of the process; a second call has no effect. Logging works until the returned guard is
/// dropped.
pub fn init(log: &LogConfig) -> WorkerGuard {
    // The filter was validated with the settings. The access log has its own setting.
    let filter: Targets = format!("access=info,{}", log.filter).parse().unwrap_or_default();
    let registry = tracing_subscriber::registry().with(filter);
    let builder =
        NonBlockingBuilder::default().lossy(true).buffered_lines_limit(MAX_BUFFERED_LINES);
    let (writer, guard) = builder.finish(io::stderr());
    let layer = tracing_subscriber::fmt::layer().with_writer(writer);
    let installed = if log.json {
        registry.with(layer.json()).try_init()
    } else {
        registry.with(layer.with_ansi(io::stderr().is_terminal())).try_init()
    };
    if installed.is_err() {
        tracing::debug!("A log subscriber is already installed");
    }
    guard
}
