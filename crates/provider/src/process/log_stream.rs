//! Streams the log lines of a function.

use std::sync::Arc;

use futures_util::{Stream, StreamExt, stream};
use jiff::Timestamp;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio_util::sync::CancellationToken;

use crate::backend::LogQuery;
use crate::process::log_entry::LogEntry;
use crate::process::logs::Logs;
use crate::types::LogLine;
use gateway_base::function::Function;

/// Returns the lines that `query` selects. A follower's stream ends when the function is deleted or at `stopping`.
///
/// The stream holds no reference to `logs`, so that it ends with them.
pub(super) fn stream(
    function: Function,
    logs: &Logs,
    query: LogQuery,
    stopping: CancellationToken,
) -> impl Stream<Item = LogLine> + Send + use<> {
    let (past, live) = logs.read(&query);
    let live = query.follow.then_some(live);
    let future = stream::unfold((live, query), |(live, query)| async {
        let mut live = live?;
        let entry = next_entry(&mut live, &query).await?;
        Some((entry, (Some(live), query)))
    });
    stream::iter(past)
        .chain(future)
        .take_until(stopping.cancelled_owned())
        .map(move |entry| entry.to_log_line(&function))
}

/// Returns the next matching line, or a line with the number of lost lines if the client was too slow. `None` at the
/// end of the logs.
async fn next_entry(live: &mut Receiver<Arc<LogEntry>>, query: &LogQuery) -> Option<Arc<LogEntry>> {
    loop {
        match live.recv().await {
            Ok(line) if line.matches(query) => return Some(line),
            Ok(_) => {}
            Err(RecvError::Lagged(count)) => {
                let text = format!("{count} lines are missing: the client read too slowly");
                return Some(Arc::new(LogEntry {
                    at: Timestamp::now(),
                    instance: "gateway".into(),
                    text,
                }));
            }
            Err(RecvError::Closed) => return None,
        }
    }
}
