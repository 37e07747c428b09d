//! `/system/logs`: NDJSON, line by line as they are written.

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

use crate::provider::process::log_query::{LogQuery, RawLogQuery};
use crate::provider::process::logs::{Line, Logs};
use crate::provider::process::requests::{Query, function};
use crate::provider::process::stream::{self, Abandoned, Writer};
use crate::provider::process::{Process, Refusal};

/// How long a reader may take for what is still on its way to it when the provider stops.
const LAST_CHUNK: Duration = Duration::from_secs(1);

pub(super) async fn read(
    State(process): State<Arc<Process>>,
    Query(query): Query<RawLogQuery>,
) -> Result<Response, Refusal> {
    if query.name.is_empty() {
        return Err(Refusal::Invalid("name is missing".to_owned()));
    }
    let entry = process.entry(&function(&query.name, &query.namespace)?)?;
    let query = query.parse(Timestamp::now()).map_err(Refusal::Invalid)?;
    let logs = Arc::clone(&entry.workload.logs);
    let (writer, stream) = stream::channel();
    let stopping = process.runner.tasks.stopping.clone();
    process.runner.tasks.spawn(async move {
        // All branches are cancel-safe: nothing is owed to a reader who has left, or whose provider stops.
        tokio::select! {
            _ = write(&writer, &logs, &query) => {}
            () = writer.abandoned() => return,
            () = stopping.cancelled() => {}
        }
        let _ = timeout(LAST_CHUNK, writer.end()).await;
    });
    Ok(([(CONTENT_TYPE, "application/x-ndjson")], Body::new(stream)).into_response())
}

async fn write(writer: &Writer, logs: &Logs, query: &LogQuery) -> Result<(), Abandoned> {
    let (lines, mut live) = logs.read(query);
    for line in lines {
        writer.data(ndjson(logs, &line)).await?;
    }
    if query.follow {
        while let Some(line) = next(&mut live).await {
            if query.wants(&line) {
                writer.data(ndjson(logs, &line)).await?;
            }
        }
    }
    Ok(())
}

/// The next line; where lines were lost on this reader, one that says so. `None` when there will be no more.
async fn next(live: &mut Receiver<Arc<Line>>) -> Option<Arc<Line>> {
    match live.recv().await {
        Ok(line) => Some(line),
        Err(RecvError::Lagged(count)) => {
            let text = format!("{count} lines are missing: they came faster than they were read");
            Some(Arc::new(Line { at: Timestamp::now(), instance: "gateway".into(), text }))
        }
        Err(RecvError::Closed) => None,
    }
}

fn ndjson(logs: &Logs, line: &Line) -> Bytes {
    let mut bytes = BytesMut::new().writer();
    // Texts only: there is nothing in it that could fail.
    let _ = serde_json::to_writer(&mut bytes, &logs.shown(line));
    let mut bytes = bytes.into_inner();
    bytes.put_u8(b'\n');
    bytes.freeze()
}
