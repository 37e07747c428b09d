//! The body of an upstream's answer: it drives the link that it comes in on, and gives it back at its end.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use crate::proxy::client::Client;
use crate::proxy::link::Link;
use crate::watch::Watch;

/// Why an answer's body ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum BodyFailure {
    #[error("the upstream broke off inside its answer")]
    Broken(#[source] hyper::Error),
    #[error("the upstream did not finish its answer in time")]
    Timeout,
}

/// An answer's body.
pub struct UpstreamBody {
    incoming: Incoming,
    link: Hold,
    /// The last frame has been handed out.
    ended: bool,
    /// Why there will be no more frames. Told one poll later, so that what came before is flushed to the caller.
    failure: Option<BodyFailure>,
    client: Arc<Client>,
    /// Where the link is given back.
    key: Arc<str>,
    watch: Arc<Watch>,
    /// For a stream: the longest pause between two frames.
    pause: Option<Duration>,
}

/// The link that a body comes in on. Gone once the body has failed, or has been released.
enum Hold {
    Own(Option<Box<Link>>),
    /// Somebody else drives it, too.
    Shared(Arc<Mutex<Option<Box<Link>>>>),
}

impl Hold {
    fn take(&mut self) -> Option<Box<Link>> {
        match self {
            Self::Own(link) => link.take(),
            Self::Shared(link) => link.lock().unwrap_or_else(PoisonError::into_inner).take(),
        }
    }

    fn drive(&mut self, cx: &mut Context<'_>) {
        match self {
            Self::Own(Some(link)) => link.drive(cx),
            Self::Own(None) => {}
            Self::Shared(link) => drive_shared(link, cx),
        }
    }
}

fn drive_shared(link: &Mutex<Option<Box<Link>>>, cx: &mut Context<'_>) {
    if let Some(link) = &mut *link.lock().unwrap_or_else(PoisonError::into_inner) {
        link.drive(cx);
    }
}

impl UpstreamBody {
    pub(super) fn new(
        incoming: Incoming,
        link: Box<Link>,
        client: Arc<Client>,
        key: Arc<str>,
        watch: Arc<Watch>,
    ) -> Self {
        Self {
            incoming,
            link: Hold::Own(Some(link)),
            ended: false,
            failure: None,
            client,
            key,
            watch,
            pause: None,
        }
    }

    /// From here on the deadline is no longer one for the whole, but one for each pause.
    pub fn bound_pauses(&mut self, pause: Duration) {
        self.watch.call_until(Instant::now() + pause);
        self.pause = Some(pause);
    }

    /// Gives the link back if the body has ended; closes it if not.
    pub fn release(&mut self, now: Instant) {
        if let Some(link) = self.link.take()
            && self.is_end_stream()
        {
            self.client.give_back(&self.key, link, now);
        }
    }

    /// A way to drive the link while nobody asks for this body: the rest of the request goes on by it.
    pub fn share_link(&mut self) -> impl FnMut(&mut Context<'_>) + Send + use<> {
        let shared = Arc::new(Mutex::new(self.link.take()));
        self.link = Hold::Shared(Arc::clone(&shared));
        move |cx| drive_shared(&shared, cx)
    }

    /// Takes the link out of an answer that changed protocols.
    pub(super) fn take_link(&mut self) -> Option<Box<Link>> {
        self.link.take()
    }

    fn poll_incoming(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        // What comes, comes out of `drive`, so nobody need be woken for it.
        let mut nobody = Context::from_waker(Waker::noop());
        if let ready @ Poll::Ready(_) = Pin::new(&mut self.incoming).poll_frame(&mut nobody) {
            return ready;
        }
        self.link.drive(cx);
        Pin::new(&mut self.incoming).poll_frame(&mut nobody)
    }
}

impl Body for UpstreamBody {
    type Data = Bytes;
    type Error = BodyFailure;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyFailure>>> {
        if let Some(failure) = self.failure.take() {
            return Poll::Ready(Some(Err(failure)));
        }
        if self.watch.call_expired() {
            self.link.take();
            return Poll::Ready(Some(Err(BodyFailure::Timeout)));
        }
        match std::task::ready!(self.poll_incoming(cx)) {
            Some(Ok(frame)) => {
                if let Some(pause) = self.pause {
                    self.watch.call_until(Instant::now() + pause);
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                self.link.take();
                self.failure = Some(BodyFailure::Broken(error));
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            None => {
                self.ended = true;
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended || self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}

impl Drop for UpstreamBody {
    /// For answers whose end nobody announces by `release`.
    fn drop(&mut self) {
        self.release(Instant::now());
    }
}
