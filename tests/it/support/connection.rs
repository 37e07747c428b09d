//! Raw HTTP/1.1: one end of a connection, for tests that depend on framing and on the time at which bytes arrive.

use std::net::SocketAddr;
use std::{fmt, io};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedWriteHalf;

use crate::support::within;

/// One end of a connection.
pub(crate) struct Connection {
    tcp: TcpStream,
    /// Read and not yet consumed.
    buffer: Vec<u8>,
}

/// Head of a request or a response.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    pub(crate) start: String,
    pub(crate) headers: Vec<(String, String)>,
}

/// A completely read response.
#[derive(Clone, Debug)]
pub(crate) struct Response {
    pub(crate) head: Head,
    pub(crate) body: Vec<u8>,
}

/// The peer aborted a message. Contains the received part of its body.
#[derive(Debug)]
pub(crate) struct BodyAborted(pub(crate) Vec<u8>);

impl Head {
    fn parse(text: &str) -> Self {
        let mut lines = text.split("\r\n");
        let start = lines.next().unwrap_or_default().to_owned();
        let headers = lines
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
            .collect();
        Self { start, headers }
    }

    /// First header called `name`, which is in lower case.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// Status of a response.
    pub(crate) fn status(&self) -> u16 {
        let status = self.start.split(' ').nth(1).and_then(|status| status.parse().ok());
        status.unwrap_or_else(|| panic!("no status line: {}", self.start))
    }

    /// Method of a request.
    pub(crate) fn method(&self) -> &str {
        self.start.split(' ').next().unwrap_or_default()
    }

    /// Target of a request.
    pub(crate) fn target(&self) -> &str {
        self.start.split(' ').nth(1).unwrap_or_default()
    }

    /// Framing of the body after this head.
    fn framing(&self) -> Framing {
        if self.header("transfer-encoding").is_some_and(|te| te.contains("chunked")) {
            return Framing::Chunked;
        }
        match self.header("content-length") {
            Some(length) => Framing::Length(length.parse().unwrap()),
            None if !self.start.starts_with("HTTP/") => Framing::Length(0),
            None if matches!(self.status(), 100..200 | 204 | 304) => Framing::Length(0),
            None => Framing::UntilClosed,
        }
    }
}

enum Framing {
    Chunked,
    Length(usize),
    UntilClosed,
}

impl Response {
    pub(crate) fn status(&self) -> u16 {
        self.head.status()
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head.header(name)
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {self}"))
    }
}

impl fmt::Display for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {:?}", self.head, String::from_utf8_lossy(&self.body))
    }
}

impl Connection {
    pub(crate) fn new(tcp: TcpStream) -> Self {
        tcp.set_nodelay(true).unwrap();
        Self { tcp, buffer: Vec::new() }
    }

    pub(crate) async fn connect(address: SocketAddr) -> Self {
        Self::new(TcpStream::connect(address).await.unwrap())
    }

    /// Writes all of `bytes`.
    pub(crate) async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_send(bytes).await.unwrap();
    }

    /// Writes `bytes`; an error if the peer has closed.
    pub(crate) async fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        within("writing", self.tcp.write_all(bytes.as_ref())).await
    }

    /// Writes one chunk.
    pub(crate) async fn send_chunk(&mut self, text: &str) {
        self.send(format!("{:x}\r\n{text}\r\n", text.len())).await;
    }

    /// Reads more data. Returns `false` when the peer has closed or reset the connection.
    async fn read_more(&mut self) -> bool {
        let mut piece = [0; 16 << 10];
        match within("reading", self.tcp.read(&mut piece)).await {
            Ok(0) | Err(_) => false,
            Ok(n) => {
                self.buffer.extend_from_slice(&piece[..n]);
                true
            }
        }
    }

    /// Next head; `None` if the peer closes the connection instead.
    pub(crate) async fn try_read_head(&mut self) -> Option<Head> {
        let mut searched = 0_usize;
        loop {
            let from = searched.saturating_sub(3);
            if let Some(at) = self.buffer[from..].windows(4).position(|w| w == b"\r\n\r\n") {
                let head: Vec<u8> = self.buffer.drain(..from + at + 4).collect();
                return Some(Head::parse(std::str::from_utf8(&head[..head.len() - 4]).unwrap()));
            }
            searched = self.buffer.len();
            if !self.read_more().await {
                return None;
            }
        }
    }

    /// Next head.
    pub(crate) async fn read_head(&mut self) -> Head {
        self.try_read_head().await.expect("the connection was closed before a head came")
    }

    /// The body that follows `head`.
    pub(crate) async fn read_body(&mut self, head: &Head) -> Result<Vec<u8>, BodyAborted> {
        let mut body = Vec::new();
        match head.framing() {
            Framing::Length(length) => {
                while self.buffer.len() < length {
                    if !self.read_more().await {
                        return Err(BodyAborted(std::mem::take(&mut self.buffer)));
                    }
                }
                body.extend(self.buffer.drain(..length));
            }
            Framing::Chunked => loop {
                match self.read_chunk().await {
                    Some(chunk) if chunk.is_empty() => {
                        self.read_trailers().await.ok_or_else(|| BodyAborted(body.clone()))?;
                        break;
                    }
                    Some(chunk) => body.extend(chunk),
                    None => return Err(BodyAborted(body)),
                }
            },
            Framing::UntilClosed => {
                while self.read_more().await {}
                body.append(&mut self.buffer);
            }
        }
        Ok(body)
    }

    /// Next chunk, empty at the end of the body; `None` if the connection ends before.
    pub(crate) async fn read_chunk(&mut self) -> Option<Vec<u8>> {
        let size = self.read_line().await?;
        let size = usize::from_str_radix(size.split(';').next()?, 16).expect("no chunk");
        if size == 0 {
            return Some(Vec::new());
        }
        while self.buffer.len() < size + 2 {
            if !self.read_more().await {
                return None;
            }
        }
        let chunk = self.buffer.drain(..size).collect();
        self.buffer.drain(..2);
        Some(chunk)
    }

    /// The trailers after the last chunk.
    pub(crate) async fn read_trailers(&mut self) -> Option<Vec<String>> {
        let mut trailers = Vec::new();
        loop {
            match self.read_line().await? {
                line if line.is_empty() => return Some(trailers),
                line => trailers.push(line.to_ascii_lowercase()),
            }
        }
    }

    async fn read_line(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|w| w == b"\r\n") {
                let line: Vec<u8> = self.buffer.drain(..end + 2).collect();
                return Some(String::from_utf8(line[..end].to_vec()).unwrap());
            }
            if !self.read_more().await {
                return None;
            }
        }
    }

    /// Reads until `text` has arrived, and consumes everything up to its end.
    pub(crate) async fn read_until(&mut self, text: &str) {
        loop {
            if let Some(at) = self.buffer.windows(text.len()).position(|w| w == text.as_bytes()) {
                self.buffer.drain(..at + text.len());
                return;
            }
            let came = self.read_more().await;
            assert!(came, "closed before {text:?}: {:?}", String::from_utf8_lossy(&self.buffer));
        }
    }

    /// Reads a complete response to a request other than HEAD.
    pub(crate) async fn read_response(&mut self) -> Response {
        let head = self.read_head().await;
        let body = self.read_body(&head).await.expect("the response was aborted");
        Response { head, body }
    }

    /// Sends `request` and reads the response.
    pub(crate) async fn exchange(&mut self, request: impl AsRef<[u8]>) -> Response {
        self.send(request).await;
        self.read_response().await
    }

    /// `GET target` on this connection.
    pub(crate) async fn get(&mut self, target: &str) -> Response {
        self.exchange(get(target)).await
    }

    /// Waits for the peer to close. Returns everything that it sent before.
    pub(crate) async fn read_to_close(&mut self) -> Vec<u8> {
        while self.read_more().await {}
        std::mem::take(&mut self.buffer)
    }

    /// The two directions, for simultaneous use.
    pub(crate) fn into_halves(self) -> (impl AsyncRead + Unpin + Send, OwnedWriteHalf) {
        let (read, write) = self.tcp.into_split();
        (io::Cursor::new(self.buffer).chain(read), write)
    }

    /// Returns everything that arrives until the peer closes the connection, or has sent nothing for a second.
    pub(crate) async fn read_until_idle(&mut self) -> Vec<u8> {
        let mut received = std::mem::take(&mut self.buffer);
        let mut piece = [0; 4096];
        let second = std::time::Duration::from_secs(1);
        while let Ok(Ok(read @ 1..)) = tokio::time::timeout(second, self.tcp.read(&mut piece)).await
        {
            received.extend_from_slice(&piece[..read]);
        }
        received
    }

    /// Reads and discards `length` bytes.
    pub(crate) async fn discard(&mut self, length: usize) {
        let mut missing = length.saturating_sub(self.buffer.len());
        self.buffer.drain(..length.min(self.buffer.len()));
        let mut piece = vec![0; 64 << 10];
        while missing > 0 {
            let most = missing.min(piece.len());
            let read = within("reading", self.tcp.read(&mut piece[..most])).await.unwrap();
            assert!(read > 0, "closed with {missing} bytes missing");
            missing -= read;
        }
    }

    /// Closes the write side; the read side stays open.
    pub(crate) async fn shutdown_write(&mut self) {
        self.tcp.shutdown().await.unwrap();
    }

    /// Resets the connection, as a dying process does.
    pub(crate) fn reset(self) {
        socket2::SockRef::from(&self.tcp).set_linger(Some(std::time::Duration::ZERO)).unwrap();
    }

    /// Waits without a deadline until there is data to read. Returns `false` when there will be none.
    pub(crate) async fn wait_readable(&self) -> bool {
        !self.buffer.is_empty() || self.tcp.peek(&mut [0]).await.is_ok_and(|n| n > 0)
    }
}

/// A `GET` as a client writes it.
pub(crate) fn get(target: &str) -> String {
    format!("GET {target} HTTP/1.1\r\nHost: gateway.test\r\n\r\n")
}

/// A `POST` as a client writes it.
pub(crate) fn post(target: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "POST {target} HTTP/1.1\r\nHost: gateway.test\r\nContent-Length: {length}\r\n\r\n{body}"
    )
}

/// A request with `headers`, each a line without its end, and a body of known length.
pub(crate) fn request(method: &str, target: &str, headers: &[&str], body: &str) -> String {
    let length = body.len();
    let headers: String = headers.iter().map(|line| format!("{line}\r\n")).collect();
    format!(
        "{method} {target} HTTP/1.1\r\nHost: gateway.test\r\n{headers}Content-Length: {length}\r\n\r\n{body}"
    )
}
