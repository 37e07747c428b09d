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

use crate::function::Function;
use crate::provider::process::log_query::{LogQuery, RawLogQuery};
use crate::provider::process::logs::Line;
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
    let function = entry.workload.function.clone();
    // Of the logs themselves nothing is kept, so that a reader who follows them learns when the function is deleted.
    let (lines, live) = entry.workload.logs.read(&query);
    let (writer, stream) = stream::channel();
    let stopping = process.runner.tasks.stopping.clone();
    process.runner.tasks.spawn(async move {
        // All branches are cancel-safe: nothing is owed to a reader who has left, or whose provider stops.
        tokio::select! {
            _ = write(&writer, &function, lines, live, &query) => {}
            () = writer.abandoned() => return,
            () = stopping.cancelled() => {}
        }
        let _ = timeout(LAST_CHUNK, writer.end()).await;
    });
    Ok(([(CONTENT_TYPE, "application/x-ndjson")], Body::new(stream)).into_response())
}

async fn write(
    writer: &Writer,
    function: &Function,
    lines: Vec<Arc<Line>>,
    mut live: Receiver<Arc<Line>>,
    query: &LogQuery,
) -> Result<(), Abandoned> {
    for line in lines {
        writer.data(ndjson(function, &line)).await?;
    }
    while query.follow
        && let Some(line) = next(&mut live, query).await
    {
        writer.data(ndjson(function, &line)).await?;
    }
    Ok(())
}

/// The next line that is asked for; where lines were lost on this reader, one that says so. `None` when there will be
/// no more.
async fn next(live: &mut Receiver<Arc<Line>>, query: &LogQuery) -> Option<Arc<Line>> {
    loop {
        match live.recv().await {
            Ok(line) if query.wants(&line) => return Some(line),
            Ok(_) => {}
            Err(RecvError::Lagged(count)) => {
                let text =
                    format!("{count} lines are missing: they came faster than they were read");
                return Some(Arc::new(Line {
                    at: Timestamp::now(),
                    instance: "gateway".into(),
                    text,
                }));
            }
            Err(RecvError::Closed) => return None,
        }
    }
}

fn ndjson(function: &Function, line: &Line) -> Bytes {
    let mut bytes = BytesMut::new().writer();
    // Texts only: there is nothing in it that could fail.
    let _ = serde_json::to_writer(&mut bytes, &line.shown(function));
    let mut bytes = bytes.into_inner();
    bytes.put_u8(b'\n');
    bytes.freeze()
}
