//! Connections to upstreams: a pool of idle links, one pool for each thread that carries calls.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use foldhash::fast::RandomState;
use http::{HeaderValue, Request, Response, Uri};
use tokio::net::lookup_host;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::config::PoolLimits;
use crate::config::base_url::BaseUrl;
use crate::proxy::body::{BodyError, RequestBody};
use crate::proxy::buffers;
use crate::proxy::dial::dial;
use crate::proxy::guard::{Guard, Refused};
use crate::proxy::link::{Failure, Link};
use crate::proxy::stream::UpstreamStream;
use crate::proxy::upload::Upload;
use crate::proxy::upstream_body::UpstreamBody;
use crate::proxy::wire::Malformed;
use crate::proxy::wire::answer::Head;
use crate::watch::Watch;

/// An idle link is dropped after this time. Most servers close theirs after 60 s or more.
const MAX_IDLE: Duration = Duration::from_secs(50);
/// How often the pool is looked through.
const SWEEP_EVERY: Duration = Duration::from_secs(5);
/// How long one address may take to accept a connection, where no setting says so.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long it may take to resolve a name, and to agree on TLS.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(10);
const TLS_TIMEOUT: Duration = Duration::from_secs(10);

/// An upstream, with what every request to it needs.
#[derive(Clone, Debug)]
pub struct Origin {
    pub url: Arc<BaseUrl>,
    /// The URL as text, under which its idle links are kept.
    pub(super) key: Arc<str>,
    /// What `Host` says.
    pub host: HeaderValue,
}

impl Origin {
    pub fn new(url: BaseUrl) -> Self {
        let host = HeaderValue::from_str(url.authority.as_str())
            .unwrap_or_else(|_| HeaderValue::from_static("upstream"));
        Self { key: url.to_string().into(), url: Arc::new(url), host }
    }

    /// What stands before every path there, mostly nothing.
    pub(super) fn path(&self) -> &str {
        &self.url.path
    }

    /// `target` (path and query) behind the origin's own path.
    ///
    /// # Errors
    /// When the two together are no URI, for length mostly.
    pub fn target(&self, target: &Uri) -> Result<Uri, http::Error> {
        let path = target.path_and_query().map_or("/", |path| path.as_str());
        match (self.url.path.as_str(), target.path_and_query()) {
            // As sent, byte for byte.
            ("", Some(path)) => Ok(Uri::from(path.clone())),
            (prefix, _) => Uri::builder().path_and_query(format!("{prefix}{path}")).build(),
        }
    }
}

/// Why an upstream gave no answer. Says nothing about where it is.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot connect to the upstream: {}", brief(.0))]
    Connect(#[source] io::Error),
    #[error("the address is not allowed")]
    NotAllowed,
    #[error("the address is this gateway's own")]
    Own,
    #[error("no more connections can be opened")]
    Exhausted(#[source] io::Error),
    #[error("the upstream closed the connection without an answer")]
    Closed(#[source] io::Error),
    #[error("the upstream's answer is not valid HTTP")]
    Invalid(#[source] Malformed),
    #[error("the upstream's answer has a head beyond 1 MiB, or more than 100 headers")]
    HeadTooLarge,
    #[error("the upstream changed protocols unasked")]
    Unasked,
    #[error("the upstream did not answer in time")]
    Timeout,
    #[error("the path is too long")]
    Target(#[from] http::Error),
    #[error(transparent)]
    Body(BodyError),
}

impl Error {
    /// Whether the request cannot have reached anyone.
    pub fn is_connect(&self) -> bool {
        matches!(self, Self::Connect(_))
    }
}

/// The fault is the upstream's, unless this process is out of what a connection needs.
fn connect_error(error: io::Error) -> Error {
    use rustix::io::Errno;
    match error.get_ref().and_then(|cause| cause.downcast_ref::<Refused>()) {
        Some(Refused::NotAllowed) => return Error::NotAllowed,
        Some(Refused::Own) => return Error::Own,
        None => {}
    }
    let out_of = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::ADDRNOTAVAIL];
    if Errno::from_io_error(&error).is_some_and(|errno| out_of.contains(&errno)) {
        tracing::warn!(%error, "No more connections can be opened");
        return Error::Exhausted(error);
    }
    Error::Connect(error)
}

/// What went wrong, in words that hold no address.
fn brief(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused",
        io::ErrorKind::ConnectionReset => "connection reset",
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => "no route to it",
        io::ErrorKind::TimedOut => "no reply to the connection attempt",
        io::ErrorKind::InvalidData => "TLS failed",
        // What the resolver reports has no number of the system's.
        _ if error.raw_os_error().is_none() => "its name cannot be resolved",
        _ => "network error",
    }
}

/// Sends requests over pooled links. One for each thread that carries calls.
pub struct Client {
    pool: Mutex<Pool>,
    limits: PoolLimits,
    tls: Tls,
    /// How long one address may take to accept a connection.
    connect_timeout: Duration,
    /// Where it may connect to; `None`: anywhere.
    guard: Option<Box<dyn Guard>>,
    /// Whether the system is asked about an idle link before it is used.
    looks: bool,
}

#[derive(Default)]
struct Pool {
    idle: HashMap<Arc<str>, Vec<IdleLink>, RandomState>,
    count: usize,
}

struct IdleLink {
    link: Box<Link>,
    since: Instant,
}

impl Client {
    /// A client whose pool keeps to `limits`.
    pub fn new(limits: PoolLimits, tls: Tls) -> Arc<Self> {
        Self::connecting_within(CONNECT_TIMEOUT, limits, tls)
    }

    /// The same, where each address of an upstream has `connect_timeout` to accept a connection before another is tried.
    pub fn connecting_within(connect_timeout: Duration, limits: PoolLimits, tls: Tls) -> Arc<Self> {
        Arc::new(Self {
            pool: Mutex::default(),
            limits,
            tls,
            connect_timeout,
            guard: None,
            looks: false,
        })
    }

    /// A client for processes of this machine, which may be killed at any time. It asks the system about each idle link
    /// before it uses it: the runtime hears of a peer's end a moment after it, and what is written in that moment
    /// cannot be told from what a process has read.
    pub fn to_processes(limits: PoolLimits) -> Arc<Self> {
        Arc::new(Self {
            pool: Mutex::default(),
            limits,
            tls: Tls::default(),
            connect_timeout: CONNECT_TIMEOUT,
            guard: None,
            looks: true,
        })
    }

    /// A client that connects only to what `guard` admits. It is asked for each connection, since names change what they
    /// resolve to.
    pub fn guarded(limits: PoolLimits, tls: Tls, guard: impl Guard + 'static) -> Arc<Self> {
        let guard: Option<Box<dyn Guard>> = Some(Box::new(guard));
        let connect_timeout = CONNECT_TIMEOUT;
        Arc::new(Self { pool: Mutex::default(), limits, tls, connect_timeout, guard, looks: false })
    }

    /// Sends `request`, whose headers are ready for the wire, as `carry` does.
    pub async fn send(
        self: &Arc<Self>,
        origin: &Origin,
        request: Request<RequestBody>,
        watch: &Arc<Watch>,
    ) -> Result<Response<UpstreamBody>, Error> {
        let (head, body) = request.into_parts();
        self.carry(origin, &mut Upload::new(&head, body), watch).await
    }

    /// Carries a request to `origin`; returns as soon as the head of the answer is there. `watch` bounds all of it, the
    /// answer's body included.
    ///
    /// A link that turns out to have been closed while it idled is replaced, if nothing of the request was sent or if
    /// sending it twice does no harm. After `Error::Connect` all of `upload` is still there.
    pub(super) async fn carry(
        self: &Arc<Self>,
        origin: &Origin,
        upload: &mut Upload,
        watch: &Arc<Watch>,
    ) -> Result<Response<UpstreamBody>, Error> {
        let repeatable = upload.is_repeatable();
        let mut closed = None;
        while let Some(mut link) = self.checkout(&origin.key) {
            if self.looks && link.has_news() {
                continue;
            }
            match link.exchange(upload, watch).await {
                Ok(answer) => return Ok(self.answer(origin, link, answer, watch)),
                Err(Failure::Unsent(unsent)) => *upload = unsent,
                Err(Failure::Closed(error)) if repeatable && link.can_give_back_request() => {
                    tracing::debug!(%error, "An idle connection was closed: trying a new one");
                    (*upload, closed) = (link.into_upload(), Some(error));
                    break;
                }
                Err(failure) => return Err(failure.into()),
            }
        }
        // Boxed, lest its size be carried along by every call.
        let opened = Box::pin(self.connect(origin, watch)).await;
        let error = match opened {
            Ok(mut link) => match link.exchange(upload, watch).await {
                Ok(answer) => return Ok(self.answer(origin, link, answer, watch)),
                // A link that was opened for this request alone.
                Err(Failure::Unsent(unsent)) => {
                    *upload = unsent;
                    Error::Connect(io::ErrorKind::ConnectionReset.into())
                }
                Err(failure) => failure.into(),
            },
            Err(error) => error,
        };
        // Somebody may have seen the request, if not this time.
        Err(match closed {
            Some(closed) if error.is_connect() => Error::Closed(closed),
            _ => error,
        })
    }

    fn answer(
        self: &Arc<Self>,
        origin: &Origin,
        link: Box<Link>,
        head: Head,
        watch: &Arc<Watch>,
    ) -> Response<UpstreamBody> {
        let (client, key, watch) = (Arc::clone(self), Arc::clone(&origin.key), Arc::clone(watch));
        head.answer.map(|()| UpstreamBody::new(head.body, link, client, key, watch))
    }

    async fn connect(&self, origin: &Origin, watch: &Watch) -> Result<Box<Link>, Error> {
        let mut connect = std::pin::pin!(self.open(&origin.url));
        let stream = std::future::poll_fn(|cx| {
            if watch.call_expired() {
                return std::task::Poll::Ready(Err(Error::Timeout));
            }
            connect.as_mut().poll(cx).map_err(connect_error)
        })
        .await?;
        Ok(Box::new(Link::new(stream)))
    }

    async fn open(&self, url: &BaseUrl) -> io::Result<UpstreamStream> {
        let found = timeout(RESOLVE_TIMEOUT, lookup_host((url.host(), url.port()))).await??;
        let addresses = match &self.guard {
            None => found.collect(),
            Some(guard) => timeout(RESOLVE_TIMEOUT, guard.admit(url.host(), found.collect()))
                .await?
                .map_err(io::Error::other)?,
        };
        let tcp = dial(&addresses, self.connect_timeout).await?;
        tcp.set_nodelay(true)?;
        // A peer that vanishes without a word is noticed even by a stream without deadline.
        socket2::SockRef::from(&tcp).set_keepalive(true)?;
        if !url.tls {
            return Ok(UpstreamStream::Plain(tcp));
        }
        let name = ServerName::try_from(url.host().to_owned()).map_err(io::Error::other)?;
        let agreed = timeout(TLS_TIMEOUT, self.tls.connector().connect(name, tcp)).await??;
        Ok(UpstreamStream::Tls(Box::new(agreed)))
    }

    fn checkout(&self, key: &str) -> Option<Box<Link>> {
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        let link = pool.idle.get_mut(key)?.pop()?.link;
        pool.count -= 1;
        Some(link)
    }

    /// Takes a link back after its answer's end, if it can be used again.
    pub(super) fn give_back(&self, key: &Arc<str>, link: Box<Link>, now: Instant) {
        if !link.is_reusable() {
            return;
        }
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        if pool.count >= self.limits.total {
            return;
        }
        let idle = match pool.idle.get_mut(&**key) {
            Some(idle) => idle,
            None => pool.idle.entry(Arc::clone(key)).or_default(),
        };
        if idle.len() < self.limits.per_host {
            idle.push(IdleLink { link, since: now });
            pool.count += 1;
        }
    }

    /// Drops links that were closed or have been idle for long, and the thread's free buffers, every few seconds. Does
    /// not end.
    pub async fn keep_swept(&self) {
        loop {
            tokio::time::sleep(SWEEP_EVERY).await;
            // Unconstrained, since beyond its budget the runtime says of each link that there is nothing to read.
            tokio::task::unconstrained(async { self.sweep() }).await;
            buffers::forget();
        }
    }

    fn sweep(&self) {
        let mut pool = self.pool.lock().unwrap_or_else(PoisonError::into_inner);
        let Pool { idle, count } = &mut *pool;
        let now = Instant::now();
        idle.retain(|_, links| {
            links
                .retain_mut(|idle| now.duration_since(idle.since) < MAX_IDLE && idle.link.settle());
            !links.is_empty()
        });
        *count = idle.values().map(Vec::len).sum();
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Expired => Self::Timeout,
            Failure::Unsent(_) => Self::Connect(io::ErrorKind::ConnectionReset.into()),
            Failure::Closed(error) => Self::Closed(error),
            Failure::Malformed(malformed) => Self::Invalid(malformed),
            Failure::HeadTooLarge => Self::HeadTooLarge,
            Failure::Body(error) => Self::Body(error),
        }
    }
}

/// TLS to upstreams. The system's certificates are read when the first upstream with https is called: most have none.
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
