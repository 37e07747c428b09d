//! Recent and live log lines of functions. Kept in bounded memory: logs are empty after a restart of the provider.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use jiff::Timestamp;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::broadcast;

use crate::backend::LogQuery;
use crate::process::line_splitter::LineSplitter;
use crate::process::log_entry::{LogEntry, select};
use gateway_base::sync::lock_unpoisoned;

/// Maximum number of lines kept for a function, and their maximum total size in bytes.
const MAX_LINES: usize = 4000;
const MAX_LOG_BYTES: usize = 1 << 20;
/// Number of lines that a follower may fall behind before it misses lines.
const FOLLOWER_CAPACITY: usize = 512;
/// Buffer size for reading output.
const READ_CHUNK_BYTES: usize = 8 << 10;

/// The logs of one function.
#[derive(Debug)]
pub(super) struct Logs {
    /// A leaf. A line is sent to `live` under it, so that a follower gets each line exactly once.
    buffer: Mutex<LogBuffer>,
    live: broadcast::Sender<Arc<LogEntry>>,
}

#[derive(Debug, Default)]
struct LogBuffer {
    entries: VecDeque<Arc<LogEntry>>,
    bytes: usize,
}

impl Logs {
    pub(super) fn new() -> Self {
        Self { buffer: Mutex::default(), live: broadcast::Sender::new(FOLLOWER_CAPACITY) }
    }

    /// Adds a line of `instance`.
    pub(super) fn write(&self, instance: &Arc<str>, text: impl Into<String>) {
        let line =
            LogEntry { at: Timestamp::now(), instance: Arc::clone(instance), text: text.into() };
        let line = Arc::new(line);
        let mut buffer = lock_unpoisoned(&self.buffer);
        buffer.push(Arc::clone(&line));
        // Under the lock: a follower gets the line from the buffer or from the channel.
        let _ = self.live.send(line);
    }

    /// Adds the lines of `source` until its end.
    pub(super) async fn write_all(&self, instance: Arc<str>, mut source: impl AsyncRead + Unpin) {
        let mut lines = LineSplitter::default();
        let mut buffer = [0; READ_CHUNK_BYTES];
        while let Ok(count @ 1..) = source.read(&mut buffer).await {
            lines.push(&buffer[..count], |line| self.write(&instance, line));
        }
        lines.finish(|line| self.write(&instance, line));
    }

    /// Returns the last non-blank line of `instance`; empty if there is none.
    pub(super) fn last_line_of(&self, instance: &str) -> String {
        let buffer = lock_unpoisoned(&self.buffer);
        let mut own = buffer.entries.iter().rev().filter(|line| &*line.instance == instance);
        let last = own.find(|line| !line.text.trim().is_empty());
        last.map(|line| line.text.clone()).unwrap_or_default()
    }

    /// Returns the lines that `query` selects, and a receiver of future lines.
    pub(super) fn read(
        &self,
        query: &LogQuery,
    ) -> (Vec<Arc<LogEntry>>, broadcast::Receiver<Arc<LogEntry>>) {
        let buffer = lock_unpoisoned(&self.buffer);
        (select(query, &buffer.entries), self.live.subscribe())
    }
}

impl LogBuffer {
    fn push(&mut self, line: Arc<LogEntry>) {
        self.bytes += line.text.len();
        self.entries.push_back(line);
        while self.entries.len() > MAX_LINES || self.bytes > MAX_LOG_BYTES {
            let Some(oldest) = self.entries.pop_front() else { break };
            self.bytes -= oldest.text.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use gateway_base::function::Function;

    use super::*;

    #[test]
    fn the_oldest_lines_are_dropped() {
        let logs = Logs::new();
        let instance: Arc<str> = "f-1".into();
        for i in 0..MAX_LINES + 10 {
            logs.write(&instance, format!("line {i}"));
        }
        let lines = logs.read(&LogQuery::default()).0;
        assert_eq!((lines.len(), lines[0].text.as_str()), (MAX_LINES, "line 10"));
        for _ in 0..20 {
            logs.write(&instance, "x".repeat(MAX_LOG_BYTES / 10));
        }
        let lines = logs.read(&LogQuery::default()).0;
        assert!(lines.iter().map(|line| line.text.len()).sum::<usize>() <= MAX_LOG_BYTES);
        assert_eq!(lines.len(), 10);
    }

    #[tokio::test]
    async fn a_follower_gets_each_line_once() {
        let logs = Logs::new();
        let instance: Arc<str> = "f-1".into();
        logs.write(&instance, "before");
        let (lines, mut live) = logs.read(&LogQuery::default());
        logs.write(&instance, "after");
        assert_eq!(lines.iter().map(|line| line.text.as_str()).collect::<Vec<_>>(), ["before"]);
        assert_eq!(live.recv().await.unwrap().text, "after");
        assert!(live.try_recv().is_err());
    }

    #[tokio::test]
    async fn output_is_logged_line_by_line() {
        let logs = Logs::new();
        logs.write_all("f-1".into(), &b"one\ntwo\r\n\nthree"[..]).await;
        let lines = logs.read(&LogQuery::default()).0;
        let texts: Vec<_> = lines.iter().map(|line| line.text.as_str()).collect();
        assert_eq!(texts, ["one", "two", "", "three"]);
        let function = Function { name: "f".to_owned(), namespace: "ns".to_owned() };
        let log_line = lines[0].to_log_line(&function);
        assert_eq!((log_line.name.as_str(), log_line.instance.as_str()), ("f", "f-1"));
        assert!(log_line.timestamp.ends_with('Z'), "{}", log_line.timestamp);
    }
}
