//! The task of one client connection. It drives hyper, which speaks HTTP, and the timer and the end of the connection.

#[cfg(test)]
mod tests;

use std::error::Error;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::body::{Body, Incoming};
use hyper::server::conn::http1::{Builder, UpgradeableConnection};
use hyper::service::HttpService;
use hyper_util::rt::TokioIo;
use tokio::time::Sleep;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::deadlines::{BodyState, ConnectionState, Expired, Signal};
use crate::self_wake::SelfWakeCoalescer;
use crate::server::client_connection::{ClientConnection, ClientIo, HEAD_METHOD};
use crate::server::linger::Linger;
use crate::server::refusal::{self, HeadError, HeadOutcome};
use crate::server::registry::{self, RegistrationGuard};

/// Maximum size of a request head.
pub(super) const MAX_HEAD_BYTES: usize = 1 << 20;
/// Maximum size of hyper's read buffer: the largest head, and one read of a body.
const MAX_BUFFER_BYTES: usize = MAX_HEAD_BYTES + (64 << 10);
/// Maximum number of headers in a request.
pub(super) const MAX_HEADERS: usize = 256;
/// Age up to which a connection without a request is kept at shutdown, because its first request may be in transit.
const NEW_CONNECTION_GRACE: Duration = Duration::from_secs(1);

/// Returns the configuration of hyper for client connections.
pub(super) fn builder() -> Builder {
    let mut builder = Builder::new();
    builder.max_header_size(MAX_HEAD_BYTES).max_buf_size(MAX_BUFFER_BYTES);
    builder
}

/// A client connection; a future that completes when the connection is closed.
pub(super) struct Connection<S: HttpService<Incoming>> {
    http: Http<S>,
    builder: Builder,
    client: ClientConnection,
    accepted_at: Instant,
    /// Fires at or before the earliest deadline.
    timer: Pin<Box<Sleep>>,
    armed_for: Option<Instant>,
    closing: CancellationToken,
    closing_signal: Pin<Box<WaitForCancellationFutureOwned>>,
    /// `closing` and signals wake this task.
    wakers_registered: bool,
    shutdown_started: bool,
    self_wakes: SelfWakeCoalescer,
    registration: RegistrationGuard,
}

#[expect(
    clippy::large_enum_variant,
    reason = "most connections hibernate, and must not need a second allocation"
)]
enum Http<S: HttpService<Incoming>> {
    Active(Box<UpgradeableConnection<TokioIo<ClientIo>, S>>),
    /// Idle without state or buffers of hyper, until data can be read.
    Hibernating(ClientIo, S),
    /// All responses are complete; the client may still be sending.
    Lingering(Box<Linger>),
    Closed,
}

impl<S, B> Connection<S>
where
    S: HttpService<Incoming, ResBody = B> + Unpin,
    S::Error: Into<Box<dyn Error + Send + Sync>>,
    B: Body + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    pub(super) fn new(
        builder: Builder,
        stream: ClientIo,
        client: ClientConnection,
        service: S,
        closing: CancellationToken,
        registration: RegistrationGuard,
    ) -> Self {
        Self {
            http: Http::Hibernating(stream, service),
            builder,
            client,
            accepted_at: Instant::now(),
            // Not polled before it is armed.
            timer: Box::pin(tokio::time::sleep(Duration::ZERO)),
            armed_for: None,
            closing_signal: Box::pin(closing.clone().cancelled_owned()),
            closing,
            wakers_registered: false,
            shutdown_started: false,
            self_wakes: SelfWakeCoalescer::default(),
            registration,
        }
    }

    fn poll_http(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            match &mut self.http {
                Http::Hibernating(stream, _) => {
                    ready!(stream.poll_readable(cx));
                    self.activate();
                }
                Http::Active(http) => {
                    let ended = ready!(Pin::new(&mut **http).poll(cx));
                    if let Err(error) = &ended {
                        tracing::debug!(client = %self.client.address, %error, "Connection ended");
                    }
                    self.on_hyper_finished(ended.err().as_ref());
                }
                Http::Lingering(linger) => {
                    if self.client.deadlines.has_signal(Signal::Evict) {
                        return Poll::Ready(());
                    }
                    if self.closing.is_cancelled() {
                        linger.shorten();
                    }
                    return Pin::new(&mut **linger).poll(cx);
                }
                Http::Closed => return Poll::Ready(()),
            }
        }
    }

    /// Takes the connection back from hyper, which has ended. hyper may have refused a head, or not have read a whole
    /// body.
    fn on_hyper_finished(&mut self, error: Option<&hyper::Error>) {
        let Some((mut stream, service, unparsed)) = self.detach_hyper() else {
            return self.client.deadlines.on_protocol_switched();
        };
        let refused = error.filter(|error| stream.take_refusal(error));
        match refused.map(|error| HeadOutcome::from_hyper(error, &unparsed)) {
            Some(HeadOutcome::Corrected(head)) => {
                stream.push_back(&head);
                self.http = Http::Hibernating(stream, service);
            }
            Some(HeadOutcome::NeedsManyHeaders) if !stream.allows_many_headers() => {
                stream.push_back(&unparsed);
                self.http = Http::Hibernating(stream, service);
                self.restart_with_many_headers();
            }
            Some(HeadOutcome::NeedsManyHeaders) => {
                self.refuse_head(stream, HeadError::Malformed, &unparsed);
            }
            Some(HeadOutcome::Refused(error)) => {
                self.refuse_head(stream, error, &unparsed);
            }
            None if self.client.deadlines.exchange().body_state() != BodyState::Complete => {
                self.start_linger(stream);
            }
            None => {}
        }
    }

    /// Drops hyper, and returns its stream, service and unparsed data; `None` if the connection has changed protocols.
    fn detach_hyper(&mut self) -> Option<(ClientIo, S, Bytes)> {
        let Http::Active(http) = std::mem::replace(&mut self.http, Http::Closed) else {
            return None;
        };
        let parts = http.into_parts()?;
        Some((parts.io.into_inner(), parts.service, parts.read_buf))
    }

    /// Responds to a refused head, of which `unparsed` is left, and closes the connection.
    fn refuse_head(&mut self, mut stream: ClientIo, error: HeadError, unparsed: &[u8]) {
        let is_head = stream.last_head_is_head_request() || unparsed.starts_with(HEAD_METHOD);
        stream.queue_output(&refusal::response(error, is_head));
        self.start_linger(stream);
    }

    /// Starts a lingering close, so that a client that is still sending can read its response.
    fn start_linger(&mut self, stream: ClientIo) {
        if self.client.deadlines.take_signal(Signal::CountedHead) {
            // The buffer of the head has been dropped.
            self.registration.0.release_head();
        }
        // An earlier eviction was meant for an idle connection, and would cut off the response.
        self.client.deadlines.take_signal(Signal::Evict);
        self.client.deadlines.on_linger_started();
        self.http = Http::Lingering(Box::new(Linger::new(stream)));
    }

    /// Returns whether the connection is in a lingering close.
    fn is_lingering(&self) -> bool {
        matches!(self.http, Http::Lingering(_))
    }

    fn activate(&mut self) {
        if let Http::Hibernating(stream, service) = std::mem::replace(&mut self.http, Http::Closed)
        {
            let http = self.builder.serve_connection(TokioIo::new(stream), service);
            self.http = Http::Active(Box::new(http.with_upgrades()));
            // The new hyper connection has not been told to shut down.
            self.shutdown_started = false;
        }
    }

    fn hibernate(&mut self) {
        match std::mem::replace(&mut self.http, Http::Closed) {
            Http::Active(http) => {
                if let Some(parts) = http.into_parts() {
                    let mut stream = parts.io.into_inner();
                    stream.push_back(&parts.read_buf);
                    self.http = Http::Hibernating(stream, parts.service);
                }
            }
            other => self.http = other,
        }
    }

    /// Restarts hyper with a higher limit of headers, on a head that has many.
    fn restart_with_many_headers(&mut self) {
        self.hibernate();
        self.builder.max_headers(MAX_HEADERS);
        if let Http::Hibernating(stream, _) = &mut self.http {
            stream.allow_many_headers();
        }
    }

    /// Registers this task to be woken by signals and by `closing`. Each poll checks for signals set earlier.
    fn register_wakers(&mut self, cx: &mut Context<'_>) {
        self.registration.0.connection.set_waker(cx.waker());
        // If it is ready, shutdown has started, which each poll checks.
        let _ = self.closing_signal.as_mut().poll(cx);
        self.wakers_registered = true;
    }

    /// Closes the connection if shutdown has started and no request is in progress. Returns whether to poll again.
    fn close_if_draining(&mut self) -> bool {
        if self.shutdown_started || !self.closing.is_cancelled() {
            return false;
        }
        let deadlines = &self.client.deadlines;
        match deadlines.state() {
            ConnectionState::Idle => {
                if let Some(left) = NEW_CONNECTION_GRACE.checked_sub(self.accepted_at.elapsed()) {
                    deadlines.on_exchange_finished(Instant::now(), left);
                    return false;
                }
            }
            ConnectionState::ReadingHead => {
                // hyper would close the connection immediately. Wait until the head is complete, and serve its request.
                deadlines.limit_head_time(registry::HEAD_GRACE);
                return false;
            }
            ConnectionState::InExchange => {}
        }
        self.shutdown_started = true;
        match &mut self.http {
            Http::Active(http) => Pin::new(&mut **http).graceful_shutdown(),
            Http::Hibernating(..) | Http::Lingering(_) | Http::Closed => self.http = Http::Closed,
        }
        true
    }

    /// Handles pending signals. Returns whether to poll again.
    fn handle_signals(&mut self) -> bool {
        let deadlines = &self.client.deadlines;
        if deadlines.take_signal(Signal::ManyHeaders) {
            self.restart_with_many_headers();
            return true;
        }
        if deadlines.has_signal(Signal::CountedHead)
            && deadlines.state() != ConnectionState::ReadingHead
        {
            deadlines.take_signal(Signal::CountedHead);
            self.registration.0.release_head();
        }
        if deadlines.take_signal(Signal::RefuseHead)
            && deadlines.state() == ConnectionState::ReadingHead
        {
            tracing::debug!(client = %self.client.address, "An incomplete head is refused");
            if let Some((stream, _, unparsed)) = self.detach_hyper() {
                self.refuse_head(stream, HeadError::OutOfMemory, &unparsed);
            }
            self.registration.0.release_head();
            return true;
        }
        if deadlines.has_signal(Signal::Evict) {
            if registry::evictable_since(deadlines, Instant::now()).is_some() {
                tracing::debug!(client = %self.client.address, "Evicted: another connection needs the permit");
                self.http = Http::Closed;
                return true;
            }
            // A request has started since. Without the signal, the acceptor stops waiting for this connection.
            deadlines.take_signal(Signal::Evict);
        }
        false
    }

    /// Polls the connection until nothing changes its state any more.
    fn drive(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.wakers_registered {
            self.register_wakers(cx);
        }
        loop {
            if self.poll_http(cx).is_ready() {
                return Poll::Ready(());
            }
            if self.is_lingering() {
                return Poll::Pending;
            }
            if self.client.deadlines.is_write_blocked() {
                self.client.poll_blocked_write_hook(cx);
            }
            if self.client.deadlines.has_signals() && self.handle_signals() {
                continue;
            }
            if self.close_if_draining() {
                continue;
            }
            match self.poll_timer(cx) {
                None => return Poll::Pending,
                Some(Expired::Connection) => return Poll::Ready(()),
                Some(Expired::HibernateDelay) => self.hibernate(),
                // The code that waits sees its flag when hyper polls it.
                Some(Expired::Exchange) => {}
            }
        }
    }

    /// Arms the timer, or returns the deadline that expired.
    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Option<Expired> {
        loop {
            let next = self.client.deadlines.next_deadline();
            let fired = self.armed_for.is_some() && self.timer.is_elapsed();
            if fired {
                self.armed_for = None;
                let now = Instant::now();
                if next.is_some_and(|next| next <= now)
                    && let Some(expired) = self.client.deadlines.fire_expired(now)
                {
                    return Some(expired);
                }
            }
            let next = self.client.deadlines.next_deadline()?;
            if self.armed_for.is_some_and(|armed_for| armed_for <= next) {
                return None;
            }
            self.timer.as_mut().reset(next.into());
            self.armed_for = Some(next);
            if self.timer.as_mut().poll(cx).is_pending() {
                return None;
            }
        }
    }
}

impl<S, B> Future for Connection<S>
where
    S: HttpService<Incoming, ResBody = B> + Unpin,
    S::Error: Into<Box<dyn Error + Send + Sync>>,
    B: Body + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        // Moved out of `self`, which the closure borrows.
        let mut self_wakes = std::mem::take(&mut self.self_wakes);
        let polled = self_wakes.poll(cx, |cx| self.drive(cx));
        self.self_wakes = self_wakes;
        polled
    }
}
