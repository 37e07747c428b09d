//! `/system/logs`: streams log lines as NDJSON.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use bytes::{BufMut, Bytes, BytesMut};
use jiff::Timestamp;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::timeout;

use crate::process::channel_body::{self, BodyWriter, ReaderGone};
use crate::process::log_query::{LogQuery, RawLogQuery};
use crate::process::logs::LogEntry;
use crate::process::requests::{Query, parse_function};
use crate::process::{ApiError, ProcessProvider};
use gateway_base::function::Function;

/// Limit for a client to read the end of the response.
const FINISH_TIMEOUT: Duration = Duration::from_secs(1);

pub(super) async fn read(
    State(provider): State<Arc<ProcessProvider>>,
    Query(query): Query<RawLogQuery>,
) -> Result<Response, ApiError> {
    if query.name.is_empty() {
        return Err(ApiError::Invalid("name is missing".to_owned()));
    }
    let deployed = provider.find(&parse_function(&query.name, &query.namespace)?)?;
    let query = query.parse(Timestamp::now()).map_err(ApiError::Invalid)?;
    let function = deployed.workload.function.clone();
    // Holds no reference to the logs, so that the stream of a follower ends when the function is deleted.
    let (lines, live) = deployed.workload.logs.read(&query);
    let (writer, stream) = channel_body::channel();
    let stopping = provider.launcher.tasks.stopping.clone();
    provider.launcher.tasks.spawn(async move {
        // All branches are cancel-safe: log lines may be dropped on disconnect and shutdown.
        tokio::select! {
            _ = send_entries(&writer, &function, lines, live, &query) => {}
            () = writer.reader_gone() => return,
            () = stopping.cancelled() => {}
        }
        let _ = timeout(FINISH_TIMEOUT, writer.finish()).await;
    });
    Ok(([(CONTENT_TYPE, "application/x-ndjson")], Body::new(stream)).into_response())
}

async fn send_entries(
    writer: &BodyWriter,
    function: &Function,
    lines: Vec<Arc<LogEntry>>,
    mut live: Receiver<Arc<LogEntry>>,
    query: &LogQuery,
) -> Result<(), ReaderGone> {
    for line in lines {
        writer.write(ndjson(function, &line)).await?;
    }
    while query.follow
        && let Some(line) = next_entry(&mut live, query).await
    {
        writer.write(ndjson(function, &line)).await?;
    }
    Ok(())
}

/// Returns the next matching line, or a line with the number of lost lines if the client was too slow. `None` at the
/// end of the logs.
async fn next_entry(live: &mut Receiver<Arc<LogEntry>>, query: &LogQuery) -> Option<Arc<LogEntry>> {
    loop {
        match live.recv().await {
            Ok(line) if query.matches(&line) => return Some(line),
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

fn ndjson(function: &Function, line: &LogEntry) -> Bytes {
    let mut bytes = BytesMut::new().writer();
    // Cannot fail: all fields are strings.
    let _ = serde_json::to_writer(&mut bytes, &line.to_log_line(function));
    let mut bytes = bytes.into_inner();
    bytes.put_u8(b'\n');
    bytes.freeze()
}
