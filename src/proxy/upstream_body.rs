//! The body of an upstream's answer: it drives the link that it comes in on, and gives it back at its end.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use crate::proxy::client::Client;
use crate::proxy::link::{Broken, Link};
use crate::proxy::upload::Upload;
use crate::proxy::wire::decoder::Decoder;
use crate::watch::Watch;

/// After so much one poll says that there is nothing, so that hyper writes while the bytes are still in the cache.
const AT_ONCE: usize = 256 << 10;

/// Why an answer's body ended before its end.
#[derive(Debug, thiserror::Error)]
pub enum BodyFailure {
    #[error("the upstream broke off inside its answer")]
    Broken(#[source] Broken),
    #[error("the upstream did not finish its answer in time")]
    Timeout,
}

/// An answer's body.
pub struct UpstreamBody {
    decoder: Decoder,
    link: Hold,
    /// Why there will be no more frames. Told one poll later, so that what came before can be written to the caller.
    failure: Option<BodyFailure>,
    client: Arc<Client>,
    /// Where the link is given back.
    key: Arc<str>,
    watch: Arc<Watch>,
    /// For a stream: the longest pause between two frames.
    pause: Option<Duration>,
    /// How much was handed over since a poll last said that there is nothing.
    at_once: usize,
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

    fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
        decoder: &mut Decoder,
    ) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        let mut shared;
        let link = match self {
            Self::Own(link) => link,
            Self::Shared(link) => {
                shared = link.lock().unwrap_or_else(PoisonError::into_inner);
                &mut *shared
            }
        };
        link.as_mut().map_or(Poll::Ready(None), |link| link.poll_frame(cx, decoder))
    }
}

impl UpstreamBody {
    pub(super) fn new(
        decoder: Decoder,
        link: Box<Link>,
        client: Arc<Client>,
        key: Arc<str>,
        watch: Arc<Watch>,
    ) -> Self {
        Self {
            decoder,
            link: Hold::Own(Some(link)),
            failure: None,
            client,
            key,
            watch,
            pause: None,
            at_once: 0,
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

    /// A way for the rest of the request to go on while nobody asks for this body.
    pub fn share_link(&mut self) -> impl FnMut(&mut Context<'_>) + Send + use<> {
        let shared = Arc::new(Mutex::new(self.link.take()));
        self.link = Hold::Shared(Arc::clone(&shared));
        move |cx| {
            if let Some(link) = &mut *shared.lock().unwrap_or_else(PoisonError::into_inner) {
                // What is wrong with the request is told when this body is asked for.
                let _ = link.poll_upload(cx);
            }
        }
    }

    /// The beginning of the content, as far as it came along with the head.
    pub(super) fn beginning(&self) -> &[u8] {
        match &self.link {
            Hold::Own(Some(link)) => self.decoder.beginning(link.input()),
            Hold::Own(None) | Hold::Shared(_) => &[],
        }
    }

    /// Whether all of it has been received from the upstream.
    pub fn has_come_whole(&self) -> bool {
        let received = |link: &Option<Box<Link>>| {
            link.as_ref().map_or(0, |link| self.decoder.beginning(link.input()).len() as u64)
        };
        let received = match &self.link {
            Hold::Own(link) => received(link),
            Hold::Shared(link) => received(&link.lock().unwrap_or_else(PoisonError::into_inner)),
        };
        self.size_hint().exact().is_some_and(|missing| missing <= received)
    }

    /// Whether the upstream has been sent all of the request.
    pub(super) fn is_request_sent(&self) -> bool {
        matches!(&self.link, Hold::Own(Some(link)) if link.is_sent())
    }

    /// Whether the request that this answers can be had back, to be sent once more.
    pub(super) fn can_give_back_request(&self) -> bool {
        matches!(&self.link, Hold::Own(Some(link)) if link.can_give_back_request())
    }

    /// The request that this answers.
    pub(super) fn give_back_request(&mut self) -> Option<Upload> {
        match &mut self.link {
            Hold::Own(Some(link)) => Some(link.give_back_request()),
            Hold::Own(None) | Hold::Shared(_) => None,
        }
    }

    /// Takes the link out of an answer that changed protocols.
    pub(super) fn take_link(&mut self) -> Option<Box<Link>> {
        self.link.take()
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
        let this = &mut *self;
        if this.at_once >= AT_ONCE {
            this.at_once = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let Poll::Ready(polled) = this.link.poll_frame(cx, &mut this.decoder) else {
            this.at_once = 0;
            return Poll::Pending;
        };
        match polled {
            Some(Ok(frame)) => {
                this.at_once += frame.data_ref().map_or(0, Bytes::len);
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
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.decoder.is_done()
    }

    fn size_hint(&self) -> SizeHint {
        self.decoder.size_hint()
    }
}

impl Drop for UpstreamBody {
    /// For answers whose end nobody announces by `release`.
    fn drop(&mut self) {
        self.release(Instant::now());
    }
}
