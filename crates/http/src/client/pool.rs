//! HTTP client for upstreams with a pool of idle connections. Each proxy thread has its own.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use foldhash::fast::RandomState;
use http::{HeaderValue, Request, Response, Uri};
use tokio::net::lookup_host;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::client::body::{RequestBody, RequestBodyError};
use crate::client::buffer_pool;
use crate::client::dial::dial;
use crate::client::egress_filter::{AddressDenied, EgressFilter};
use crate::client::http1::connection::{ExchangeError, Http1Connection};
use crate::client::http1::request_writer::RequestWriter;
use crate::client::http1::wire::ParseError;
use crate::client::http1::wire::response::ResponseHead;
use crate::client::io::MaybeTlsStream;
use crate::client::upstream_body::UpstreamBody;
use crate::deadlines::ExchangeDeadlines;
use gateway_base::base_url::BaseUrl;
use gateway_base::sync::lock_unpoisoned;

/// An idle connection is closed after this time. Most servers close theirs after 60 s or later.
const MAX_IDLE_TIME: Duration = Duration::from_secs(50);
/// Interval at which idle connections are checked.
const REAP_INTERVAL: Duration = Duration::from_secs(5);
/// Default time for one address to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Time to resolve a name.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Time for a TLS handshake.
const TLS_TIMEOUT: Duration = Duration::from_secs(10);

/// Limits of the pool of idle upstream connections.
#[derive(Clone, Copy, Debug)]
pub struct PoolLimits {
    /// `max_idle_conns`
    pub total: usize,
    /// `max_idle_conns_per_host`
    pub per_host: usize,
}

/// An upstream, with values that every request to it needs.
#[derive(Clone, Debug)]
pub struct Origin {
    /// Base URL of the upstream.
    pub url: Arc<BaseUrl>,
    /// Scheme and address: the key of idle connections in the pool. Base URLs with different paths share connections.
    pub(super) endpoint: Arc<str>,
    /// Value of the `Host` header.
    pub host: HeaderValue,
}

impl Origin {
    /// Precomputes the endpoint and the `Host` header of `url`.
    pub fn new(url: BaseUrl) -> Self {
        let host = HeaderValue::from_str(url.authority.as_str())
            .unwrap_or_else(|_| HeaderValue::from_static("upstream"));
        let scheme = if url.tls { "https" } else { "http" };
        let endpoint = format!("{scheme}://{}:{}", url.host(), url.port()).into();
        Self { endpoint, url: Arc::new(url), host }
    }

    /// Prefix of all paths at this upstream; usually empty.
    pub(super) fn path(&self) -> &str {
        &self.url.path
    }

    /// Returns `target` (path and query) with the path prefix of this origin.
    ///
    /// # Errors
    /// When the result is not a valid URI, usually because it is too long.
    pub fn target(&self, target: &Uri) -> Result<Uri, http::Error> {
        let path = target.path_and_query().map_or("/", |path| path.as_str());
        match (self.url.path.as_str(), target.path_and_query()) {
            // Unchanged, byte for byte.
            ("", Some(path)) => Ok(Uri::from(path.clone())),
            (prefix, _) => Uri::builder().path_and_query(format!("{prefix}{path}")).build(),
        }
    }
}

/// Why there is no response from an upstream. The text contains no address of the upstream.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot connect to the upstream: {}", public_io_message(.0))]
    Connect(#[source] io::Error),
    #[error("the address is not allowed")]
    NotAllowed,
    #[error("the address is this gateway's own")]
    OwnAddress,
    #[error("no more connections can be opened")]
    Exhausted(#[source] io::Error),
    #[error("the upstream closed the connection without a response")]
    Closed(#[source] io::Error),
    #[error("the upstream's response is not valid HTTP")]
    InvalidResponse(#[source] ParseError),
    #[error("the upstream's response has a head of more than 1 MiB, or more than 100 headers")]
    HeadTooLarge,
    #[error("the upstream changed protocols without a request to do so")]
    UnexpectedUpgrade,
    #[error("the upstream did not respond in time")]
    Timeout,
    #[error("the path is too long")]
    InvalidTarget(#[from] http::Error),
    #[error(transparent)]
    RequestBody(RequestBodyError),
}

impl Error {
    /// Returns whether no byte of the request has reached an upstream.
    pub fn is_connect(&self) -> bool {
        matches!(self, Self::Connect(_))
    }
}

/// Distinguishes failures of the upstream from a lack of local resources and from denied addresses.
fn classify_connect_error(error: io::Error) -> Error {
    use rustix::io::Errno;
    match error.get_ref().and_then(|cause| cause.downcast_ref::<AddressDenied>()) {
        Some(AddressDenied::NotAllowed) => return Error::NotAllowed,
        Some(AddressDenied::OwnAddress) => return Error::OwnAddress,
        None => {}
    }
    let out_of = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::ADDRNOTAVAIL];
    if Errno::from_io_error(&error).is_some_and(|errno| out_of.contains(&errno)) {
        tracing::warn!(%error, "No more connections can be opened");
        return Error::Exhausted(error);
    }
    Error::Connect(error)
}

/// Describes `error` without an address.
fn public_io_message(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused",
        io::ErrorKind::ConnectionReset => "connection reset",
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => "no route to host",
        io::ErrorKind::TimedOut => "no reply to the connection attempt",
        io::ErrorKind::InvalidData => "TLS failed",
        // Errors of the resolver have no OS error code.
        _ if error.raw_os_error().is_none() => "the name cannot be resolved",
        _ => "network error",
    }
}

/// Sends requests over pooled connections.
pub struct Client {
    /// The idle connections. A leaf: a connection is opened and used without it.
    pool: Mutex<Pool>,
    limits: PoolLimits,
    tls: Tls,
    /// Time for one address to accept a connection.
    connect_timeout: Duration,
    /// Decides which addresses may be connected to; `None` allows all.
    egress_filter: Option<Box<dyn EgressFilter>>,
    /// Check the socket of an idle connection for data or a close before the connection is used.
    checks_before_use: bool,
}

#[derive(Default)]
struct Pool {
    idle: HashMap<Arc<str>, Vec<IdleConnection>, RandomState>,
    count: usize,
}

struct IdleConnection {
    connection: Box<Http1Connection>,
    idle_since: Instant,
}

impl Client {
    /// Creates a client whose pool is bounded by `limits`.
    pub fn new(limits: PoolLimits, tls: Tls) -> Arc<Self> {
        Self::with_connect_timeout(CONNECT_TIMEOUT, limits, tls)
    }

    /// The same, with `connect_timeout` for each address of an upstream before the next one is tried.
    pub fn with_connect_timeout(
        connect_timeout: Duration,
        limits: PoolLimits,
        tls: Tls,
    ) -> Arc<Self> {
        Arc::new(Self {
            pool: Mutex::default(),
            limits,
            tls,
            connect_timeout,
            egress_filter: None,
            checks_before_use: false,
        })
    }

    /// Creates a client for processes of this machine, which may be killed at any time.
    ///
    /// It checks the socket of each idle connection before it uses the connection: the runtime learns of a close a
    /// moment later, and a request written in that moment may or may not have been read by the process.
    pub fn for_local_processes(limits: PoolLimits) -> Arc<Self> {
        Arc::new(Self {
            pool: Mutex::default(),
            limits,
            tls: Tls::default(),
            connect_timeout: CONNECT_TIMEOUT,
            egress_filter: None,
            checks_before_use: true,
        })
    }

    /// Creates a client that connects only to addresses allowed by `egress_filter`. The filter is called for each
    /// connection, because the addresses of a name may change.
    pub fn with_egress_filter(
        limits: PoolLimits,
        tls: Tls,
        egress_filter: impl EgressFilter + 'static,
    ) -> Arc<Self> {
        let egress_filter: Option<Box<dyn EgressFilter>> = Some(Box::new(egress_filter));
        let connect_timeout = CONNECT_TIMEOUT;
        Arc::new(Self {
            pool: Mutex::default(),
            limits,
            tls,
            connect_timeout,
            egress_filter,
            checks_before_use: false,
        })
    }

    /// Sends `request`, whose headers are not changed, and returns when the head of the response has been received.
    ///
    /// # Errors
    /// When there is no response. After `Error::Connect` the request may be sent again.
    pub async fn send(
        self: &Arc<Self>,
        origin: &Origin,
        request: Request<RequestBody>,
        deadlines: &Arc<ExchangeDeadlines>,
    ) -> Result<Response<UpstreamBody>, Error> {
        let (head, body) = request.into_parts();
        self.send_request(origin, &mut RequestWriter::new(&head, body), deadlines).await
    }

    /// Sends a request to `origin`, and returns when the head of the response has been received. `deadlines` applies to
    /// the whole exchange, including the response body.
    ///
    /// An idle connection that turns out to be closed is replaced if nothing of the request was sent, or if the request
    /// is safe to resend. After `Error::Connect`, `request` is complete and can be sent again.
    pub(super) async fn send_request(
        self: &Arc<Self>,
        origin: &Origin,
        request: &mut RequestWriter,
        deadlines: &Arc<ExchangeDeadlines>,
    ) -> Result<Response<UpstreamBody>, Error> {
        let safe_to_resend = request.is_safe_to_resend();
        let mut closed = None;
        while let Some(mut connection) = self.check_out(&origin.endpoint) {
            if self.checks_before_use && connection.is_readable() {
                continue;
            }
            match connection.send_request(request, deadlines).await {
                Ok(response) => {
                    return Ok(self.build_response(origin, connection, response, deadlines));
                }
                Err(ExchangeError::NotSent(unsent)) => *request = unsent,
                Err(ExchangeError::Closed(error))
                    if safe_to_resend && connection.can_recover_request() =>
                {
                    tracing::debug!(%error, "An idle connection was closed: trying a new one");
                    (*request, closed) = (connection.into_request(), Some(error));
                    break;
                }
                Err(error) => return Err(error.into()),
            }
        }
        // Boxed, so that this future does not increase the size of every exchange.
        let opened = Box::pin(self.connect(origin, deadlines)).await;
        let error = match opened {
            Ok(mut connection) => match connection.send_request(request, deadlines).await {
                Ok(response) => {
                    return Ok(self.build_response(origin, connection, response, deadlines));
                }
                // A connection that was opened for this request.
                Err(ExchangeError::NotSent(unsent)) => {
                    *request = unsent;
                    Error::Connect(io::ErrorKind::ConnectionReset.into())
                }
                Err(error) => error.into(),
            },
            Err(error) => error,
        };
        // An earlier upstream connection may have received the request.
        Err(match closed {
            Some(closed) if error.is_connect() => Error::Closed(closed),
            _ => error,
        })
    }

    fn build_response(
        self: &Arc<Self>,
        origin: &Origin,
        connection: Box<Http1Connection>,
        head: ResponseHead,
        deadlines: &Arc<ExchangeDeadlines>,
    ) -> Response<UpstreamBody> {
        let (client, endpoint, deadlines) =
            (Arc::clone(self), Arc::clone(&origin.endpoint), Arc::clone(deadlines));
        head.response
            .map(|()| UpstreamBody::new(head.body, connection, client, endpoint, deadlines))
    }

    async fn connect(
        &self,
        origin: &Origin,
        deadlines: &ExchangeDeadlines,
    ) -> Result<Box<Http1Connection>, Error> {
        let mut connect = std::pin::pin!(self.open_stream(&origin.url));
        let stream = std::future::poll_fn(|cx| {
            if deadlines.is_expired() {
                return std::task::Poll::Ready(Err(Error::Timeout));
            }
            connect.as_mut().poll(cx).map_err(classify_connect_error)
        })
        .await?;
        Ok(Box::new(Http1Connection::new(stream)))
    }

    async fn open_stream(&self, url: &BaseUrl) -> io::Result<MaybeTlsStream> {
        let resolved = timeout(RESOLVE_TIMEOUT, lookup_host((url.host(), url.port()))).await??;
        let addresses = match &self.egress_filter {
            None => resolved.collect(),
            Some(egress_filter) => {
                timeout(RESOLVE_TIMEOUT, egress_filter.filter(url.host(), resolved.collect()))
                    .await?
                    .map_err(io::Error::other)?
            }
        };
        let tcp = dial(&addresses, self.connect_timeout).await?;
        tcp.set_nodelay(true)?;
        // Detects a vanished peer on streams without a deadline.
        socket2::SockRef::from(&tcp).set_keepalive(true)?;
        if !url.tls {
            return Ok(MaybeTlsStream::Plain(tcp));
        }
        let name = ServerName::try_from(url.host().to_owned()).map_err(io::Error::other)?;
        let tls = timeout(TLS_TIMEOUT, self.tls.connector().connect(name, tcp)).await??;
        Ok(MaybeTlsStream::Tls(Box::new(tls)))
    }

    fn check_out(&self, endpoint: &str) -> Option<Box<Http1Connection>> {
        let mut pool = lock_unpoisoned(&self.pool);
        let connection = pool.idle.get_mut(endpoint)?.pop()?.connection;
        pool.count -= 1;
        Some(connection)
    }

    /// Returns a connection to the pool after the end of its response, if it is reusable.
    pub(super) fn check_in(
        &self,
        endpoint: &Arc<str>,
        connection: Box<Http1Connection>,
        now: Instant,
    ) {
        if !connection.is_reusable() {
            return;
        }
        let mut pool = lock_unpoisoned(&self.pool);
        if pool.count >= self.limits.total {
            return;
        }
        let idle = match pool.idle.get_mut(&**endpoint) {
            Some(idle) => idle,
            None => pool.idle.entry(Arc::clone(endpoint)).or_default(),
        };
        if idle.len() < self.limits.per_host {
            idle.push(IdleConnection { connection, idle_since: now });
            pool.count += 1;
        }
    }

    /// Closes connections that were closed by the peer or idle for too long, and frees pooled buffers of this thread,
    /// at intervals of `REAP_INTERVAL`. Never returns.
    pub async fn run_idle_reaper(&self) {
        loop {
            tokio::time::sleep(REAP_INTERVAL).await;
            // Unconstrained: beyond the task's budget, the runtime reports each connection as not readable.
            tokio::task::unconstrained(async { self.reap() }).await;
            buffer_pool::clear();
        }
    }

    fn reap(&self) {
        let mut pool = lock_unpoisoned(&self.pool);
        let Pool { idle, count } = &mut *pool;
        let now = Instant::now();
        idle.retain(|_, connections| {
            connections.retain_mut(|idle| {
                now.duration_since(idle.idle_since) < MAX_IDLE_TIME
                    && idle.connection.prepare_idle()
            });
            !connections.is_empty()
        });
        *count = idle.values().map(Vec::len).sum();
    }
}

impl From<ExchangeError> for Error {
    fn from(error: ExchangeError) -> Self {
        match error {
            ExchangeError::Expired => Self::Timeout,
            ExchangeError::NotSent(_) => Self::Connect(io::ErrorKind::ConnectionReset.into()),
            ExchangeError::Closed(error) => Self::Closed(error),
            ExchangeError::InvalidResponse(error) => Self::InvalidResponse(error),
            ExchangeError::HeadTooLarge => Self::HeadTooLarge,
            ExchangeError::RequestBody(error) => Self::RequestBody(error),
        }
    }
}

/// TLS to upstreams. The system's root certificates are read for the first https upstream; most gateways have none.
#[derive(Clone, Default)]
pub struct Tls(Arc<OnceLock<TlsConnector>>);

impl Tls {
    fn connector(&self) -> &TlsConnector {
        self.0.get_or_init(|| {
            let mut roots = RootCertStore::empty();
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                tracing::warn!("The system has no certificates: calls over https will fail");
            }
            let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
                .with_safe_default_protocol_versions()
                .unwrap_or_else(|_| unreachable!("ring has the default protocol versions"))
                .with_root_certificates(roots)
                .with_no_client_auth();
            TlsConnector::from(Arc::new(config))
        })
    }
}
