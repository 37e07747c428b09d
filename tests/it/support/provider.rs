//! A provider over real sockets. It serves the API by itself. Function calls are handed to the test one by one
//! ([`Provider::manual`]), or served by a handler.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

use crate::support::connection::{BodyAborted, Connection, Head};
use crate::support::within;

type HandlerFuture = Pin<Box<dyn Future<Output = Option<Connection>> + Send>>;
type Handler = dyn Fn(Invocation) -> HandlerFuture + Send + Sync;
type Api = dyn Fn(&Head, &[u8]) -> Option<(u16, String)> + Send + Sync;

/// A function call, as the provider sees it. Closed when dropped.
pub(crate) struct Invocation {
    pub(crate) head: Head,
    pub(crate) connection: Connection,
}

impl Invocation {
    pub(crate) async fn read_body(&mut self) -> Result<Vec<u8>, BodyAborted> {
        self.connection.read_body(&self.head).await
    }

    /// Reads the request to its end, and responds with a body of known length.
    pub(crate) async fn respond(&mut self, status: u16, body: &str) {
        self.read_body().await.unwrap();
        self.send_response(status, body.as_bytes()).await;
    }

    /// Responds to a request that has been read.
    pub(crate) async fn send_response(&mut self, status: u16, body: &[u8]) {
        let length = body.len();
        let head = format!("HTTP/1.1 {status} X\r\nContent-Length: {length}\r\n\r\n");
        self.connection.send([head.as_bytes(), body].concat()).await;
    }
}

/// Scale requests wait here until the gate is opened.
pub(crate) struct ScaleGate {
    waiting: Mutex<Vec<String>>,
    open: Semaphore,
}

impl ScaleGate {
    pub(crate) fn closed() -> Arc<Self> {
        Arc::new(Self { waiting: Mutex::default(), open: Semaphore::new(0) })
    }

    /// Targets of the waiting requests.
    pub(crate) fn waiting(&self) -> Vec<String> {
        self.waiting.lock().unwrap().clone()
    }

    pub(crate) fn open(&self) {
        self.open.close();
    }

    async fn pass(&self, head: &Head) {
        if head.target().starts_with("/system/scale-function/") {
            self.waiting.lock().unwrap().push(head.target().to_owned());
            // There is never a permit: acquiring fails when the gate is opened.
            assert!(self.open.acquire().await.is_err());
        }
    }
}

/// The running provider. It ends, with its connections, when dropped.
pub(crate) struct Provider {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
    calls: mpsc::UnboundedReceiver<Invocation>,
    task: tokio::task::JoinHandle<()>,
}

struct Shared {
    functions: Mutex<String>,
    api: Option<Box<Api>>,
    handler: Option<Box<Handler>>,
    gate: Option<Arc<ScaleGate>>,
    manual_calls: mpsc::UnboundedSender<Invocation>,
    connections: AtomicUsize,
    calls: AtomicUsize,
    /// API requests, without those that the gateway sends on its own.
    api_requests: Mutex<Vec<(Head, Vec<u8>)>>,
}

/// Configuration of a provider to start.
pub(crate) struct Builder {
    functions: String,
    api: Option<Box<Api>>,
    handler: Option<Box<Handler>>,
    gate: Option<Arc<ScaleGate>>,
    address: SocketAddr,
}

impl Builder {
    /// The function list, as JSON.
    pub(crate) fn listing(mut self, functions: &str) -> Self {
        functions.clone_into(&mut self.functions);
        self
    }

    /// Status and body for the API requests for which `api` returns a response.
    pub(crate) fn api(
        mut self,
        api: impl Fn(&Head, &[u8]) -> Option<(u16, String)> + Send + Sync + 'static,
    ) -> Self {
        self.api = Some(Box::new(api));
        self
    }

    /// Handler of function calls; `Some` keeps the connection open.
    pub(crate) fn handler<F>(
        mut self,
        handler: impl Fn(Invocation) -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Option<Connection>> + Send + 'static,
    {
        self.handler = Some(Box::new(move |call| Box::pin(handler(call))));
        self
    }

    /// Makes scale requests wait at `gate`.
    pub(crate) fn scale_gate(mut self, gate: &Arc<ScaleGate>) -> Self {
        self.gate = Some(Arc::clone(gate));
        self
    }

    /// The address to listen on, instead of a free port.
    pub(crate) fn listen_on(mut self, address: SocketAddr) -> Self {
        self.address = address;
        self
    }

    pub(crate) fn start(self) -> Provider {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(self.address).unwrap();
        let listener = socket.listen(4096).unwrap();
        let address = listener.local_addr().unwrap();
        let (manual_calls, calls) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            functions: Mutex::new(self.functions),
            api: self.api,
            handler: self.handler,
            gate: self.gate,
            manual_calls,
            connections: AtomicUsize::new(0),
            calls: AtomicUsize::new(0),
            api_requests: Mutex::default(),
        });
        let task = tokio::spawn(accept(listener, Arc::clone(&shared)));
        Provider { address, shared, calls, task }
    }
}

impl Provider {
    pub(crate) fn builder() -> Builder {
        Builder {
            functions: "[]".to_owned(),
            api: None,
            handler: None,
            gate: None,
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
        }
    }

    /// A provider whose calls the test answers.
    pub(crate) fn manual() -> Self {
        Self::builder().start()
    }

    /// A provider that responds to every call with 200 and `text`.
    pub(crate) fn replying(text: &'static str) -> Self {
        Self::builder().handler(move |call| respond_ok(call, text)).start()
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The next function call.
    pub(crate) async fn next_call(&mut self) -> Invocation {
        within("waiting for a call to reach the provider", self.calls.recv()).await.unwrap()
    }

    /// Replaces the function list.
    pub(crate) fn set_functions(&self, functions: &str) {
        functions.clone_into(&mut self.shared.functions.lock().unwrap());
    }

    /// Serves further requests on the connection of a call.
    pub(crate) fn reuse_connection(&self, call: Invocation) {
        tokio::spawn(serve(call.connection, Arc::clone(&self.shared)));
    }

    /// Number of accepted connections.
    pub(crate) fn connection_count(&self) -> usize {
        self.shared.connections.load(SeqCst)
    }

    /// Number of received function calls.
    pub(crate) fn call_count(&self) -> usize {
        self.shared.calls.load(SeqCst)
    }

    /// API requests on behalf of a client, or for a call.
    pub(crate) fn api_requests(&self) -> Vec<(Head, Vec<u8>)> {
        self.shared.api_requests.lock().unwrap().clone()
    }
}

impl Drop for Provider {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Responds with 200 and `text`, and keeps the connection.
pub(crate) async fn respond_ok(mut call: Invocation, text: &str) -> Option<Connection> {
    call.respond(200, text).await;
    Some(call.connection)
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        let Ok((tcp, _)) = listener.accept().await else { return };
        shared.connections.fetch_add(1, SeqCst);
        connections.spawn(serve(Connection::new(tcp), Arc::clone(&shared)));
        while connections.try_join_next().is_some() {}
    }
}

async fn serve(mut connection: Connection, shared: Arc<Shared>) {
    // An idle connection may stay idle for longer than the deadline of a test.
    while connection.wait_readable().await
        && let Some(head) = connection.try_read_head().await
    {
        if head.target().starts_with("/function/") {
            shared.calls.fetch_add(1, SeqCst);
            let call = Invocation { head, connection };
            match &shared.handler {
                Some(handler) => match handler(call).await {
                    Some(kept) => connection = kept,
                    None => return,
                },
                None => {
                    let _ = shared.manual_calls.send(call);
                    return;
                }
            }
            continue;
        }
        let Ok(body) = connection.read_body(&head).await else { return };
        if let Some(gate) = &shared.gate {
            gate.pass(&head).await;
        }
        let (status, text) = shared.api_response(&head, body);
        let length = text.len();
        let response = format!(
            "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{text}"
        );
        if connection.try_send(response).await.is_err() {
            return;
        }
    }
}

impl Shared {
    fn api_response(&self, head: &Head, body: Vec<u8>) -> (u16, String) {
        let scripted = self.api.as_ref().and_then(|api| api(head, &body));
        let forwarded = head.header("x-forwarded-for").is_some();
        let noted = ["/system/function/", "/v1/traces"];
        if forwarded || noted.iter().any(|start| head.target().starts_with(start)) {
            self.api_requests.lock().unwrap().push((head.clone(), body));
        }
        scripted.unwrap_or_else(|| match head.target().split('?').next() {
            Some("/system/functions") => (200, self.functions.lock().unwrap().clone()),
            Some("/system/namespaces") => (200, "[]".to_owned()),
            Some("/healthz") => (200, "OK".to_owned()),
            _ => (404, "not scripted".to_owned()),
        })
    }
}
