//! A function server that records every request byte for byte, and responds with any given bytes.

use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::support::eventually;

/// A message as it was on the wire.
#[derive(Clone, Debug)]
pub(super) struct Message {
    pub(super) start: String,
    /// Names in lower case, values unchanged.
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
    /// The message is complete.
    pub(super) whole: bool,
    /// Whether the message may have a body: it is no response to HEAD, no 1xx, 204 or 304.
    pub(super) expects_body: bool,
}

impl Message {
    /// Status, or method and target.
    pub(super) fn short_start(&self) -> &str {
        match self.start.strip_prefix("HTTP/") {
            Some(_) => self.start.split(' ').nth(1).unwrap_or_default(),
            None => self.start.rsplit_once(' ').map_or(&self.start, |(start, _)| start),
        }
    }

    /// 0 for a request.
    pub(super) fn status(&self) -> u16 {
        self.short_start().parse().unwrap_or_default()
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }
}

/// Parses the messages in `bytes` strictly. Bytes that are no message become a message whose start line is the text
/// itself.
pub(super) fn messages(bytes: &[u8], to_head: bool) -> Vec<Message> {
    let (mut found, mut rest) = (Vec::new(), bytes);
    while !rest.is_empty() {
        let to_head = to_head && found.iter().all(|message: &Message| message.status() < 200);
        let (message, length) = read(rest, to_head);
        rest = &rest[length..];
        found.push(message);
    }
    found
}

/// The first message of `bytes`, and its length.
fn read(bytes: &[u8], to_head: bool) -> (Message, usize) {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n");
    let head = String::from_utf8_lossy(&bytes[..end.unwrap_or(bytes.len())]).into_owned();
    let mut lines = head.split("\r\n");
    let start = lines.next().unwrap_or_default().to_owned();
    let headers = lines
        .map(|line| line.split_once(':').unwrap_or((line, "")))
        .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
        .collect();
    let mut message =
        Message { start, headers, body: Vec::new(), whole: false, expects_body: false };
    let Some(end) = end else { return (message, bytes.len()) };
    let is_response = message.start.starts_with("HTTP/");
    let bodiless = to_head || is_response && matches!(message.status(), 100..200 | 204 | 304);
    message.expects_body = is_response && !bodiless;
    let body = &bytes[end + 4..];
    let length = if bodiless {
        message.whole = true;
        0
    } else if message.header("transfer-encoding").is_some() {
        let (content, length, whole) = dechunk(body);
        (message.body, message.whole) = (content, whole);
        length
    } else if let Some(length) = message.header("content-length") {
        let length: usize = length.parse().unwrap_or(0);
        message.whole = body.len() >= length;
        message.body = body[..length.min(body.len())].to_vec();
        length.min(body.len())
    } else {
        message.whole = true;
        // A response without a length ends with its connection; a request without one has no body.
        let length = if is_response { body.len() } else { 0 };
        message.body = body[..length].to_vec();
        length
    };
    (message, end + 4 + length)
}

/// Content and length of a chunked body, and whether it is complete. The length includes trailers.
fn dechunk(body: &[u8]) -> (Vec<u8>, usize, bool) {
    let (mut content, mut at) = (Vec::new(), 0);
    loop {
        let Some(line) = body[at..].windows(2).position(|window| window == b"\r\n") else {
            return (content, body.len(), false);
        };
        let size = std::str::from_utf8(&body[at..at + line]).ok();
        let size =
            size.and_then(|line| usize::from_str_radix(line.split(';').next()?.trim(), 16).ok());
        let Some(size) = size else { return (content, body.len(), false) };
        at += line + 2;
        if size == 0 {
            return match body[at..].windows(4).position(|window| window == b"\r\n\r\n") {
                _ if body[at..].starts_with(b"\r\n") => (content, at + 2, true),
                Some(end) => (content, at + end + 4, true),
                None => (content, body.len(), false),
            };
        }
        let Some(chunk) = body.get(at..at + size) else {
            content.extend_from_slice(&body[at..]);
            return (content, body.len(), false);
        };
        content.extend_from_slice(chunk);
        at += size + 2;
        if at > body.len() {
            return (content, body.len(), false);
        }
    }
}

/// The recording server. It is the gateway's provider, and has every function.
pub(super) struct Upstream {
    port: u16,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    received: Vec<Message>,
    /// Response to function calls, after which the connection is closed. Without it, the response is a 200.
    response: Option<Vec<u8>>,
    /// Number of connections with an incomplete request.
    busy: usize,
}

const FINE: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
const NO_FUNCTIONS: &[u8] =
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n[]";

impl Upstream {
    pub(super) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let state: Arc<Mutex<State>> = Arc::default();
        let shared = Arc::clone(&state);
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                tokio::spawn(serve(tcp, Arc::clone(&shared)));
            }
        });
        Self { port, state }
    }

    pub(super) fn url(&self) -> String {
        format!("http://127.0.0.1:{}/", self.port)
    }

    /// Clears the record, and responds with 200 again.
    pub(super) fn clear(&self) {
        let mut state = self.state.lock().unwrap();
        state.received.clear();
        state.response = None;
    }

    /// Responds to function calls with `bytes`, and then closes the connection.
    pub(super) fn respond(&self, bytes: &[u8]) {
        self.state.lock().unwrap().response = Some(bytes.to_vec());
    }

    /// Returns the recorded requests once none is incomplete: an aborted request ends with its connection.
    pub(super) async fn received(&self) -> Vec<Message> {
        eventually("no request is incomplete", async || self.state.lock().unwrap().busy == 0).await;
        self.state.lock().unwrap().received.clone()
    }
}

async fn serve(mut tcp: TcpStream, state: Arc<Mutex<State>>) {
    let mut buffer = Vec::new();
    let mut piece = vec![0; 64 << 10];
    loop {
        let request = match buffer.is_empty() {
            true => None,
            false => Some(read(&buffer, false)).filter(|(message, _)| message.whole),
        };
        let Some((message, length)) = request else {
            match tcp.read(&mut piece).await {
                Ok(0) | Err(_) => {
                    // Bytes that are no request are recorded as well.
                    if !buffer.is_empty() {
                        let mut state = state.lock().unwrap();
                        state.received.push(read(&buffer, false).0);
                        state.busy -= 1;
                    }
                    return;
                }
                Ok(count) => {
                    state.lock().unwrap().busy += usize::from(buffer.is_empty());
                    buffer.extend_from_slice(&piece[..count]);
                }
            }
            continue;
        };
        buffer.drain(..length);
        // The gateway's own queries are not part of a row.
        let own = message.headers.iter().all(|(name, _)| name != "x-call-id");
        let response = {
            let mut state = state.lock().unwrap();
            if !own {
                state.received.push(message.clone());
            }
            state.busy -= usize::from(buffer.is_empty());
            state.response.clone().filter(|_| !own)
        };
        if let Some(bytes) = response {
            let _ = tcp.write_all(&bytes).await;
            let _ = tcp.shutdown().await;
            return;
        }
        let fine = if own { NO_FUNCTIONS } else { FINE };
        let is_head = message.start.starts_with("HEAD ");
        let bytes = if is_head { &fine[..fine.len() - 2] } else { fine };
        if tcp.write_all(bytes).await.is_err() {
            return;
        }
    }
}
