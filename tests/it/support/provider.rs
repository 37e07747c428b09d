//! A provider over real sockets. It answers the API by itself; what it does with calls of functions is the test's
//! choice: hand them to the test one by one ([`Provider::by_hand`]), or answer each in the same way.

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

use crate::support::wire::{BrokenOff, Head, Wire};
use crate::support::within;

type Next = Pin<Box<dyn Future<Output = Option<Wire>> + Send>>;
type Answering = dyn Fn(Call) -> Next + Send + Sync;
type Api = dyn Fn(&Head, &[u8]) -> Option<(u16, String)> + Send + Sync;

/// A call of a function, as the provider sees it. Closed when dropped.
pub(crate) struct Call {
    pub(crate) head: Head,
    pub(crate) wire: Wire,
}

impl Call {
    pub(crate) async fn body(&mut self) -> Result<Vec<u8>, BrokenOff> {
        self.wire.body(&self.head).await
    }

    /// Reads the request to its end, and answers it with a body of known length.
    pub(crate) async fn answer(&mut self, status: u16, body: &str) {
        self.body().await.unwrap();
        self.answer_with(status, body.as_bytes()).await;
    }

    /// Answers a request that has been read.
    pub(crate) async fn answer_with(&mut self, status: u16, body: &[u8]) {
        let length = body.len();
        let head = format!("HTTP/1.1 {status} X\r\nContent-Length: {length}\r\n\r\n");
        self.wire.send([head.as_bytes(), body].concat()).await;
    }
}

/// Requests to scale wait here until it is opened.
pub(crate) struct Gate {
    waiting: Mutex<Vec<String>>,
    open: Semaphore,
}

impl Gate {
    pub(crate) fn closed() -> Arc<Self> {
        Arc::new(Self { waiting: Mutex::default(), open: Semaphore::new(0) })
    }

    /// What has come here, as targets.
    pub(crate) fn waiting(&self) -> Vec<String> {
        self.waiting.lock().unwrap().clone()
    }

    pub(crate) fn open(&self) {
        self.open.close();
    }

    async fn pass(&self, head: &Head) {
        if head.target().starts_with("/system/scale-function/") {
            self.waiting.lock().unwrap().push(head.target().to_owned());
            // It is never given a place: it passes when the gate is open.
            assert!(self.open.acquire().await.is_err());
        }
    }
}

/// The running provider. Gone, with its connections, when dropped.
pub(crate) struct Provider {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
    calls: mpsc::UnboundedReceiver<Call>,
    task: tokio::task::JoinHandle<()>,
}

struct Shared {
    functions: Mutex<String>,
    api: Option<Box<Api>>,
    answering: Option<Box<Answering>>,
    gate: Option<Arc<Gate>>,
    handed: mpsc::UnboundedSender<Call>,
    connections: AtomicUsize,
    calls: AtomicUsize,
    /// Requests of the API, without those that the gateway makes on its own.
    asked: Mutex<Vec<(Head, Vec<u8>)>>,
}

/// How a provider is to be.
pub(crate) struct Builder {
    functions: String,
    api: Option<Box<Api>>,
    answering: Option<Box<Answering>>,
    gate: Option<Arc<Gate>>,
    address: SocketAddr,
}

impl Builder {
    /// The functions it lists, as JSON.
    pub(crate) fn lists(mut self, functions: &str) -> Self {
        functions.clone_into(&mut self.functions);
        self
    }

    /// Status and body for requests of the API that `api` has an answer to.
    pub(crate) fn api(
        mut self,
        api: impl Fn(&Head, &[u8]) -> Option<(u16, String)> + Send + Sync + 'static,
    ) -> Self {
        self.api = Some(Box::new(api));
        self
    }

    /// What it does with each call; `Some` keeps the connection open.
    pub(crate) fn answering<F>(
        mut self,
        answering: impl Fn(Call) -> F + Send + Sync + 'static,
    ) -> Self
    where
        F: Future<Output = Option<Wire>> + Send + 'static,
    {
        self.answering = Some(Box::new(move |call| Box::pin(answering(call))));
        self
    }

    /// Where requests to scale wait before it heeds them.
    pub(crate) fn behind(mut self, gate: &Arc<Gate>) -> Self {
        self.gate = Some(Arc::clone(gate));
        self
    }

    /// Where it listens, instead of on a free port.
    pub(crate) fn at(mut self, address: SocketAddr) -> Self {
        self.address = address;
        self
    }

    pub(crate) fn start(self) -> Provider {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(self.address).unwrap();
        let listener = socket.listen(4096).unwrap();
        let address = listener.local_addr().unwrap();
        let (handed, calls) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            functions: Mutex::new(self.functions),
            api: self.api,
            answering: self.answering,
            gate: self.gate,
            handed,
            connections: AtomicUsize::new(0),
            calls: AtomicUsize::new(0),
            asked: Mutex::default(),
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
            answering: None,
            gate: None,
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
        }
    }

    /// One whose calls the test answers itself.
    pub(crate) fn by_hand() -> Self {
        Self::builder().start()
    }

    /// One that answers every call with 200 and `text`.
    pub(crate) fn saying(text: &'static str) -> Self {
        Self::builder().answering(move |call| always(call, text)).start()
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The next call, handed over.
    pub(crate) async fn call(&mut self) -> Call {
        within("waiting for a call to reach the provider", self.calls.recv()).await.unwrap()
    }

    /// Lists `functions` from now on.
    pub(crate) fn lists(&self, functions: &str) {
        functions.clone_into(&mut self.shared.functions.lock().unwrap());
    }

    /// Takes the connection of a call back, for the next one on it.
    pub(crate) fn keep(&self, call: Call) {
        tokio::spawn(serve(call.wire, Arc::clone(&self.shared)));
    }

    /// How many connections were made to it.
    pub(crate) fn connections(&self) -> usize {
        self.shared.connections.load(SeqCst)
    }

    /// How many calls of functions have reached it.
    pub(crate) fn calls(&self) -> usize {
        self.shared.calls.load(SeqCst)
    }

    /// Requests of the API that were made of it on a caller's behalf, or for a call.
    pub(crate) fn asked(&self) -> Vec<(Head, Vec<u8>)> {
        self.shared.asked.lock().unwrap().clone()
    }
}

impl Drop for Provider {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Answers a call with 200 and `text`, and keeps the connection.
pub(crate) async fn always(mut call: Call, text: &str) -> Option<Wire> {
    call.answer(200, text).await;
    Some(call.wire)
}

async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        let Ok((tcp, _)) = listener.accept().await else { return };
        shared.connections.fetch_add(1, SeqCst);
        connections.spawn(serve(Wire::new(tcp), Arc::clone(&shared)));
        while connections.try_join_next().is_some() {}
    }
}

async fn serve(mut wire: Wire, shared: Arc<Shared>) {
    // An idle connection may stay so for longer than a test waits for anything.
    while wire.readable().await
        && let Some(head) = wire.try_head().await
    {
        if head.target().starts_with("/function/") {
            shared.calls.fetch_add(1, SeqCst);
            let call = Call { head, wire };
            match &shared.answering {
                Some(answering) => match answering(call).await {
                    Some(kept) => wire = kept,
                    None => return,
                },
                None => {
                    let _ = shared.handed.send(call);
                    return;
                }
            }
            continue;
        }
        let Ok(body) = wire.body(&head).await else { return };
        if let Some(gate) = &shared.gate {
            gate.pass(&head).await;
        }
        let (status, text) = shared.answer(&head, body);
        let length = text.len();
        let answer = format!(
            "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{text}"
        );
        if wire.try_send(answer).await.is_err() {
            return;
        }
    }
}

impl Shared {
    fn answer(&self, head: &Head, body: Vec<u8>) -> (u16, String) {
        let scripted = self.api.as_ref().and_then(|api| api(head, &body));
        let forwarded = head.header("x-forwarded-for").is_some();
        let noted = ["/system/function/", "/v1/traces"];
        if forwarded || noted.iter().any(|start| head.target().starts_with(start)) {
            self.asked.lock().unwrap().push((head.clone(), body));
        }
        scripted.unwrap_or_else(|| match head.target().split('?').next() {
            Some("/system/functions") => (200, self.functions.lock().unwrap().clone()),
            Some("/system/namespaces") => (200, "[]".to_owned()),
            Some("/healthz") => (200, "OK".to_owned()),
            _ => (404, "not scripted".to_owned()),
        })
    }
}
