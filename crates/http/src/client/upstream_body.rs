//! The body of a response from an upstream. It drives its connection, and returns it to the pool at the end.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use crate::client::Client;
use crate::client::http1::connection::{Http1Connection, ResponseAborted};
use crate::client::http1::request_writer::RequestWriter;
use crate::client::http1::wire::body_decoder::BodyDecoder;
use crate::deadlines::ExchangeDeadlines;
use gateway_base::sync::lock_unpoisoned;

/// After this many bytes one poll returns `Pending`, so that hyper writes while the bytes are still in the CPU cache.
const POLL_BUDGET_BYTES: usize = 256 << 10;

/// Why a response body ended early.
#[derive(Debug, thiserror::Error)]
pub enum ResponseBodyError {
    #[error("the upstream aborted its response")]
    Aborted(#[source] ResponseAborted),
    #[error("the upstream did not complete its response in time")]
    TimedOut,
}

/// A response body.
pub struct UpstreamBody {
    decoder: BodyDecoder,
    connection: ConnectionSlot,
    /// An error to return from the next poll, so that hyper first writes the frames before it to the client.
    pending_error: Option<ResponseBodyError>,
    client: Arc<Client>,
    /// The pool entry to which the connection is returned.
    endpoint: Arc<str>,
    deadlines: Arc<ExchangeDeadlines>,
    /// For a streaming response: the longest pause between two frames.
    idle_timeout: Option<Duration>,
    /// Bytes returned since the last poll that returned `Pending`.
    polled_bytes: usize,
}

/// The connection of a response body. `None` once the body has failed or been released.
enum ConnectionSlot {
    Owned(Option<Box<Http1Connection>>),
    /// The background writer of the request drives the connection, too. A leaf, held for one poll; the hook of the
    /// client's connection may be held.
    Shared(Arc<Mutex<Option<Box<Http1Connection>>>>),
}

impl ConnectionSlot {
    fn take(&mut self) -> Option<Box<Http1Connection>> {
        match self {
            Self::Owned(connection) => connection.take(),
            Self::Shared(connection) => lock_unpoisoned(connection).take(),
        }
    }

    fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
        decoder: &mut BodyDecoder,
    ) -> Poll<Option<Result<Frame<Bytes>, ResponseAborted>>> {
        let mut shared;
        let connection = match self {
            Self::Owned(connection) => connection,
            Self::Shared(connection) => {
                shared = lock_unpoisoned(connection);
                &mut *shared
            }
        };
        connection
            .as_mut()
            .map_or(Poll::Ready(None), |connection| connection.poll_frame(cx, decoder))
    }
}

impl UpstreamBody {
    pub(super) fn new(
        decoder: BodyDecoder,
        connection: Box<Http1Connection>,
        client: Arc<Client>,
        endpoint: Arc<str>,
        deadlines: Arc<ExchangeDeadlines>,
    ) -> Self {
        Self {
            decoder,
            connection: ConnectionSlot::Owned(Some(connection)),
            pending_error: None,
            client,
            endpoint,
            deadlines,
            idle_timeout: None,
            polled_bytes: 0,
        }
    }

    /// Replaces the deadline of the exchange by one for each pause between frames.
    pub fn set_idle_timeout(&mut self, idle_timeout: Duration) {
        self.deadlines.set_deadline(Instant::now() + idle_timeout);
        self.idle_timeout = Some(idle_timeout);
    }

    /// Returns the connection to the pool if the body is complete; closes it otherwise.
    pub fn release(&mut self, now: Instant) {
        if let Some(connection) = self.connection.take()
            && self.is_end_stream()
        {
            self.client.check_in(&self.endpoint, connection, now);
        }
    }

    /// Returns a function that continues to send the request while this body is not polled.
    pub fn background_writer(&mut self) -> impl FnMut(&mut Context<'_>) + Send + use<> {
        let shared = Arc::new(Mutex::new(self.connection.take()));
        self.connection = ConnectionSlot::Shared(Arc::clone(&shared));
        move |cx| {
            if let Some(connection) = &mut *lock_unpoisoned(&shared) {
                // The next poll of this body reports errors of the request.
                let _ = connection.poll_write_request(cx);
            }
        }
    }

    /// Returns the first bytes of the content, if they were received together with the head.
    pub(super) fn peek(&self) -> &[u8] {
        match &self.connection {
            ConnectionSlot::Owned(Some(connection)) => {
                self.decoder.peek(connection.buffered_input())
            }
            ConnectionSlot::Owned(None) | ConnectionSlot::Shared(_) => &[],
        }
    }

    /// Returns whether the whole body has been received from the upstream.
    pub fn is_fully_received(&self) -> bool {
        let received = |connection: &Option<Box<Http1Connection>>| {
            connection
                .as_ref()
                .map_or(0, |connection| self.decoder.peek(connection.buffered_input()).len() as u64)
        };
        let received = match &self.connection {
            ConnectionSlot::Owned(connection) => received(connection),
            ConnectionSlot::Shared(connection) => received(&lock_unpoisoned(connection)),
        };
        self.size_hint().exact().is_some_and(|missing| missing <= received)
    }

    /// Returns whether the whole request has been sent to the upstream.
    pub(super) fn is_request_sent(&self) -> bool {
        matches!(&self.connection, ConnectionSlot::Owned(Some(connection)) if connection.is_request_sent())
    }

    /// Returns whether the request of this response can be recovered, to be sent again.
    pub(super) fn can_recover_request(&self) -> bool {
        matches!(&self.connection, ConnectionSlot::Owned(Some(connection)) if connection.can_recover_request())
    }

    /// Recovers the request of this response.
    pub(super) fn recover_request(&mut self) -> Option<RequestWriter> {
        match &mut self.connection {
            ConnectionSlot::Owned(Some(connection)) => Some(connection.recover_request()),
            ConnectionSlot::Owned(None) | ConnectionSlot::Shared(_) => None,
        }
    }

    /// Removes the connection from a response that changed protocols.
    pub(super) fn take_connection(&mut self) -> Option<Box<Http1Connection>> {
        self.connection.take()
    }
}

impl Body for UpstreamBody {
    type Data = Bytes;
    type Error = ResponseBodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, ResponseBodyError>>> {
        if let Some(failure) = self.pending_error.take() {
            return Poll::Ready(Some(Err(failure)));
        }
        if self.deadlines.is_expired() {
            self.connection.take();
            return Poll::Ready(Some(Err(ResponseBodyError::TimedOut)));
        }
        let this = &mut *self;
        if this.polled_bytes >= POLL_BUDGET_BYTES {
            this.polled_bytes = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let Poll::Ready(polled) = this.connection.poll_frame(cx, &mut this.decoder) else {
            this.polled_bytes = 0;
            return Poll::Pending;
        };
        match polled {
            Some(Ok(frame)) => {
                this.polled_bytes += frame.data_ref().map_or(0, Bytes::len);
                if let Some(idle_timeout) = self.idle_timeout {
                    self.deadlines.set_deadline(Instant::now() + idle_timeout);
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => {
                self.connection.take();
                self.pending_error = Some(ResponseBodyError::Aborted(error));
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
    /// For responses that were not released.
    fn drop(&mut self) {
        self.release(Instant::now());
    }
}
