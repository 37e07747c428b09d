//! One connection of a caller: hyper drives HTTP, this drives hyper, the connection's timer and its end.

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

use crate::echo::OwnWakes;
use crate::serve::caller::{Caller, CallerStream, HEAD};
use crate::serve::linger::Linger;
use crate::serve::refusal::{self, HeadError, Outcome};
use crate::serve::register::{self, Seated};
use crate::watch::{BodyState, Note, Overdue, Stage};

/// The largest head of a request.
pub(super) const MAX_HEAD: usize = 1 << 20;
/// Room for the largest head, and for as much of a body as is passed on at once.
const MAX_BUFFER: usize = MAX_HEAD + (64 << 10);
/// The most headers of a request.
pub(super) const MAX_HEADERS: usize = 256;
/// The first request on a connection younger than this may still be on its way.
const YOUNG: Duration = Duration::from_secs(1);

/// How hyper serves connections of callers.
pub(super) fn builder() -> Builder {
    let mut builder = Builder::new();
    builder.max_header_size(MAX_HEAD).max_buf_size(MAX_BUFFER);
    builder
}

/// A future that ends when the connection does.
pub(super) struct Connection<S: HttpService<Incoming>> {
    http: Http<S>,
    builder: Builder,
    caller: Caller,
    accepted: Instant,
    /// Armed at or before the watch's earliest deadline.
    timer: Pin<Box<Sleep>>,
    armed: Option<Instant>,
    closing: CancellationToken,
    until_closing: Pin<Box<WaitForCancellationFutureOwned>>,
    /// Whether this task is woken by `closing` and by notes.
    registered: bool,
    told_to_close: bool,
    own_wakes: OwnWakes,
    seat: Seated,
}

#[expect(
    clippy::large_enum_variant,
    reason = "most connections rest, and are to need no more memory"
)]
enum Http<S: HttpService<Incoming>> {
    Awake(Box<UpgradeableConnection<TokioIo<CallerStream>, S>>),
    /// Nothing is under way: hyper's state and buffers are not needed until something can be read.
    Resting(CallerStream, S),
    /// All has been answered; the client may still be sending.
    Lingering(Box<Linger>),
    Over,
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
        stream: CallerStream,
        caller: Caller,
        service: S,
        closing: CancellationToken,
        seat: Seated,
    ) -> Self {
        Self {
            http: Http::Resting(stream, service),
            builder,
            caller,
            accepted: Instant::now(),
            // Never polled before it is armed.
            timer: Box::pin(tokio::time::sleep(Duration::ZERO)),
            armed: None,
            until_closing: Box::pin(closing.clone().cancelled_owned()),
            closing,
            registered: false,
            told_to_close: false,
            own_wakes: OwnWakes::default(),
            seat,
        }
    }

    fn poll_http(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            match &mut self.http {
                Http::Resting(stream, _) => {
                    ready!(stream.poll_readable(cx));
                    self.wake();
                }
                Http::Awake(http) => {
                    let ended = ready!(Pin::new(&mut **http).poll(cx));
                    if let Err(error) = &ended {
                        tracing::debug!(caller = %self.caller.address, %error, "Connection ended");
                    }
                    self.hyper_ended(ended.err().as_ref());
                }
                Http::Lingering(linger) => {
                    if self.caller.watch.has(Note::Leave) {
                        return Poll::Ready(());
                    }
                    if self.closing.is_cancelled() {
                        linger.hurry();
                    }
                    return Pin::new(&mut **linger).poll(cx);
                }
                Http::Over => return Poll::Ready(()),
            }
        }
    }

    /// Takes the connection from hyper, which has ended. It may not have taken the head of a request, or not have read
    /// all of its body.
    fn hyper_ended(&mut self, error: Option<&hyper::Error>) {
        let Some((mut stream, service, unparsed)) = self.take_from_hyper() else {
            return self.caller.watch.protocol_changed();
        };
        let refused = error.filter(|error| stream.takes_refusal(error));
        match refused.map(|error| Outcome::of(error, &unparsed)) {
            Some(Outcome::Corrected(head)) => {
                stream.read_again(&head);
                self.http = Http::Resting(stream, service);
            }
            Some(Outcome::NeedsRoom) if !stream.is_roomy() => {
                stream.read_again(&unparsed);
                self.http = Http::Resting(stream, service);
                self.make_room();
            }
            Some(Outcome::NeedsRoom) => self.refuse(stream, HeadError::Malformed, &unparsed),
            Some(Outcome::Refused(error)) => {
                self.refuse(stream, error, &unparsed);
            }
            None if self.caller.watch.body_state() != BodyState::Read => self.linger(stream),
            None => {}
        }
    }

    /// Ends what hyper does. `None` if a changed protocol has taken the connection.
    fn take_from_hyper(&mut self) -> Option<(CallerStream, S, Bytes)> {
        let Http::Awake(http) = std::mem::replace(&mut self.http, Http::Over) else { return None };
        let parts = http.into_parts()?;
        Some((parts.io.into_inner(), parts.service, parts.read_buf))
    }

    /// Refuses a head, of which hyper has left `unparsed`, and closes the connection.
    fn refuse(&mut self, mut stream: CallerStream, error: HeadError, unparsed: &[u8]) {
        let is_head = stream.head_is_of_head() || unparsed.starts_with(HEAD);
        stream.write_first(&refusal::response(error, is_head));
        self.linger(stream);
    }

    /// Closes the connection in a way that lets a client that still sends read its response.
    fn linger(&mut self, stream: CallerStream) {
        if self.caller.watch.takes(Note::LargeHead) {
            // Its buffer is gone, so it no longer counts against the budget.
            self.seat.0.heads.end(&self.seat.0);
        }
        // It was meant for what the connection did before, and would cut off the response.
        self.caller.watch.takes(Note::Leave);
        self.caller.watch.lingers();
        self.http = Http::Lingering(Box::new(Linger::new(stream)));
    }

    /// Whether only the end of the connection is waited for.
    fn lingers(&self) -> bool {
        matches!(self.http, Http::Lingering(_))
    }

    fn wake(&mut self) {
        if let Http::Resting(stream, service) = std::mem::replace(&mut self.http, Http::Over) {
            let http = self.builder.serve_connection(TokioIo::new(stream), service);
            self.http = Http::Awake(Box::new(http.with_upgrades()));
            // This one does not know it yet.
            self.told_to_close = false;
        }
    }

    fn rest(&mut self) {
        match std::mem::replace(&mut self.http, Http::Over) {
            Http::Awake(http) => {
                if let Some(parts) = http.into_parts() {
                    let mut stream = parts.io.into_inner();
                    stream.read_again(&parts.read_buf);
                    self.http = Http::Resting(stream, parts.service);
                }
            }
            other => self.http = other,
        }
    }

    /// Starts hyper anew, with room for more headers, on a head that turns out to have many.
    fn make_room(&mut self) {
        self.rest();
        self.builder.max_headers(MAX_HEADERS);
        if let Http::Resting(stream, _) = &mut self.http {
            stream.has_room();
        }
    }

    /// Has this task woken by notes and by `closing`. A note that was added before is found when notes are checked.
    fn register(&mut self, cx: &mut Context<'_>) {
        self.seat.0.wake_by(cx.waker());
        // If it is ready, the process stops already, which every poll checks.
        let _ = self.until_closing.as_mut().poll(cx);
        self.registered = true;
    }

    /// Closes the connection if the process stops and no request is on its way. Whether hyper is to be polled again.
    fn close_if_asked(&mut self) -> bool {
        if self.told_to_close || !self.closing.is_cancelled() {
            return false;
        }
        let watch = &self.caller.watch;
        match watch.stage() {
            Stage::Idle => {
                if let Some(left) = YOUNG.checked_sub(self.accepted.elapsed()) {
                    watch.call_ended(Instant::now(), left);
                    return false;
                }
            }
            Stage::Head => {
                // hyper would close the connection. Once the head is complete, its call is answered like any other.
                watch.head_within(register::HEAD);
                return false;
            }
            Stage::Call => {}
        }
        self.told_to_close = true;
        match &mut self.http {
            Http::Awake(http) => Pin::new(&mut **http).graceful_shutdown(),
            Http::Resting(..) | Http::Lingering(_) | Http::Over => self.http = Http::Over,
        }
        true
    }

    /// Sees to what this connection has been told. Whether that changes what there is to drive.
    fn heed(&mut self) -> bool {
        let watch = &self.caller.watch;
        if watch.takes(Note::Room) {
            self.make_room();
            return true;
        }
        if watch.has(Note::LargeHead) && watch.stage() != Stage::Head {
            watch.takes(Note::LargeHead);
            self.seat.0.heads.end(&self.seat.0);
        }
        if watch.takes(Note::Refuse) && watch.stage() == Stage::Head {
            tracing::debug!(caller = %self.caller.address, "An incomplete head is refused");
            if let Some((stream, _, unparsed)) = self.take_from_hyper() {
                self.refuse(stream, HeadError::OutOfMemory, &unparsed);
            }
            self.seat.0.heads.end(&self.seat.0);
            return true;
        }
        if watch.has(Note::Leave) {
            if register::dispensable_since(watch, Instant::now()).is_some() {
                tracing::debug!(caller = %self.caller.address, "Closed to make room for another connection");
                self.http = Http::Over;
                return true;
            }
            // A request has begun since. Without the note, the acceptor does not wait for this connection.
            watch.takes(Note::Leave);
        }
        false
    }

    /// Drives what there is to drive, for as long as that changes what there is.
    fn drive(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.registered {
            self.register(cx);
        }
        loop {
            if self.poll_http(cx).is_ready() {
                return Poll::Ready(());
            }
            if self.lingers() {
                return Poll::Pending;
            }
            if self.caller.watch.is_stalled() {
                self.caller.drive_blocked(cx);
            }
            if self.caller.watch.has_notes() && self.heed() {
                continue;
            }
            if self.close_if_asked() {
                continue;
            }
            match self.poll_overdue(cx) {
                None => return Poll::Pending,
                Some(Overdue::Connection) => return Poll::Ready(()),
                Some(Overdue::Rest) => self.rest(),
                // The party that waits learns of it when hyper polls it.
                Some(Overdue::Party) => {}
            }
        }
    }

    /// Sees to the timer; `Some` if a deadline has passed.
    fn poll_overdue(&mut self, cx: &mut Context<'_>) -> Option<Overdue> {
        loop {
            let due = self.caller.watch.due();
            let fired = self.armed.is_some() && self.timer.is_elapsed();
            if fired {
                self.armed = None;
                let now = Instant::now();
                if due.is_some_and(|due| due <= now)
                    && let Some(overdue) = self.caller.watch.expire(now)
                {
                    return Some(overdue);
                }
            }
            let due = self.caller.watch.due()?;
            if self.armed.is_some_and(|armed| armed <= due) {
                return None;
            }
            self.timer.as_mut().reset(due.into());
            self.armed = Some(due);
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
        // Out of `self`, which the poll borrows.
        let mut own_wakes = std::mem::take(&mut self.own_wakes);
        let polled = own_wakes.poll(cx, |cx| self.drive(cx));
        self.own_wakes = own_wakes;
        polled
    }
}
